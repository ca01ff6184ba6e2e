"""The arrows that must never exist, read off the import graph."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import medmeta

PACKAGE = Path(medmeta.__file__).parent
MODULES = {
    ".".join(("medmeta", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere, also inside functions; type-checking imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def edges(sources: tuple[str, ...], targets: tuple[str, ...], besides: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    def within(name: str, roots: tuple[str, ...]) -> bool:
        return any(name == root or name.startswith(f"{root}.") for root in roots)

    return [
        (source, target)
        for source, found in GRAPH.items()
        for target in sorted(found)
        if within(source, sources) and not within(source, besides) and within(target, targets)
    ]


LEARNING = ("medmeta.networks", "medmeta.losses", "medmeta.learners")
RIGHT = ("medmeta.prediction", "medmeta.evaluate", "medmeta.active", "medmeta.report", "medmeta.review")
CONFIG_READERS = ("medmeta.config", "medmeta.cli", "medmeta.benchmark", "medmeta.search")


@pytest.mark.parametrize(
    ("sources", "targets", "besides"),
    [
        (LEARNING, ("medmeta.data", "medmeta.config", "nibabel", "SimpleITK"), ()),
        (("medmeta.data",), ("medmeta.networks", "medmeta.learners", "medmeta.train"), ()),
        (RIGHT, ("medmeta.learners",), ()),
        (("medmeta.train",), ("medmeta.learners", "medmeta.data", "nibabel", "SimpleITK"), ()),
        (("medmeta",), ("medmeta.cli",), ("medmeta.cli", "medmeta.__main__")),
        (("medmeta",), ("medmeta.config",), CONFIG_READERS),
        (("medmeta",), ("higher",), ("medmeta.learners.inner",)),
        (("medmeta",), ("torch.distributed", "lightning", "lightning_fabric"), ("medmeta.train",)),
        (("medmeta",), ("ray",), ("medmeta.ray_engine", "medmeta.search")),
        (("medmeta",), ("pickle",), ()),
    ],
)
def test_forbidden_arrows(sources, targets, besides):
    assert edges(sources, targets, besides) == []


def test_learners_do_not_know_each_other():
    rooms = [f"medmeta.learners.{name}" for name in ("optimisation", "metric", "memory", "in_context", "transfer")]
    assert [edge for room in rooms for edge in edges((room,), tuple(r for r in rooms if r != room))] == []


def test_the_graph_is_not_empty():
    # An empty graph would let every arrow test pass.
    assert ("medmeta.learners.inner", "higher") in edges(("medmeta",), ("higher",))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_library_code_leaves_the_process_alone(name):
    """No print, no environment variables, no global seeds, no .cuda()."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.dump(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"{name}:{node.lineno} {node.attr}"
            if node.attr in ("manual_seed", "seed") and isinstance(node.value, ast.Name):
                allowed = id(node) in guarded or node.value.id not in ("torch", "random", "numpy", "np")
                assert allowed, f"{name}:{node.lineno} global seed"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"{name}:{node.lineno} .cuda()"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), f"{name}:{node.lineno} {node.func.id}"


def test_importing_the_package_starts_nothing_heavy():
    import subprocess
    import sys

    code = "import medmeta, sys; print([m for m in ('torch', 'monai', 'SimpleITK', 'nibabel') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    assert {name for name in medmeta.__all__ if getattr(medmeta, name) is None} == set()
