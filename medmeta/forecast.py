"""How good a segmenter will be on scans it has not seen, and what more labelled scans would bring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SPREAD, SPREAD_WEIGHT = 0.6, 4
"""Standard deviation of Dice over scans on the logit scale, and how many scans this prior knowledge counts for."""

SLOPE, SLOPE_DEVIATION = 0.35, 0.2
"""Rise of the logit of Dice when the number of labelled scans grows e-fold: mean and standard deviation over organs."""

CONFIDENCE = 0.9
_MORE = (1, 2, 5)


@dataclass(frozen=True)
class Forecast:
    """What to expect on unseen scans of the same kind.

    Args:
        scans: labelled scans it rests on, each scored by a model that never saw it.
        dice: expected mean Dice over unseen scans.
        mean_interval: of that mean, 90 %.
        scan_interval: of the Dice of one unseen scan, 90 %.
        more: further labelled scans -> expected mean Dice and its 90 % interval.
    """

    scans: int
    dice: float
    mean_interval: tuple[float, float]
    scan_interval: tuple[float, float]
    more: dict[int, tuple[float, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts."""
        return asdict(self) | {"more": {str(count): list(values) for count, values in self.more.items()}}


def forecast(scores: Sequence[float], trained_on: int, scans: int, seed: int = 0) -> Forecast:
    """Forecast from leave-one-out scores.

    On the logit scale Dice over scans is taken as normal, with a spread that is pooled from the scores and from prior
    knowledge (a scaled inverse chi-square prior; Gelman 2013, section 3.3), since three scores alone know little of
    their own spread; and as a straight line in the logarithm of the number of labelled scans, whose slope is prior
    knowledge too. All intervals come from draws of that model.

    Args:
        scores: Dice of each labelled scan, from a model that was adapted without it; at least two.
        trained_on: scans those models were adapted to.
        scans: scans the final model is adapted to.
        seed: of the draws.

    Raises:
        ValueError: fewer than two scores.
    """
    known = np.array([score for score in scores if score is not None and not math.isnan(score)])
    if len(known) < 2:
        raise ValueError(f"{len(known)} scores; required: at least two scans that were scored by models without them")
    logits = _logit(known)
    rng = np.random.default_rng(seed)
    draws = 20000
    freedom = SPREAD_WEIGHT + len(known) - 1
    squares = SPREAD_WEIGHT * SPREAD**2 + float(((logits - logits.mean()) ** 2).sum())
    spread = np.sqrt(squares / rng.chisquare(freedom, draws))
    level = logits.mean() + spread / math.sqrt(len(known)) * rng.standard_normal(draws)
    slope = np.maximum(0.0, SLOPE + SLOPE_DEVIATION * rng.standard_normal(draws))
    # The mean over scans of what is normal on the logit scale, by a fixed set of quantiles of the scans.
    quantiles = _normal_quantiles(41)

    def mean_dice(count: int) -> np.ndarray:
        centre = level + slope * math.log(count / trained_on)
        return _dice(centre[:, None] + spread[:, None] * quantiles).mean(axis=1)

    now = mean_dice(scans)
    one = _dice(level + slope * math.log(scans / trained_on) + spread * rng.standard_normal(draws))
    more = {count: mean_dice(scans + count) for count in _MORE}
    return Forecast(
        scans=len(known),
        dice=float(now.mean()),
        mean_interval=_interval(now),
        scan_interval=_interval(one),
        more={count: (float(values.mean()), *_interval(values)) for count, values in more.items()},
    )


def describe(facts: Mapping[str, Any]) -> str:
    """A forecast, as `Forecast.to_dict` gives it, in three lines."""
    low, high = facts["mean_interval"]
    worst, best = facts["scan_interval"]
    gains = "; ".join(f"{count} more: {values[0]:.2f}" for count, values in facts["more"].items())
    return (
        f"Expected Dice on unseen scans like these: {facts['dice']:.2f} (90 % interval {low:.2f} to {high:.2f})\n"
        f"A single scan: 90 % between {worst:.2f} and {best:.2f}\n"
        f"With further labelled scans: {gains}"
    )


def _logit(dice: np.ndarray) -> np.ndarray:
    bounded = np.clip(dice, 0.01, 0.99)
    return np.log(bounded / (1.0 - bounded))


def _dice(logit: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logit))


def _normal_quantiles(count: int) -> np.ndarray:
    from scipy.stats import norm

    return norm.ppf((np.arange(count) + 0.5) / count)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
