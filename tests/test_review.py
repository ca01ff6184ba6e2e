from __future__ import annotations

import base64
import gzip
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread, imsave
from small import tiny_model, tree, write_pairs

from medmeta.adaptation import adapt_to
from medmeta.benchmark import summarise
from medmeta.data.tasks import Task
from medmeta.errors import InputError
from medmeta.evaluate import evaluate_folders
from medmeta.fine_tuning import Budget
from medmeta.prediction import Prediction
from medmeta.review import (
    Cell,
    PageTable,
    ReviewCase,
    evaluated_cases,
    predicted_cases,
    write_adaptation,
    write_comparison,
    write_review,
)
from medmeta.segmenter import Segmenter
from medmeta.support import support_task

TARGETS = {"left ball": (3,), "right ball": (7,)}
COLOURS = {"left ball": (230, 159, 0), "right ball": (86, 180, 233)}
MISSED, EXTRA = (86, 180, 233), (230, 159, 0)
HOSTILE = '<script>document.title = "harmed"</script><img src=x onerror=alert(1)> "\'&\\ \u2028 é.nii.gz'
# Stored back to front and top to bottom, with a shift: not the axes that the page uses.
AFFINE = np.array([[0, -2.0, 0, 30], [-2.0, 0, 0, 40], [0, 0, 5.0, -20], [0, 0, 0, 1]])
CENTRES = {"left ball": (-16.0, 4.0, 10.0), "right ball": (14.0, 4.0, 10.0)}


def balls(shift_mm: float = 0.0) -> np.ndarray:
    """(40, 48, 14) labels on AFFINE: two balls of 9 mm, moved towards anterior."""
    mm = np.moveaxis(nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices((40, 48, 14)), 0, -1)), -1, 0)
    labels = np.zeros(mm.shape[1:], dtype=np.int16)
    for (name, (value,)), radius in zip(TARGETS.items(), (9, 9), strict=True):
        centre = np.add(CENTRES[name], (0, shift_mm, 0)).reshape(3, 1, 1, 1)
        labels[((mm - centre) ** 2).sum(axis=0) < radius**2] = value
    return labels


def saved(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """A NIfTI file whose header tells of the patient wherever text fits."""
    image = nib.Nifti1Image(values, affine)
    image.header["descrip"], image.header["db_name"], image.header["aux_file"] = b"Jane Doe", b"Jane Doe", b"Jane Doe"
    image.header["intent_name"] = b"Jane Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, path)
    return path


def scan_values() -> np.ndarray:
    """Whole intensities from 0 to about 800, brighter in the balls, growing with the slice."""
    noise = np.random.default_rng(0).normal(0, 20, (40, 48, 14))
    return np.rint(200 + 20 * np.arange(14) + 300 * (balls() > 0) + noise).astype(np.int16)


def scores(dice: float, **others: float) -> dict[str, float]:
    return {"dice": dice, "surface_dice": dice / 2, "hd95_mm": 10 * (1 - dice), "prediction_ml": 3.1, **others}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "scan": saved(folder / "scan.nii.gz", scan_values()),
        "reference": saved(folder / "reference.nii.gz", balls()),
        "moved": saved(folder / "moved.nii.gz", balls(6)),
        "other grid": saved(folder / "small.nii.gz", balls()[:20]),
        "hostile": saved(folder / "hostile.nii.gz", balls()),
    }


@pytest.fixture(scope="module")
def page_path(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the browser opens: some cases for the tests below, and 300 that nobody opens."""
    folder = tmp_path_factory.mktemp("out <script> #1 %41")
    scan, reference, moved = sources["scan"], sources["reference"], sources["moved"]
    good = {name: scores(0.9, reference_ml=3.0) for name in TARGETS}
    bad = {"left ball": scores(0.5), "right ball": scores(0.1, missed=True)}
    others = {name: scores(0.95) for name in TARGETS}
    cases = [
        ReviewCase("good", scan, reference, reference, good, quality=0.7),
        ReviewCase("bad", scan, reference, moved, bad, quality=0.8, flags=["looks odd"]),
        ReviewCase(HOSTILE, scan, None, sources["hostile"], flags=[HOSTILE]),
        ReviewCase("broken", folder / "nothing.nii.gz"),
        ReviewCase("gone", scan, scores=others),
        *(ReviewCase(f"case {number}", folder / "nothing.nii.gz", scores=others) for number in range(300)),
    ]
    picture = folder / "<b>curve.PNG"
    imsave(picture, np.zeros((4, 4, 3)), format="png")
    page = write_review(
        folder, cases, targets=TARGETS, title=HOSTILE, summary={HOSTILE: HOSTILE}, pictures={HOSTILE: picture},
        settings={"adapt": {"steps": 50, HOSTILE: HOSTILE}},
    )  # fmt: skip
    (page.parent / "volumes" / "4-scan.js").unlink()
    return page


def data_of(page: Path) -> dict:
    script = (page.parent / "data.js").read_text(encoding="ascii")
    return json.loads(re.fullmatch(r"globalThis\.reviewData = (.*);\n", script)[1])


def volume_of(page: Path, name: str) -> nib.Nifti1Image:
    script = (page.parent / "volumes" / f"{name}.js").read_text(encoding="ascii")
    content = re.fullmatch(rf'review\.receive\("{name}", "([A-Za-z0-9+/=]+)"\);\n', script)[1]
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content)))


def written(folder: Path, *cases: ReviewCase, **options) -> Path:
    return write_review(folder, cases, **{"targets": TARGETS, "title": "a title", **options})


@pytest.fixture(scope="module")
def adaptation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Segmenter, Task, list[tuple[int, int, float]]]:
    """A segmenter from three phantoms, the third of them on an oblique grid; its task; what was told of the loss."""
    folder = write_pairs(tmp_path_factory.mktemp("Jane Doe"), cases=(0, 1, 2))
    task = support_task(folder / "images", folder / "labels", targets={"first": (1,), "second": (2,)})
    told = []
    budget = Budget(steps=4)
    return adapt_to(tiny_model(), task, budget=budget, progress=lambda *each: told.append(each)), task, told


def arm_rows() -> list[dict]:
    """Three arms on twelve cases and two structures: `good` is better than the baseline on each, `bad` worse."""
    results = []
    for shots in (1, 5):
        for arm, dice in (("transfer", 0.5), ("good", 0.7), ("bad <i>", 0.2)):
            figures = [{"dice": dice + shots / 100 + number / 1000, "surface_dice": dice / 2} for number in range(12)]
            cases = [
                {"case": f"{n}", "a": {**f, "missed": False}, "b": {**f, "missed": False}}
                for n, f in enumerate(figures)
            ]
            results.append(
                {
                    "arm": arm,
                    "shots": shots,
                    "draw": 0,
                    "method": "finetune",
                    "steps": 30,
                    "adapt_seconds": 4.0,
                    "cases": cases,
                }
            )
    return summarise([each for each in results if (each["arm"], each["shots"]) != ("bad <i>", 1)], ["a", "b"])


def table_texts(page: Path, title: str) -> list[list[str]]:
    table = next(each for each in data_of(page)["tables"] if each["title"].startswith(title))
    return [table["columns"], *([cell["text"] for cell in row] for row in table["rows"])]


def at_same_place(page_image: nib.Nifti1Image, source: np.ndarray, affine: np.ndarray = AFFINE) -> np.ndarray:
    """The source's values at the places, in mm, of the voxels on the page."""
    indices = np.moveaxis(np.indices(page_image.shape), 0, -1)
    mm = nib.affines.apply_affine(page_image.affine, indices)
    voxels = nib.affines.apply_affine(np.linalg.inv(affine), mm)
    assert np.abs(voxels - np.rint(voxels)).max() < 1e-4
    return source[tuple(np.moveaxis(np.rint(voxels).astype(int), -1, 0))]


# What is written.


def test_volumes_hold_the_values_of_the_files_at_their_places(page_path):
    scan, reference = volume_of(page_path, "1-scan"), volume_of(page_path, "1-prediction")
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(scan.get_fdata(), at_same_place(scan, scan_values()))
    codes = at_same_place(reference, balls(6))
    np.testing.assert_array_equal(reference.get_fdata(), np.where(codes == 3, 1, np.where(codes == 7, 2, 0)))


def test_nothing_of_a_header_reaches_the_page(page_path, sources):
    assert gzip.decompress(sources["scan"].read_bytes()).count(b"Jane Doe") == 5
    for name in ("1-scan", "1-reference", "1-prediction"):
        image = volume_of(page_path, name)
        assert b"Jane" not in image.to_bytes()
        assert not image.header.extensions


def test_file_names_of_users_name_no_file_of_the_page(page_path):
    names = sorted(path.name for path in page_path.parent.rglob("*"))
    assert all(re.fullmatch(r"[a-z0-9-]+(\.[a-z]+)?", name) for name in names), names


def test_centres_lie_in_their_structures(page_path):
    centres = data_of(page_path)["cases"][0]["centres"]
    assert centres.keys() == CENTRES.keys()
    for name, centre in CENTRES.items():
        assert np.abs(np.subtract(centres[name], centre)).max() <= 2.5


def test_the_centre_of_a_ring_lies_on_the_ring(tmp_path):
    ring = balls()
    ring[:] = 0
    ring[10:21, 10:21, 5] = 3
    ring[11:20, 11:20, 5] = 0
    labels = saved(tmp_path / "ring.nii.gz", ring)
    page = written(tmp_path, ReviewCase("ring", labels, labels))
    voxel = nib.affines.apply_affine(np.linalg.inv(AFFINE), data_of(page)["cases"][0]["centres"]["left ball"])
    assert ring[tuple(np.rint(voxel).astype(int))] == 3


def test_the_reference_says_where_an_organ_is_and_the_prediction_where_there_is_none(tmp_path, sources):
    only_left = np.where(balls(6) == 3, 3, 0).astype(np.int16)
    reference = saved(tmp_path / "left.nii.gz", only_left)
    page = written(tmp_path, ReviewCase("one", sources["scan"], reference, sources["reference"]))
    centres = data_of(page)["cases"][0]["centres"]
    assert abs(centres["left ball"][1] - 10) <= 2
    assert abs(centres["right ball"][1] - 4) <= 2


def test_large_volumes_are_shown_on_every_nth_voxel_of_the_finest_axes(tmp_path, sources):
    case = ReviewCase("large", sources["scan"], sources["reference"])
    page = written(tmp_path, case, voxel_limit=10_000)
    scan, reference = volume_of(page, "0-scan"), volume_of(page, "0-reference")
    assert scan.shape == reference.shape == (24, 20, 14)
    np.testing.assert_array_equal(scan.get_fdata(), at_same_place(scan, scan_values()))
    np.testing.assert_array_equal(reference.get_fdata() > 0, at_same_place(reference, balls()) > 0)
    note = data_of(page)["cases"][0]["reduced"]
    assert "24x20x14 voxels of 4x4x5 mm" in note
    assert "40x48x14 of 2x2x5 mm" in note
    assert data_of(written(tmp_path, case))["cases"][0]["reduced"] == ""


@pytest.mark.parametrize("outlier", [1e9, -1e9, math.nan, math.inf, -math.inf])
def test_one_odd_voxel_leaves_the_others_their_intensities(tmp_path, outlier):
    values = scan_values().astype(np.float32) / 1000
    values[0, 0, 0] = outlier
    page = written(tmp_path, ReviewCase("odd", saved(tmp_path / "odd.nii.gz", values)))
    image = volume_of(page, "0-scan")
    error = np.abs(image.get_fdata() - at_same_place(image, values))
    central = np.ptp(np.percentile(scan_values(), (0.1, 99.9))) / 1000
    assert np.sort(error[np.isfinite(error)])[:-1].max() < central / 2**11
    low, high = data_of(page)["cases"][0]["window"]
    assert 0 < low < high < 1


def test_a_scan_without_a_finite_or_a_second_value_is_written(tmp_path):
    nothing = saved(tmp_path / "nan.nii.gz", np.full((4, 4, 4), np.nan, dtype=np.float32))
    constant = saved(tmp_path / "constant.nii.gz", np.full((4, 4, 4), 0.3, dtype=np.float32))
    page = written(tmp_path, ReviewCase("nan", nothing), ReviewCase("constant", constant))
    assert (volume_of(page, "0-scan").get_fdata() == 0).all()
    np.testing.assert_allclose(volume_of(page, "1-scan").get_fdata(), 0.3, rtol=1e-4)
    assert all(low < high for low, high in (case["window"] for case in data_of(page)["cases"]))


def test_a_given_window_is_kept(tmp_path, sources):
    page = written(tmp_path, ReviewCase("ct", sources["scan"], window=(-160.0, 240.0)))
    assert data_of(page)["cases"][0]["window"] == [-160, 240]


def test_the_first_of_several_channels_is_shown(tmp_path):
    values = np.stack([scan_values(), 2 * scan_values()], axis=-1)
    page = written(tmp_path, ReviewCase("two", saved(tmp_path / "two.nii.gz", values)))
    image = volume_of(page, "0-scan")
    np.testing.assert_array_equal(image.get_fdata(), at_same_place(image, values[..., 0]))


def test_what_cannot_be_shown_is_told_and_stops_nothing(tmp_path, sources):
    scan, reference = sources["scan"], sources["reference"]
    page = written(
        tmp_path,
        ReviewCase("no scan", tmp_path / "none.nii.gz", reference),
        ReviewCase("small", scan, sources["other grid"], reference),
        ReviewCase("not labels", scan, scan, tmp_path),
        ReviewCase("good", scan, reference),
    )
    problems = [case["problems"] for case in data_of(page)["cases"]]
    volumes = [sorted(case["volumes"]) for case in data_of(page)["cases"]]
    assert volumes == [[], ["prediction", "scan"], ["reference", "scan"], ["reference", "scan"]]
    assert [len(each) for each in problems] == [1, 1, 1, 0]
    assert problems[0][0].startswith("scan not shown: found nothing at this path")
    assert "another grid than the scan: shape differs: 40x48x14 against 20x48x14 voxels" in problems[1][0]
    assert problems[2][0].startswith("prediction not shown: ")
    assert str(tmp_path) not in problems[0][0]


def test_targets_may_share_label_values_and_other_values_are_left_out(tmp_path, sources):
    page = written(tmp_path, ReviewCase("one", sources["scan"], sources["reference"]), targets={"a": (7, 9), "b": (9,)})
    assert [structure["codes"] for structure in data_of(page)["structures"]] == [[1, 2], [2]]
    labels = volume_of(page, "0-reference")
    np.testing.assert_array_equal(labels.get_fdata(), at_same_place(labels, balls()) == 7)


def test_a_new_page_leaves_nothing_of_the_old_one(tmp_path, sources):
    written(tmp_path, *[ReviewCase("secret", sources["scan"], sources["reference"])] * 2)
    page = written(tmp_path, ReviewCase("one", sources["scan"]))
    assert [path.name for path in (page.parent / "volumes").iterdir()] == ["0-scan.js"]
    assert "secret" not in (page.parent / "data.js").read_text()


def test_a_page_that_fails_half_way_leaves_the_earlier_one_whole(tmp_path, sources):
    page = written(tmp_path / "page", ReviewCase("one", sources["scan"]))
    before = tree(page.parent)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "page", ReviewCase("two", sources["reference"]), progress=stop)
    assert tree(page.parent) == before
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["report"]


def test_what_is_no_page_is_not_replaced(tmp_path, sources):
    """Somebody else's pictures and notes, a note beside the page, a file."""
    theirs, noted, file = (tmp_path / name for name in ("theirs", "noted", "file"))
    (theirs / "report" / "pictures").mkdir(parents=True)
    (theirs / "report" / "pictures" / "holiday.png").write_text("x")
    written(noted, ReviewCase("one", sources["scan"]))
    (noted / "report" / "notes.txt").write_text("look at the second")
    file.mkdir()
    (file / "report").write_text("x")
    before = tree(tmp_path)
    for folder, found in ((theirs, "pictures, which is of no page"), (noted, "notes.txt"), (file, "Not a directory")):
        with pytest.raises(InputError, match=rf"report: found {found}.*Name another folder"):
            written(folder, ReviewCase("one", sources["scan"]))
    assert tree(tmp_path) == before
    (noted / "report" / "notes.txt").rename(noted / "report" / ".DS_Store")
    assert written(noted).exists()


def test_the_same_cases_give_the_same_files_on_another_day(tmp_path, sources, monkeypatch):
    case = ReviewCase("one", sources["scan"], sources["reference"], scores={"left ball": scores(math.nan)})
    first = written(tmp_path / "a", case).parent
    monkeypatch.setattr("time.time", lambda: 1e9)
    second = written(tmp_path / "b", case).parent
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 7
    assert [(first / path).read_bytes() for path in files] == [(second / path).read_bytes() for path in files]


def test_progress_counts_the_cases(tmp_path, sources):
    calls = []
    cases = [ReviewCase("a", sources["scan"]), ReviewCase("b", tmp_path / "none.nii")]
    written(tmp_path, *cases, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_settings_are_flat_text_and_versions_stand_beside_them(page_path, tmp_path):
    settings = {"a": {"b": {"c": (1, 0.1 + 0.2)}, "d": None}, "e": Path("x"), "rows": [{"f": 1}], "g": 1 / 3}
    page = written(tmp_path, settings=settings)
    assert data_of(page)["settings"] == {"a.b.c": "1, 0.3", "a.d": "None", "e": "x", "g": "0.333333"}
    assert {"medmeta", "torch", "Python"} < data_of(page)["versions"].keys()


def test_the_viewer_comes_with_its_licence(page_path):
    script = (page_path.parent / "niivue.js").read_text(encoding="utf-8")
    assert script.startswith("/*! NiiVue")
    assert "Redistributions in binary form must reproduce the above copyright" in script[:3000]


def test_a_package_without_the_viewer_is_named(tmp_path, monkeypatch):
    class Empty:
        version = "9"

        def locate_file(self, path: str) -> Path:
            return tmp_path / "widget.js"

    monkeypatch.setattr("medmeta.review.page.distribution", lambda name: Empty())
    for content in (None, "export default {}", f'x = "{"a%20" * 30000}"'):
        if content is not None:
            (tmp_path / "widget.js").write_text(content)
        with pytest.raises(InputError, match=r"widget\.js: .*Install ipyniivue"):
            written(tmp_path)


def test_unusable_calls_name_their_fault(tmp_path, sources):
    with pytest.raises(ValueError, match=r"one: scores of .*'spleen'.*; required: .*left ball"):
        written(tmp_path, ReviewCase("one", sources["scan"], scores={"spleen": {}}))
    with pytest.raises(InputError, match=r"no\.png: found no such file; required: a picture"):
        written(tmp_path, pictures={"a": tmp_path / "no.png"})
    with pytest.raises(InputError, match="targets"):
        written(tmp_path, targets={"a": ()})
    with pytest.raises(InputError, match="a file in place of the folder"):
        written(sources["scan"])


# What a browser makes of it.


@dataclass
class Browsed:
    """A page under test, and what it did besides showing itself."""

    page: object
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def column(self, number: int) -> list[str]:
        return self.page.locator(f"#table tbody tr > :nth-child({number})").all_inner_texts()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def open(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()
        self.page.locator("#status", has_text=re.compile("^$")).wait_for(state="attached")

    def choose(self, text: str) -> None:
        self.page.locator("fieldset label", has_text=text).click()

    def slice_number(self) -> int:
        return int(self.text("#place").split(" of ")[0])

    def pixels(self) -> np.ndarray:
        """(height, width, 3) of the viewer, 0..255."""
        return np.rint(255 * imread(io.BytesIO(self.page.locator("#canvas").screenshot()))[..., :3]).astype(int)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"needs a browser: {' or '.join(names)}")
    # A sandbox within a container and a graphics card are more than the page needs.
    options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=options)
        yield running
        running.close()


@contextmanager
def browsing(browser, page_path: Path) -> Iterator[Browsed]:
    """A page, opened from disk; in the end it has complained of nothing and asked for nothing."""
    page = browser.new_page(viewport={"width": 1000, "height": 600}, color_scheme="light")
    page.set_default_timeout(120_000)
    seen = Browsed(page)
    page.on("console", lambda message: seen.console.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.console.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (seen.console.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(page_path.as_uri())
    page.locator("#facts dd").first.wait_for()
    yield seen
    page.close()
    assert seen.console == []
    beyond = [url for url in seen.requests if not url.startswith((page_path.parent.as_uri(), "data:", "blob:"))]
    assert beyond == []


@pytest.fixture
def browsed(browser, page_path) -> Iterator[Browsed]:
    """The page above, once its worst case is open."""
    with browsing(browser, page_path) as seen:
        seen.page.locator("#place", has_text="mm").wait_for()
        yield seen


def test_the_page_opens_the_worst_case_at_its_worst_organ_and_loads_no_other(browsed):
    assert browsed.text("#open") == "bad"
    assert "For research. Not a medical device." in browsed.text("header")
    assert browsed.text("#place").endswith("reference right ball · prediction right ball")
    loaded = {url.rsplit("/", 1)[1] for url in browsed.requests if "/volumes/" in url}
    assert loaded == {"1-scan.js", "1-reference.js", "1-prediction.js"}


def in_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(N, 2) rows and columns of the pixels that have a colour, as drawn at full opacity."""
    return np.argwhere(np.abs(pixels - colour).max(axis=-1) <= 8)


def test_the_viewer_draws_scan_reference_prediction_and_their_difference(browsed):
    browsed.page.locator("#opacity").fill("1")
    browsed.choose("Axial")
    shown = {}
    for show in ("Scan", "Reference", "Prediction", "Difference", "Both"):
        browsed.choose(show)
        shown[show] = browsed.pixels()
    assert shown["Scan"].std() > 20
    place = {}
    for name, colour in COLOURS.items():
        assert len(in_colour(shown["Scan"], colour)) == 0
        for show in ("Reference", "Prediction"):
            assert len(in_colour(shown[show], colour)) > 500
            place[show, name] = in_colour(shown[show], colour).mean(axis=0)
        # Anterior, where the prediction was moved, is up.
        assert place["Prediction", name][0] < place["Reference", name][0] - 5
    # As radiologists look at it: what lies right in the patient lies left in the picture.
    assert place["Reference", "right ball"][1] < place["Reference", "left ball"][1] - 50
    # Both balls miss a crescent behind, and have one too many in front.
    missed, extra = in_colour(shown["Difference"], MISSED), in_colour(shown["Difference"], EXTRA)
    assert min(len(missed), len(extra)) > 200
    assert missed.mean(axis=0)[0] > extra.mean(axis=0)[0] + 20
    # An outline behind what is filled in front: more than the prediction alone, less than both filled.
    parts = [len(in_colour(shown[show], COLOURS["left ball"])) for show in ("Prediction", "Both")]
    assert parts[0] * 1.02 < parts[1] < parts[0] * 1.5
    browsed.page.get_by_label("Show left ball").uncheck()
    remaining = browsed.pixels()
    assert len(in_colour(remaining, COLOURS["left ball"])) == 0
    assert len(in_colour(remaining, COLOURS["right ball"])) > 500


def test_one_scrolls_with_wheel_keys_and_slider(browsed):
    browsed.choose("Axial")
    first, start = browsed.pixels(), browsed.slice_number()
    browsed.page.locator("#canvas").hover()
    browsed.page.mouse.wheel(0, 100)
    browsed.page.locator("#place").filter(has_not_text=f"{start} of ").wait_for()
    wheeled = browsed.slice_number()
    assert abs(wheeled - start) == 1
    assert (browsed.pixels() != first).any()
    browsed.page.locator("#cases-heading").click()
    browsed.press("PageUp", "PageUp")
    assert browsed.slice_number() == wheeled + 2
    browsed.press("PageDown")
    assert browsed.slice_number() == wheeled + 1
    browsed.page.locator("#slice").fill("0")
    assert browsed.slice_number() == 1
    browsed.page.locator("#cases-heading").click()
    browsed.press("PageDown")
    assert browsed.slice_number() == 1
    browsed.choose("Sagittal")
    assert " of 48 " in browsed.text("#place")


def test_the_window_brightens_and_darkens(browsed):
    browsed.choose("Scan")
    before = browsed.pixels().mean()
    browsed.page.locator("#high").fill("4000")
    browsed.press("Enter")
    dark = browsed.pixels().mean()
    browsed.page.locator("#reset").click()
    assert dark < 0.6 * before
    assert browsed.pixels().mean() == pytest.approx(before, rel=0.02)


def test_the_table_sorts_and_structures_have_figures_of_their_own(browsed):
    names = browsed.column(1)
    assert names[:3] == ["broken", "bad", "good"]
    assert len(names) == 305
    assert browsed.column(2)[:3] == ["–", "0.300", "0.900"]
    assert browsed.text("#table [aria-sort]").startswith("Dice")
    browsed.page.get_by_role("button", name="Dice", exact=True).click()
    assert browsed.column(1)[:2] == ["case 0", "case 1"]
    assert browsed.page.locator("#table [aria-sort]").get_attribute("aria-sort") == "descending"
    browsed.page.get_by_role("button", name="Quality").click()
    qualities = [name for name in browsed.column(1) if name in ("good", "bad")]
    assert qualities == ["good", "bad"]
    browsed.page.get_by_role("button", name="Case", exact=True).click()
    assert browsed.column(1)[-1] == "good"
    browsed.press("ArrowRight")
    assert browsed.page.locator("#structure").input_value() == "0"
    assert browsed.column(2)[browsed.column(1).index("bad")] == "0.500"
    assert "reference left ball" in browsed.text("#place")
    browsed.press("ArrowLeft", "ArrowLeft")
    assert browsed.page.locator("#structure").input_value() == "-1"


def test_the_keyboard_walks_through_the_cases_with_its_focus_visible(browsed):
    browsed.page.get_by_role("button", name="bad", exact=True).focus()
    browsed.press("ArrowDown")
    assert browsed.text("#open") == "good"
    assert browsed.page.evaluate("document.activeElement.textContent") == "good"
    assert browsed.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browsed.page.locator("#table [aria-current]").count() == 1
    browsed.page.locator("#place", has_text="prediction left ball").wait_for()
    browsed.press("1")
    assert browsed.page.locator("#show input:checked").input_value() == "Scan"
    browsed.press("ArrowUp", "ArrowUp", "ArrowUp")
    assert browsed.text("#open") == "broken"
    assert "found nothing at this path" in browsed.text("#problems")
    assert browsed.page.locator("#slice").is_disabled()


def test_a_case_whose_volume_is_gone_shows_nothing_rather_than_the_case_before(browsed):
    browsed.page.get_by_role("button", name="gone", exact=True).click()
    browsed.page.locator("#status", has_text="volumes/4-scan.js is missing or damaged").wait_for()
    assert not browsed.page.locator("#canvas").is_visible()
    assert browsed.page.locator("#slice").is_disabled()
    browsed.open("bad")
    assert browsed.page.locator("#canvas").is_visible()
    assert "ERR_FILE_NOT_FOUND" in browsed.console.pop()


def test_hostile_names_are_text(browsed):
    page = browsed.page
    assert browsed.text("#title") == page.title() == HOSTILE
    assert browsed.column(1)[-1] == HOSTILE
    assert page.locator("script").count() == 3
    assert page.locator("img").count() == 1
    assert page.locator("#pictures img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 4
    page.locator("#table tbody tr").last.click()
    page.locator("#place", has_text="prediction").wait_for()
    assert browsed.text("#open") == HOSTILE
    assert "reference" not in browsed.text("#place")
    assert page.locator("#show input:disabled").count() == 3
    assert page.locator("#show input:checked").input_value() == "Prediction"
    assert HOSTILE in page.locator("#facts").inner_text()


def test_the_page_follows_the_wish_for_light_or_dark(browsed):
    def ground() -> int:
        colour = browsed.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    assert ground() > 600
    browsed.page.emulate_media(color_scheme="dark")
    assert ground() < 150
    browsed.page.locator("#theme").click()
    assert ground() > 600
    browsed.page.locator("#theme").click()
    assert ground() < 150


def test_the_page_of_an_adaptation_shows_scans_scores_forecast_and_loss(browser, adaptation, tmp_path):
    segmenter, task, told = adaptation
    card = segmenter.card
    with browsing(browser, write_adaptation(tmp_path, segmenter, task, losses=told)) as seen:
        seen.page.locator("#place", has_text="mm").wait_for()
        assert seen.text("#title") == "Adapted to first, second from 3 scans"
        assert f"{card['forecast']['dice']:.2f} (" in seen.text("#summary")
        assert "adapted without it" in seen.text("#note")
        left_out = {
            row["case"]: (row["first"]["dice"] + row["second"]["dice"]) / 2 for row in card["left_out"]["cases"]
        }
        assert dict(zip(seen.column(1), seen.column(2), strict=True)) == {
            name: f"{dice:.3f}" for name, dice in left_out.items()
        }
        for name, dice in card["left_out"]["mean_dice"].items():
            row = seen.page.locator("#tables tbody tr", has=seen.page.get_by_text(name, exact=True))
            assert row.locator("td").inner_text() == f"{dice:.3f}"
        assert (
            seen.page.locator("#pictures img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
        )
        # On an oblique grid too the page opens where the organ is.
        for case in seen.column(1):
            seen.open(case)
            assert re.search("reference (first|second)$", seen.text("#place")), case


def test_an_adaptation_names_its_settings_and_no_folder(adaptation, tmp_path):
    segmenter, task, _ = adaptation
    secret = f"{task.cases[0].images[0].parent}/case9.nii.gz: found nothing"
    noted = replace(segmenter, card=segmenter.card | {"unlabelled": {"scans": 0, "unusable": [secret]}})
    page = write_adaptation(tmp_path, noted, task)
    data = data_of(page)
    assert data["settings"]["adapted.steps"] == "4"
    assert data["settings"]["network.name"] == "se_unet_3d"
    assert data["settings"]["trained on"] == "Task01_Liver"
    assert not any(name.startswith(("adapted.left_out", "adapted.forecast")) for name in data["settings"])
    assert "Jane Doe" not in (page.parent / "data.js").read_text()
    assert data["pictures"] == []
    assert data["cases"][0]["window"] == list(segmenter.preprocess.window)


def test_the_forecast_table_counts_further_scans(adaptation, tmp_path):
    segmenter, task, _ = adaptation
    rows = table_texts(write_adaptation(tmp_path, segmenter, task), "Forecast")
    assert [row[0] for row in rows[1:]] == ["3", "4 (1 more)", "5 (2 more)", "8 (5 more)"]
    assert [row[1] for row in rows[2:]] == [f"{each[0]:.2f}" for each in segmenter.card["forecast"]["more"].values()]


def test_what_was_not_left_out_has_no_scores(adaptation, tmp_path):
    segmenter, task, _ = adaptation
    card = {name: value for name, value in segmenter.card.items() if name not in ("left_out", "forecast")}
    two = task.of_patients(task.patients[:2])
    data = data_of(write_adaptation(tmp_path, replace(segmenter, card=card), two))
    assert [case["scores"] for case in data["cases"]] == [{}, {}]
    assert data["tables"] == []
    assert data["note"].startswith("From 3 labelled scans on")


def test_a_way_that_fell_behind_is_named_beside_the_others(adaptation, tmp_path):
    segmenter, task, _ = adaptation
    left_out = segmenter.card["left_out"] | {
        "mean_dice": {"finetune": 0.75},
        "behind": {"lora": {"scans": 2, "dice": 0.04}},
    }
    page = write_adaptation(tmp_path, replace(segmenter, card=segmenter.card | {"left_out": left_out}), task)
    rows = table_texts(page, "Ways to adapt, on scans left out")
    assert rows[1:] == [["finetune", "0.750"], ["lora", "0.040 behind on 2 scans, no more tried"]]


def test_only_the_loss_of_the_model_that_is_kept_is_drawn(adaptation, tmp_path, monkeypatch):
    segmenter, task, told = adaptation
    drawn = []
    monkeypatch.setattr(
        "medmeta.review.adaptation.learning_curves", lambda history, path: (drawn.extend(history), path.touch())
    )
    write_adaptation(tmp_path, segmenter, task, losses=told)
    assert len(told) > 4
    assert [(row["step"], row["loss"]) for row in drawn] == [(n + 1, told[n - 4][2]) for n in range(4)]


def test_the_page_of_a_benchmark_compares_the_arms(browser, sources, tmp_path):
    picture = tmp_path / "curve.png"
    imsave(picture, np.zeros((4, 4, 3)), format="png")
    costs = {"good": {"meta_seconds": 60.2, "time_ratio": 3.04, "peak_bytes": 5 * 2**20}}
    task = Task("organs", "organs", "CT", {"a": (1,), "b": (2,)}, ())
    page = write_comparison(
        tmp_path, arm_rows(), task, baseline="transfer", costs=costs, pictures={"curve": picture}, settings={"seed": 3}
    )
    dice = table_texts(page, "Dice")
    assert dice[0] == ["Arm", "1 scan, 30 steps", "5 scans, 30 steps"]
    assert [row[0] for row in dice[1:]] == ["transfer", "good", "bad <i>"]
    assert dice[1][1] == "0.515 (0.51 to 0.52)"
    assert [row[2][-2:] for row in dice[1:]] == ["6)", " +", " -"]
    assert dice[3][1] == "", "an arm that was not put through it"
    assert table_texts(page, "Dice of each structure from 5 scans")[0] == ["Arm", "a", "b"]
    assert table_texts(page, "Cost")[1:] == [
        ["transfer", "", "", "", "4.0"], ["good", "60", "3.0", "5", "4.0"], ["bad <i>", "", "", "", "4.0"]
    ]  # fmt: skip
    with browsing(browser, page) as seen:
        assert not seen.page.locator("#review").is_visible()
        assert "0.76 (good)" in seen.text("#summary")
        assert seen.page.locator("#tables section").count() == 4
        assert seen.page.locator("#tables section").first.locator("strong").all_inner_texts() == [
            dice[2][1],
            dice[2][2],
        ]
        assert "bad <i>" in seen.text("#tables")
        assert "seed" in seen.text("#facts")
    with pytest.raises(ValueError, match="no rows"):
        write_comparison(tmp_path, [], task, baseline="transfer")


def test_tables_are_text_with_bars_where_there_is_a_figure(browser, tmp_path):
    table = PageTable(HOSTILE, ["name", HOSTILE], [[HOSTILE, Cell("0.5", 0.5)], ["none", Cell("-", math.nan)]], HOSTILE)
    with browsing(browser, written(tmp_path, tables=[table], note=HOSTILE)) as seen:
        assert seen.page.locator("#tables .bar-cell").all_inner_texts() == ["0.5"]
        assert seen.text("#tables").count(HOSTILE) == 4
        assert seen.text("#note") == HOSTILE
        assert seen.page.title() == "a title"


def test_cases_of_a_batch_prediction(tmp_path):
    results = [
        Prediction(
            tmp_path / "a.nii.gz", tmp_path / "out" / "a.nii.gz", "done", volumes_ml={"kidney": 3.5}, quality=0.9
        ),
        Prediction(tmp_path / "b.nii.gz", None, "failed", "no voxel", name="second", notes=("sheared",)),
    ]
    first, second = predicted_cases(results)
    assert (first.name, first.prediction, first.quality) == ("a.nii.gz", results[0].output, 0.9)
    assert first.scores == {"kidney": {"prediction_ml": 3.5}}
    assert (second.name, second.prediction) == ("second", None)
    assert second.flags == ("sheared", "failed: no voxel")


def test_cases_of_an_evaluation_find_their_scans(tmp_path):
    write_pairs(tmp_path, cases=(0, 1))
    shutil.copytree(tmp_path / "labels", tmp_path / "made")
    evaluation = evaluate_folders(tmp_path / "labels", tmp_path / "made")
    cases = {case.name: case for case in evaluated_cases(evaluation, tmp_path / "images")}
    assert cases.keys() == {"case0", "case1"}
    assert cases["case0"].scan == tmp_path / "images" / "case0.nii.gz"
    assert cases["case0"].reference == tmp_path / "labels" / "case0.nii.gz"
    assert cases["case0"].prediction == tmp_path / "made" / "case0.nii.gz"
    assert {row["dice"] for row in cases["case1"].scores.values()} == {1.0}
    (tmp_path / "images" / "case0.nii.gz").rename(tmp_path / "images" / "case0_0000.nii.gz")
    assert len(evaluated_cases(evaluation, tmp_path / "images")) == 2
    write_pairs(tmp_path / "others", cases=(7,))
    with pytest.raises(InputError, match="no scan of 2 cases"):
        evaluated_cases(evaluation, tmp_path / "others" / "images")
