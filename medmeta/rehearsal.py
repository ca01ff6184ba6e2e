"""Which way to adapt, and how good it will be: models that have not seen a labelled patient are scored on that one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medmeta.data.store import StoredTask, read_scan
from medmeta.data.tasks import Task
from medmeta.evaluate import mean_score, score_case
from medmeta.forecast import forecast
from medmeta.inference import Layer
from medmeta.registration import make_atlases
from medmeta.segmenter import Segmenter

FOLDS = 3
"""Models that are tried for each candidate; with more patients several are left out together."""

BEHIND = 0.01
"""Mean Dice by which a candidate may be behind on the patients left out so far and still be tried on the others."""


@dataclass(frozen=True)
class Rehearsals:
    """How the candidates did on the patients that were left out.

    Args:
        scores: candidate -> scores of the labelled scans (`score_case`) in the order of the folds; those of one that is
            `BEHIND` after some of them end there.
        task: of the labelled scans.
        folds: how many models each candidate that kept up has.
    """

    scores: dict[str, list[dict[str, Any]]]
    task: Task
    folds: int

    def dices(self, name: str) -> list[float]:
        """The mean Dice over the structures of each scan."""
        return [mean_score(row[target]["dice"] for target in self.task.targets) for row in self.scores[name]]

    @property
    def means(self) -> dict[str, float]:
        """Mean Dice of the candidates that were tried to the end."""
        scored = max(map(len, self.scores.values()))
        return {name: mean_score(self.dices(name)) for name, rows in self.scores.items() if len(rows) == scored}

    @property
    def best(self) -> str:
        means = self.means
        return max(means, key=lambda name: means[name])

    def to_card(self, seed: int) -> dict[str, Any]:
        """Scores, and the forecast that follows from them, for the card of the segmenter."""
        cases, means, dices = self.scores[self.best], self.means, self.dices(self.best)
        behind = {
            name: {"scans": len(rows), "dice": mean_score(dices[: len(rows)]) - mean_score(self.dices(name))}
            for name, rows in self.scores.items()
            if name not in means
        }
        labelled = len(self.task.labelled.cases)
        trained_on = round(labelled * (1 - 1 / self.folds))
        return {
            "left_out": {"mean_dice": means, "behind": behind, "cases": cases},
            "forecast": forecast(dices, trained_on, labelled, seed).to_dict(),
        }


def draw_folds(patients: Sequence[str], seed: int) -> list[list[str]]:
    """Patients left out together, each once; none where there are fewer than 3."""
    names = sorted(patients)
    if len(names) < 3:
        return []
    order = [str(name) for name in np.random.default_rng([seed, 2]).permutation(names)]
    return [order[number::FOLDS] for number in range(FOLDS)]


def rehearse(
    candidates: Sequence[str],
    task: Task,
    support: StoredTask,
    folds: Sequence[Sequence[str]],
    atlases: int,
    adapted: Callable[[str, Task, StoredTask, int], Segmenter],
    **where: Any,
) -> Rehearsals:
    """Score candidates on labelled patients that their models have not seen.

    Args:
        candidates: ways to adapt.
        task: labelled scans.
        support: the same, prepared.
        folds: patients left out together.
        atlases: labelled scans at most whose labels are carried to those left out.
        adapted: a segmenter by (candidate, task and prepared scans of the other patients, its number among all that
            would be made if no candidate fell behind), without atlases.
        where: device and precision of prediction.
    """
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    made = Rehearsals(scores, task, len(folds))
    tried = list(candidates)
    for number, left_out in enumerate(folds):
        others = task.labelled.of_patients([name for name in task.labelled.patients if name not in left_out])
        rest = support.only({case.id for case in others.cases})
        cases = task.labelled.of_patients(left_out).cases
        kept = make_atlases(rest, atlases)
        carried: dict[str, Layer | None] = {}
        for candidate in tried:
            turn = number * len(candidates) + candidates.index(candidate)
            segmenter = replace(adapted(candidate, others, rest, turn), atlases=kept)
            for case in cases:
                if case.id not in carried:
                    carried[case.id] = segmenter.carry(read_scan(task, case))
                scores[candidate].append(score_case(segmenter, task, case, 2.0, carried=carried[case.id], **where))
        means = {name: mean_score(made.dices(name)) for name in tried}
        tried = [name for name in tried if not means[name] < max(means.values()) - BEHIND]
    return made
