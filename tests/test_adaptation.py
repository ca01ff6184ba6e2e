"""From a few labelled scans to a segmenter: the same every time, whatever the classes and channels, nothing changed."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import like, phantom, same, tiny_2d, tiny_model, write_pairs

from medmeta.adaptation import (
    CANDIDATES,
    FEW_ROUNDS,
    METHODS,
    REHEARSAL,
    REPAINT,
    ROUNDS,
    SLICE_STEPS,
    SLICES,
    adapt,
    adapt_support,
    adapt_to,
    prepare_for,
)
from medmeta.data.sampler import copy_paste, draw_patch
from medmeta.data.tasks import Case, Task
from medmeta.data.volume import Volume, read_volume, write_volume
from medmeta.errors import InputError
from medmeta.fine_tuning import Budget, fine_tune, usual_steps
from medmeta.learners.sliced import Sliced
from medmeta.support import prepare_support, support_task, with_unlabelled

pytestmark = pytest.mark.usefixtures("overview_from_the_first_step")

TWO = {"anterior": (1,), "posterior": (2,)}


@pytest.fixture(scope="module")
def support(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("support"))


@pytest.fixture(scope="module")
def task(support) -> Task:
    return support_task(support / "images", support / "labels", targets=TWO)


@pytest.fixture(scope="module")
def scans(task, tmp_path_factory) -> Task:
    """`task` with one more scan, which has no label map."""
    scan = tmp_path_factory.mktemp("unlabelled") / "new.nii.gz"
    write_volume(phantom(2, 2)[0], scan)
    return replace(task, cases=(*task.cases, Case("new", "new", (scan,), None)))


def finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) and not tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_and_nothing_else(scans, method):
    model, budget = tiny_model(), Budget(steps=3)
    first = adapt_to(model, scans, method=method, budget=budget, seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert same(adapt_to(model, scans, method=method, budget=budget, seed=1).state, first.state)
    assert same(adapt_to(tiny_model(), scans, method=method, budget=budget, seed=1).state, first.state)
    assert not same(adapt_to(model, scans, method=method, budget=budget, seed=2).state, first.state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("learner", ["fomaml", "transfer", "prototypical"])
def test_the_learner_is_left_as_it_was(scans, learner, method):
    model = tiny_model(learner)
    before = {name: tensor.clone() for name, tensor in model.learner.state_dict().items()}
    global_state = torch.get_rng_state()
    segmenter = adapt_to(model, scans, method=method, budget=Budget(steps=3))
    assert same(model.learner.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.learner.parameters())
    assert all(parameter.requires_grad for parameter in model.learner.parameters())
    assert torch.equal(torch.get_rng_state(), global_state)
    assert finite(segmenter.state)
    held = {tensor.data_ptr() for tensor in model.learner.state_dict().values()}
    assert not held & {tensor.data_ptr() for tensor in segmenter.state.values()}, "the state is its own"


def test_adapting_again_starts_from_the_meta_learned_part(task):
    model = tiny_model()
    once = adapt_to(model, task, budget=Budget(steps=2))
    assert same(adapt_to(once, task, budget=Budget(steps=2)).state, once.state)


def test_no_step_is_the_start(task):
    model = tiny_model()
    state = adapt_to(model, task, budget=Budget(steps=0)).state
    assert same(state, {name: tensor.detach() for name, tensor in Sliced(model.learner, 2).start(1, 2).items()})


def test_steps_lower_the_loss(task):
    model = tiny_model()
    told = []
    adapt_to(model, task, budget=Budget(steps=80), progress=lambda *given: told.append(given))
    assert [(step, steps) for step, steps, _ in told] == [(step, 80) for step in range(1, 81)]
    losses = [loss for *_, loss in told]
    slices = math.ceil(SLICE_STEPS * 80)
    for grid in (losses[:slices], losses[slices:]):
        assert np.mean(grid[-8:]) < 0.85 * np.mean(grid[:8])


def test_a_minute_limit_ends_it(task):
    told = []
    budget = Budget(steps=10**6, minutes=0.005)
    adapt_to(tiny_model(), task, budget=budget, progress=lambda *given: told.append(given))
    assert 1 <= len(told) < 10**4


def test_an_unknown_method_is_refused(task):
    with pytest.raises(
        ValueError,
        match=r"method 'magic'; required: one of auto, inner, finetune, lora, norms, head, self_training, scratch",
    ):
        adapt_to(tiny_model(), task, method="magic")


def test_both_grids_draw_from_every_scan_as_often(support, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("medmeta.adaptation.MIXED", 0.0)
    monkeypatch.setattr(
        "medmeta.fine_tuning.draw_patch", lambda case, *rest: drawn.append(case.id) or draw_patch(case, *rest)
    )
    write_pairs(tmp_path, cases=(0, 1, 2))
    task = support_task(tmp_path / "images", tmp_path / "labels", targets=TWO)
    volume = prepare_support(task, 16**3, stride=2)
    adapt_support(tiny_model(), task, volume, budget=Budget(steps=6, patches=2), atlases=0)
    assert [drawn.count(case.id) for case in task.cases] == [3, 3, 3], "two of the working grid, one of the overview"
    drawn.clear()
    adapt_support(tiny_model(), task, prepare_for(tiny_model(), task), budget=Budget(steps=9, patches=2), atlases=0)
    assert [drawn.count(case.id) for case in task.cases] == [18, 18, 18], (
        "eight slices a step, two patches of the volume"
    )


@pytest.mark.parametrize("thick", [True, False])
def test_patches_are_mixed_where_labels_are_guessed_or_several_and_slices_thick(scans, three, monkeypatch, thick):
    import medmeta.adaptation as module

    mixed = []

    def noted(patches, others, rng):
        mixed.append([bool((a[0] != b[0]).any()) for a, b in zip(patches, others, strict=True)])
        return copy_paste(patches, others, rng)

    monkeypatch.setattr("medmeta.fine_tuning.copy_paste", noted)
    monkeypatch.setattr(module, "MIXED", 1.0)
    monkeypatch.setattr(module, "SEVERAL", 3)
    monkeypatch.setattr("medmeta.data.preprocess.Preprocess.thick", thick)
    adapt_to(tiny_model(), scans, method="finetune", budget=Budget(steps=4), atlases=0)
    assert not mixed
    adapt_to(tiny_model(), scans, method="self_training", budget=Budget(steps=18), atlases=0)
    assert [len(each) for each in mixed] == [2] * FEW_ROUNDS * thick, "one step on the volume in each round"
    assert all(map(all, mixed)), "no patch is mixed with itself"
    mixed.clear()
    adapt_to(tiny_model(), three, method="finetune", budget=Budget(steps=4), atlases=0)
    assert [len(each) for each in mixed] == [2] * thick, "slices are not"


def test_several_classes_and_what_the_segmenter_says_of_itself(task):
    segmenter = adapt_to(tiny_model(), task, budget=Budget(steps=2), seed=4)
    assert segmenter.targets == TWO
    assert segmenter.labels == (1, 2)
    assert segmenter.state["head.weight"].shape[0] == 3
    assert segmenter.preprocess.modality == "CT"
    card = segmenter.card
    assert (card["support_scans"], card["method"], card["seed"], card["steps"]) == (2, "finetune", 4, 2)
    assert all(side % 2 == 0 for side in segmenter.overview.patch), "the network's own stride"
    assert [side % 2 for side in segmenter.patch] == [0, 0, 1], "a single slice"


def test_two_channels_in_two_files(support, tmp_path):
    for case in (0, 1):
        scan, labels = phantom(2, case)
        for channel, data in enumerate((scan.data, -scan.data)):
            (tmp_path / "images").mkdir(exist_ok=True)
            write_volume(like(scan, data), tmp_path / "images" / f"case{case}_{channel:04d}.nii.gz")
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_volume(labels, tmp_path / "labels" / f"case{case}.nii.gz")
    segmenter = adapt(tiny_model(), tmp_path / "images", tmp_path / "labels", budget=Budget(steps=2))
    assert len(segmenter.channels) == 2
    assert segmenter.state["body.stem.conv.weight"].shape[1] == 2
    scan, _ = phantom(2, 2)
    made = segmenter.predict(like(scan, torch.cat([scan.data, -scan.data])))
    assert made.shape == scan.shape
    assert segmenter.targets == {"label 1": (1,), "label 2": (2,)}


def test_overlapping_targets_become_exclusive_classes_and_join_again(support):
    targets = {"whole": (1, 2), "posterior": (2,)}
    task = support_task(support / "images", support / "labels", targets=targets)
    assert task.atoms == ((1,), (2,))
    segmenter = adapt_to(tiny_model(), task, budget=Budget(steps=60, rate=1e-2))
    made = segmenter.predict(phantom(2, 0)[0]).data
    assert set(made.unique().tolist()) <= {0, 1, 2}
    _, truth = phantom(2, 0)

    def dice(values):
        a, b = (torch.isin(labels, torch.tensor(values)) for labels in (made, truth.data))
        return 2 * float((a & b).sum()) / float(a.sum() + b.sum())

    assert dice((1, 2)) > 0.5, "the union of what was learned apart"
    assert segmenter.targets == targets


def test_values_of_one_structure_are_one_class(support):
    task = support_task(support / "images", support / "labels", targets={"whole": (2, 1)})
    segmenter = adapt_to(tiny_model(), task, budget=Budget(steps=1))
    assert segmenter.labels == (1,)
    assert segmenter.state["head.weight"].shape[0] == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_2d_network(scans, method):
    segmenter = adapt_to(tiny_2d(), scans, method=method, budget=Budget(steps=2))
    assert finite(segmenter.state)
    assert segmenter.predict(phantom(2, 2)[0]).shape == phantom(2, 2)[0].shape


def test_bfloat16(task):
    rough = adapt_to(tiny_model(), task, budget=Budget(steps=3), precision=torch.bfloat16)
    exact = adapt_to(tiny_model(), task, budget=Budget(steps=3))
    assert finite(rough.state)
    assert not same(rough.state, exact.state)
    assert all(torch.allclose(rough.state[name], exact.state[name], atol=0.02) for name in exact.state)


def test_from_scratch_nothing_learned_before_is_used(task):
    before, after = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in after.learner.parameters():
            parameter += 1.0
    made = [adapt_to(model, task, method="scratch", budget=Budget(steps=2)).state for model in (before, after)]
    assert same(*made)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Task:
    folder = write_pairs(tmp_path_factory.mktemp("three"), cases=(0, 1, 2))
    return support_task(folder / "images", folder / "labels", targets=TWO)


def test_one_or_two_scans_are_fine_tuned_without_a_choice(task):
    card = adapt_to(tiny_model(), task, budget=Budget(steps=1)).card
    assert card["method"] == "finetune"
    assert "left_out" not in card
    assert "forecast" not in card


def test_minutes_are_shared_by_all_that_auto_trains(three):
    told = []
    budget = Budget(steps=10**6, minutes=0.02)
    segmenter = adapt_to(tiny_model(), three, budget=budget, progress=lambda *given: told.append(given))
    assert segmenter.card["minutes"] == pytest.approx(0.02 / (REHEARSAL * 3 * len(CANDIDATES) + 1))
    assert len(told) >= 3 + len(CANDIDATES)


def test_without_a_budget_it_takes_the_usual_steps(task, monkeypatch):
    monkeypatch.setattr("medmeta.fine_tuning.STEPS", 2)
    assert adapt_to(tiny_model(), task).card["steps"] == usual_steps(len(task.patients))


def test_prepared_support_and_segmenter_equal_the_short_way(task):
    model, budget = tiny_model(), Budget(steps=2)
    support = prepare_for(model, task)
    segmenter, short = adapt_support(model, task, support, budget=budget), adapt_to(model, task, budget=budget)
    for a, b in ((segmenter, short), (segmenter.overview, short.overview)):
        assert same(a.state, b.state)
        assert (a.patch, a.preprocess) == (b.patch, b.preprocess)
    given = replace(support.preprocess, spacing=(3.0, 3.0, 3.0))
    assert prepare_support(task, model.voxels, preprocess=given).preprocess == given


def test_an_overview_is_learned_with_half_of_the_steps(task):
    model = tiny_model()
    support = prepare_support(task, 16**3, stride=2)
    segmenter = adapt_support(model, task, support, budget=Budget(steps=3))
    for view, made, steps in ((support, segmenter, 2), (support.overview, segmenter.overview, 1)):
        patches = 2 if view is support else 1
        state = fine_tune(model.learner, replace(view, overview=None), budget=Budget(steps=steps, patches=patches))
        assert same(made.state, state)
        assert made.preprocess == view.preprocess
    assert segmenter.overview.targets == segmenter.targets


def test_few_steps_are_all_for_the_finer_grid(task, monkeypatch):
    import medmeta.adaptation as module

    monkeypatch.setattr(module, "OVERVIEW_FROM", 3)
    model = tiny_model()
    support = prepare_support(task, 16**3, stride=2)
    short, longer = (adapt_support(model, task, support, budget=Budget(steps=steps)) for steps in (2, 3))
    assert short.overview is None
    assert same(short.state, fine_tune(model.learner, replace(support, overview=None), budget=Budget(steps=2)))
    assert longer.overview is not None


def test_an_overview_counts_more_where_there_are_few_scans(task, three):
    few, more = (
        adapt_support(tiny_model(), each, prepare_support(each, 16**3, stride=2), budget=Budget(steps=2))
        for each in (task, three)
    )
    assert (few.overview_share, more.overview_share) == (1 / 2, 1 / 3)


def test_thick_slices_are_learned_one_by_one_too(task, monkeypatch):
    model = tiny_model()
    support = prepare_for(model, task)
    assert support.sliced
    segmenter = adapt_support(model, task, support, budget=Budget(steps=3))
    slices, volume = support.views
    learner = Sliced(model.learner, slices.preprocess.across)
    of_slices = Budget(steps=2, patches=SLICES * Budget().patches)
    assert same(segmenter.state, fine_tune(learner, slices, budget=of_slices))
    assert same(segmenter.overview.state, fine_tune(model.learner, volume, budget=Budget(steps=1)))
    assert (segmenter.learner.net.spatial_dims, segmenter.overview.learner.net.spatial_dims) == (2, 3)
    assert segmenter.overview_share == 1 / 2
    # On goes each from what it was.
    longer = adapt_support(model, task, support, budget=Budget(steps=2), start=segmenter)
    assert not same(longer.state, segmenter.state)
    assert longer.state.keys() == segmenter.state.keys()
    # Few steps, and the learner's own rule, are for the volume.
    monkeypatch.setattr("medmeta.adaptation.OVERVIEW_FROM", 3)
    for method, steps in (("finetune", 2), ("inner", 0)):
        short = adapt_support(model, task, support, method, Budget(steps=steps))
        assert len(short.views) == 1
        assert (short.patch, short.learner) == (volume.patch, model.learner)


@pytest.mark.parametrize("orientation", ["RAS", "SRA", "ASR"])
def test_slices_are_learned_whichever_way_they_lie(orientation, tmp_path):
    """Sagittal, coronal and axial stacks of one object: thick along R, A and S."""
    across = {"RAS": 2, "SRA": 1, "ASR": 0}[orientation]
    write_pairs(tmp_path, cases=(0, 1))
    for path in tmp_path.rglob("*.nii.gz"):
        volume = read_volume(path)
        spacing = volume.affine[:3, :3].norm(dim=0).tolist()
        thick = max(range(3), key=lambda axis: spacing[axis])
        axes = [axis for axis in range(3) if axis != thick]
        axes.insert(across, thick)
        affine = torch.diag(torch.tensor([*(spacing[axis] for axis in axes), 1.0], dtype=torch.float64))
        data = volume.data.permute(0, *(1 + axis for axis in axes)).contiguous()
        path.unlink()
        write_volume(Volume(data, affine), path)
    task = support_task(tmp_path / "images", tmp_path / "labels", targets=TWO)
    segmenter = adapt_to(tiny_model(), task, method="finetune", budget=Budget(steps=2))
    assert segmenter.patch[across] == 1
    scan = read_volume(next((tmp_path / "images").iterdir()))
    assert segmenter.predict(scan, rotations=False).data.shape == (1, *scan.shape)


def copy_of(support: Path, folder: Path) -> Path:
    shutil.copytree(support, folder)
    return folder


def test_label_maps_of_background_only_are_refused(support, tmp_path):
    folder = copy_of(support, tmp_path / "s")
    for case in (0, 1):
        _, labels = phantom(2, case)
        write_volume(like(labels, torch.zeros_like(labels.data)), folder / "labels" / f"case{case}.nii.gz")
    with pytest.raises(InputError, match=r"labels: found only background"):
        adapt(tiny_model(), folder / "images", folder / "labels")
    with pytest.raises(InputError, match=r"labels: found no foreground in any support scan \(liver = \[1\]\)"):
        adapt(tiny_model(), folder / "images", folder / "labels", targets={"liver": (1,)})


def test_one_organ_of_two_that_no_support_scan_holds_is_refused(support, tmp_path):
    targets = {"anterior": (1,), "posterior": (2,), "spleen": (3,), "whole": (1, 2, 3)}
    with pytest.raises(InputError, match=r"labels: found no voxel of spleen = \[3\] in any of the 2 label maps"):
        adapt(tiny_model(), support / "images", support / "labels", targets=targets)
    folder = copy_of(support, tmp_path / "s")
    _, labels = phantom(2, 0)
    write_volume(like(labels, labels.data.clamp(max=1)), folder / "labels" / "case0.nii.gz")
    segmenter = adapt(tiny_model(), folder / "images", folder / "labels", targets=TWO, budget=Budget(steps=1))
    assert segmenter.labels == (1, 2), "one scan that holds it is enough"


def test_unlabelled_and_unpaired_scans(support, tmp_path, task, scans):
    budget = Budget(steps=1)
    model = tiny_model()
    states = [adapt_to(model, each, method="finetune", budget=budget).state for each in (scans, task)]
    assert same(*states)
    with pytest.raises(InputError, match="no labelled scan"):
        adapt_to(model, replace(task, cases=scans.cases[-1:]), budget=budget)
    folder = copy_of(support, tmp_path / "s")
    (folder / "labels" / "case1.nii.gz").unlink()
    with pytest.raises(InputError, match=r"images without labels: case1\.nii\.gz"):
        adapt(model, folder / "images", folder / "labels", targets=TWO)


def test_auto_learns_from_unlabelled_scans_where_there_are_some(scans, task):
    told = []
    segmenter = adapt_to(tiny_model(), scans, budget=Budget(steps=7), progress=lambda *given: told.append(given[:2]))
    assert (segmenter.card["method"], segmenter.card["unlabelled"]) == ("self_training", {"scans": 1, "unusable": []})
    assert told == [(step, 14) for step in range(1, 15)]
    assert len(segmenter.atlases) == 2, "of the labelled scans"
    assert not same(segmenter.state, adapt_to(tiny_model(), task, budget=Budget(steps=7)).state)
    limited = adapt_to(tiny_model(), scans, budget=Budget(steps=10**9, minutes=0.01))
    assert finite(limited.state)
    assert finite(adapt_to(tiny_model(), scans, budget=Budget(steps=0)).state)


def test_an_unusable_unlabelled_scan_stops_nothing_and_is_named(scans, task, tmp_path):
    (tmp_path / "text.nii.gz").write_text("no scan")
    broken = Case("text", "text", (tmp_path / "text.nii.gz",), None)
    card = adapt_to(tiny_model(), replace(scans, cases=(*scans.cases, broken)), budget=Budget(steps=3)).card
    assert card["unlabelled"]["scans"] == 1
    assert len(card["unlabelled"]["unusable"]) == 1
    assert "text.nii.gz" in card["unlabelled"]["unusable"][0]
    alone = replace(task, cases=(*task.cases, broken))
    assert adapt_to(tiny_model(), alone, budget=Budget(steps=1)).card["method"] == "finetune"
    with pytest.raises(InputError, match=r"no unlabelled scan that can be used \(.*text\.nii\.gz"):
        adapt_to(tiny_model(), alone, method="self_training", budget=Budget(steps=1))
    with pytest.raises(InputError, match=r"no unlabelled scan that can be used \(none given\)"):
        adapt_to(tiny_model(), task, method="self_training", budget=Budget(steps=1))


@pytest.mark.parametrize("surest", [0, 1])
def test_self_training_goes_on_from_what_is_surest_with_the_labels_that_gives(scans, monkeypatch, surest):
    import medmeta.adaptation as module

    scans = replace(scans, modality="MR")
    support, _ = with_unlabelled(prepare_support(scans, 16**3, stride=2), scans, seed=0)
    calls, labelled_by = [], []
    fit, label = module.fine_tune, module.with_pseudo_labels

    def noted(learner, view, *rest, begin, repaint, **options):
        made = fit(learner, view, *rest, begin=begin, repaint=repaint, **options)
        calls.append((view, repaint, begin, made))
        return made

    def labelled(segmenter, *rest, **options):
        labelled_by.append(segmenter.state)
        return label(segmenter, *rest, **options)[0], float(len(labelled_by) == surest + 1)

    monkeypatch.setattr(module, "fine_tune", noted)
    monkeypatch.setattr(module, "with_pseudo_labels", labelled)
    made = adapt_support(tiny_model(), scans, support, "self_training", Budget(steps=12))
    rounds = [4, 4] * FEW_ROUNDS
    assert [len(view.cases) for view, *_ in calls] == [2] * 4 + rounds, "every second patch is of a labelled scan"
    goes_on = [surest * REPAINT] * len(rounds)
    assert [repaint for _, repaint, *_ in calls] == [0.0, 0.0, REPAINT, REPAINT, *goes_on]
    assert [begin for *_, begin, _ in calls[:4]] == [None] * 4
    chain = calls[2 * surest : 2 * surest + 2] + calls[4:]
    for (*_, before), (*_, begin, _) in zip(chain, chain[2:], strict=False):
        assert same(begin, before), "each grid goes on from its own weights"
    assert len(labelled_by) == 1 + FEW_ROUNDS
    labelling = [calls[0], calls[2], *chain[2:-2:2]]
    assert all(same(state, call[-1]) for state, call in zip(labelled_by, labelling, strict=True))
    assert same(made.state, calls[-2][-1])
    assert same(made.overview.state, calls[-1][-1])
    assert made.card["support_scans"] == 2
    assert made.card["repainted"] == bool(surest)


def test_fewer_rounds_where_there_are_more_labelled_scans(scans, three, monkeypatch):
    import medmeta.adaptation as module

    steps = []

    def counted(learner, view, method, budget, seed, *, begin, **options):
        steps.append(budget.steps)
        return begin or start

    monkeypatch.setattr(module, "fine_tune", counted)
    monkeypatch.setattr(module, "with_pseudo_labels", lambda _segmenter, _task, support, *_, **__: (support, 0.5))
    start = dict(tiny_model().learner.start(1, 2))
    ways = [(scans, "MR", 2, FEW_ROUNDS), (scans, "CT", 1, FEW_ROUNDS), (three, "MR", 1, ROUNDS)]
    for labelled, modality, starts, rounds in ways:
        steps.clear()
        whole = replace(scans, cases=(*labelled.labelled.cases, scans.cases[-1]), modality=modality)
        card = adapt_to(tiny_model(), whole, method="self_training", budget=Budget(steps=60), atlases=0).card
        assert steps == [40, 20] * starts + [7, 3] * rounds
        assert ("repainted" in card) == (starts == 2), "brightness is known in CT, and of three scans"


def test_a_single_labelled_scan_is_no_atlas_where_no_unlabelled_scan_is_like_it(tmp_path):
    folder = write_pairs(tmp_path / "support", cases=range(1))
    scan, _ = phantom(2, 1)
    noise = torch.randn(scan.data.shape, generator=torch.Generator().manual_seed(0))
    kept = []
    for name, data in (("alike", scan.data), ("noise", noise)):
        (tmp_path / name).mkdir()
        write_volume(like(scan, data), tmp_path / name / "new.nii.gz")
        task = support_task(folder / "images", folder / "labels", targets=TWO, unlabelled=[tmp_path / name])
        kept.append(len(adapt_to(tiny_model(), task, method="self_training", budget=Budget(steps=2)).atlases))
    assert kept == [1, 0]


@pytest.mark.parametrize(
    ("scans_there", "atlases", "expected"), [(2, 3, (0, 1)), (3, 0, ()), (3, 1, (0,)), (5, 3, (0, 2, 4))]
)
def test_labels_are_carried_from_scans_spread_over_the_labelled_ones(tmp_path, scans_there, atlases, expected):
    folder = write_pairs(tmp_path, cases=range(scans_there))
    task = support_task(folder / "images", folder / "labels", targets=TWO)
    support = prepare_support(task, 16**3, stride=2)
    made = adapt_support(tiny_model(), task, support, "finetune", Budget(steps=2), atlases=atlases)
    assert len(made.atlases) == len(expected)
    for atlas, number in zip(made.atlases, expected, strict=True):
        case = support.cases[number]
        assert torch.equal(atlas.mask, torch.from_numpy(np.maximum(case.mask, 0)))
        assert np.corrcoef(atlas.image.flatten(), case.image[0].flatten().astype(np.float32))[0, 1] > 0.9
    assert not made.overview.atlases


def test_a_nan_scan_is_refused_and_a_few_nan_voxels_are_not(support, tmp_path):
    folder = copy_of(support, tmp_path / "s")
    scan, _ = phantom(2, 0)
    hurt = scan.data.clone()
    hurt[:, :5] = math.nan
    write_volume(like(scan, hurt), folder / "images" / "case0.nii.gz")
    segmenter = adapt(tiny_model(), folder / "images", folder / "labels", targets=TWO, budget=Budget(steps=2))
    assert finite(segmenter.state)
    write_volume(like(scan, torch.full_like(hurt, math.nan)), folder / "images" / "case0.nii.gz")
    with pytest.raises(InputError, match=r"case0\.nii\.gz: found NaN"):
        adapt(tiny_model(), folder / "images", folder / "labels", targets=TWO)


def test_a_scan_of_a_few_voxels(tmp_path):
    scan = Volume(torch.rand(1, 3, 4, 2) * 300, torch.eye(4, dtype=torch.float64))
    labels = like(scan, (scan.data > 150).to(torch.int16))
    for name, volume in (("images", scan), ("labels", labels)):
        (tmp_path / name).mkdir()
        write_volume(volume, tmp_path / name / "a.mha")
    segmenter = adapt(tiny_model(), tmp_path / "images", tmp_path / "labels", budget=Budget(steps=2))
    assert finite(segmenter.state)
    assert segmenter.predict(scan).shape == (3, 4, 2)


def test_a_real_set_from_one_scan(shared_data, tmp_path):
    source = shared_data / "Task04_Hippocampus"
    name = sorted(path.name for path in (source / "labelsTr").iterdir() if not path.name.startswith("."))[0]
    for ours, theirs in (("images", "imagesTr"), ("labels", "labelsTr")):
        (tmp_path / ours).mkdir()
        shutil.copy(source / theirs / name, tmp_path / ours / name)
    segmenter = adapt(tiny_model(), tmp_path / "images", tmp_path / "labels", budget=Budget(steps=3))
    assert segmenter.preprocess.modality == "MR"
    assert segmenter.labels == (1, 2)
    assert finite(segmenter.state)
