"""Install the oldest dependencies that pyproject.toml allows, and run the tests with them.

    python scripts/oldest.py [--folder ENVIRONMENT] [pytest arguments]

Makes a virtual environment, pins each dependency to its lower bound and leaves to pip what they need themselves. Ends
with the exit code of pytest. Needs the network for pip, and some gigabytes of disk.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lower_bounds(pyproject: str) -> list[str]:
    """Each dependency, those of the extra `dev` too, pinned to its lower bound: "torch>=2.8" gives "torch==2.8"."""
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [
        requirement
        for extra in ("dev", "docs")  # dev asks for docs by its name
        for requirement in extras[extra]
        if not requirement.startswith(f"{project['name']}[")
    ]
    matches = [re.match(r"([\w.-]+)(?:\[.+\])?\s*>=\s*([\w.]+)", requirement) for requirement in requirements]
    if None in matches:
        raise ValueError(f"{requirements[matches.index(None)]!r}; required: a lower bound, such as torch>=2.8")
    return [f"{match[1]}=={match[2]}" for match in matches]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environment is made and kept")
    arguments, tests = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.folder or Path(folder)
        venv.create(place, with_pip=True)
        python = str(place / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8"))))
        subprocess.run([python, "-m", "pip", "install", "-e", f"{ROOT}[dev]", "-c", str(constraints)], check=True)
        return subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
