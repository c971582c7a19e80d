"""How sure a score is: bootstrap over the images of a split (Efron, *Bootstrap Methods*, 1979).

A split is drawn anew from itself, image by image and with replacement; each draw is scored as the split is. What the
scores of the draws spread over says how much hangs on the choice of the images, not on the choice of the seed.
"""

from typing import NamedTuple

import numpy as np

from cityseg_hf.detailed_counts import DetailedCounts
from cityseg_hf.errors import UserError
from cityseg_hf.evaluation import Judgement

DRAWS = 1000
"""How often a split is drawn."""

COVERED = 0.95
"""The share of the draws that an interval holds, in their middle."""

Interval = tuple[float, float]


class Difference(NamedTuple):
    """How much more one model has of a score than another, on the same images.

    Attributes:
        difference: of the scores themselves.
        low, high: what 95 % of the draws lie between.
        p_value: two-sided: twice the share of the draws on the rarer side of 0, at most 1 and at least 1 / draws.
    """

    difference: float
    low: float
    high: float
    p_value: float


class Bootstrap:
    """The scores of a split, and those of its draws.

    Args:
        judgement: what was counted of the split.
        draws: how often it is drawn; the same ones for all models judged on it.

    Attributes:
        scores: of the split itself.
        drawn: every score of every draw, ``float64[draws]``; NaN where it does not exist.
    """

    def __init__(self, judgement: Judgement, draws: int = DRAWS) -> None:
        self.images, self.scores = judgement.names, dict(judgement.scores())
        columns: dict[str, list[float]] = {}
        for vector in draw(len(self.images), draws) @ judgement.counts:
            for name, value in DetailedCounts.of(vector).scores():
                columns.setdefault(name, []).append(np.nan if value is None else value)
        self.drawn = {name: np.array(values) for name, values in columns.items()}

    def interval(self, name: str) -> Interval | None:
        """What the middle 95 % of the draws lie between (percentile method); ``None`` where none has that score."""
        return middle(self.drawn[name])

    def less(self, other: "Bootstrap", name: str = "miou") -> Difference | None:
        """Paired bootstrap: both models are scored on the same draws, so that what makes a draw hard for both cancels.

        Returns:
            How much more this model has than the other; ``None`` where either has no such score.

        Raises:
            UserError: the images are not the same.
        """
        if self.images != other.images:
            raise UserError("two models can be compared on the same images only: evaluate both on one split")
        mine, theirs = self.scores.get(name), other.scores.get(name)
        if mine is None or theirs is None:
            return None
        drawn = self.drawn[name] - other.drawn[name]
        drawn = drawn[~np.isnan(drawn)]
        rarer = min((drawn <= 0).mean(), (drawn >= 0).mean())
        return Difference(mine - theirs, *middle(drawn), float(np.clip(2 * rarer, 1 / len(drawn), 1)))


def draw(images: int, draws: int) -> np.ndarray:
    """How often each image is in each draw: ``int64[draws, images]``; a pure function of the two numbers."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=draws)


def middle(drawn: np.ndarray) -> Interval | None:
    """What the middle 95 % of some draws lie between, NaN left out."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return None
    low, high = np.quantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)
