"""medmeta: segment a new organ from 1 to 10 labelled CT or MR scans.

    model = medmeta.load("organs3d")
    segmenter = medmeta.adapt(model, "images", "labels", targets={"kidney": (1,)})
    labels = segmenter.predict(medmeta.read_volume("scan.nii.gz"))

Names are loaded on first use: importing the package starts nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmeta.adaptation import adapt, adapt_to
    from medmeta.data.tasks import Case, Task, load_task, pair_folders
    from medmeta.data.volume import Volume, read_volume, write_volume
    from medmeta.episode import Episode, Examples, State
    from medmeta.errors import InputError, MedmetaError
    from medmeta.evaluate import evaluate_folders
    from medmeta.fine_tuning import Budget
    from medmeta.prediction import predict, predict_each
    from medmeta.segmenter import Model, Segmentation, Segmenter, load, shipped_models

__version__ = version("medmeta")

_HOMES = {
    "medmeta.adaptation": ("adapt", "adapt_to"),
    "medmeta.data.tasks": ("Case", "Task", "load_task", "pair_folders"),
    "medmeta.data.volume": ("Volume", "read_volume", "write_volume"),
    "medmeta.episode": ("Episode", "Examples", "State"),
    "medmeta.errors": ("InputError", "MedmetaError"),
    "medmeta.evaluate": ("evaluate_folders",),
    "medmeta.fine_tuning": ("Budget",),
    "medmeta.prediction": ("predict", "predict_each"),
    "medmeta.segmenter": ("Model", "Segmentation", "Segmenter", "load", "shipped_models"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Budget",
    "Case",
    "Episode",
    "Examples",
    "InputError",
    "MedmetaError",
    "Model",
    "Segmentation",
    "Segmenter",
    "State",
    "Task",
    "Volume",
    "adapt",
    "adapt_to",
    "evaluate_folders",
    "load",
    "load_task",
    "pair_folders",
    "predict",
    "predict_each",
    "read_volume",
    "shipped_models",
    "write_volume",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'medmeta' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
