"""Policies from safe to bold: the order in which a guarantee tests them, laid without the samples that it tests on.

All exits share one limit on one scale, so that a path has a single parameter and a few hundred samples are enough to
lay it. On the scale of the scores themselves, this is one threshold for all exits. Where the scores of exits differ in
what they are worth, another scale does better: the loss that samples of such a score meet at this exit, over what
leaving there saves. Which scale it is, and which exits stay open, is decided by cross-validation.

Scores are oriented so that a sample leaves when its score is ``<=`` the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from cet.calibration.cost import ExitCosts
from cet.ops.definitions import SCORES
from cet.runtime.scores import PolicyScore, has_kernel

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Scores = NDArray[np.float32]

NUM_STEPS = 100
"""How many policies a path has at most."""

TOO_BOLD = 4.0
"""A path ends where the samples that lay it lose so many times the bound: the steps before it are smaller for that."""

PREFERENCE = 0.02
"""By how much of the backbone's cost another scale must beat the scores themselves to be taken."""


@dataclass(frozen=True)
class Scale:
    """A monotone map from the scores of each exit to one scale.

    Attributes:
        is_open: per early exit; a closed one maps everything to infinity.
        known: per exit, scores in ascending order; ``None`` when the scale is that of the scores.
        mapped: what they become, ascending too. A score between two known ones becomes what the higher one does.
    """

    is_open: tuple[bool, ...]
    known: tuple[Scores, ...] | None = None
    mapped: tuple[Floats, ...] | None = None

    def __call__(self, scores: Scores) -> Floats:
        """``(n, E - 1)`` on the scale; a NaN is infinite."""
        result = np.full(scores.shape, np.inf)
        for k in np.flatnonzero(self.is_open):
            column = np.where(np.isnan(scores[:, k]), np.inf, scores[:, k])
            if self.known is not None and self.mapped is not None:
                column = np.append(self.mapped[k], np.inf)[np.searchsorted(self.known[k], column)]
            result[:, k] = column
        return result

    def thresholds(self, limit: float) -> tuple[float, ...]:
        """Per exit, the highest score within the limit; ``-inf`` where there is none, or the exit is closed."""
        found = [-np.inf] * len(self.is_open)
        for k in np.flatnonzero(self.is_open):
            if self.known is None or self.mapped is None:
                found[k] = limit
            elif within := int(np.searchsorted(self.mapped[k], limit, side="right")):
                found[k] = float(self.known[k][within - 1])
        return tuple(found)


def lay_path(
    scores: Scores, losses: Floats, costs: ExitCosts, bound: float, budget: float | None = None
) -> list[tuple[float, ...]]:
    """Thresholds of policies from one under which hardly any sample leaves to one that loses far more than the bound;
    with a budget, to one under which every sample leaves.

    Args:
        scores: ``(n, E - 1)``.
        losses: ``(n, E)``, what a sample loses by leaving at each exit against the final one, weighted so that the mean
            over samples is what is bounded.
        costs: of stages and heads.
        bound: of the mean loss: the scale is chosen for what it saves there.
        budget: of the mean cost: the scale is chosen for what it loses there instead.
    """
    scale = _choose_scale(scores, losses, costs, bound, budget)
    limits = _limits(scale, scores, costs)
    if len(limits) and budget is None:
        loss, _ = _sweep(scale, scores, losses, costs, limits)
        too_bold = np.append(loss > TOO_BOLD * (bound + 1 / len(scores)), True).argmax()
        limits = _limits(scale, scores, costs, limits[min(int(too_bold), len(limits) - 1)])
    return [scale.thresholds(limit) for limit in limits]


def plain_path(score: PolicyScore, num_early: int, num_classes: int) -> list[tuple[float, ...]]:
    """One threshold for all exits, on a grid that no sample had a part in: what is left to test when none may lay the
    path. Half of its steps are even, half ever smaller towards certainty; of patience, every whole number. The range of
    a function is unknown, so that it has no policies here."""
    if score == "patience":
        return [(-float(count),) * num_early for count in reversed(range(num_early))]
    if not has_kernel(score):
        return []
    highest = math.log(num_classes) if SCORES[score].is_low_when_sure else 1.0
    steps = np.linspace(0, 1, NUM_STEPS // 2 + 1)[1:]
    doubt = highest * np.unique(np.concatenate([np.geomspace(1e-6, steps[0], NUM_STEPS // 2, endpoint=False), steps]))
    limits = doubt if SCORES[score].is_low_when_sure else doubt - 1  # high scores are sure: the search negates them
    return [(float(limit),) * num_early for limit in limits]


def _choose_scale(scores: Scores, losses: Floats, costs: ExitCosts, bound: float, budget: float | None) -> Scale:
    """The scale whose path saves most within the bound, or loses least within the budget, laid on one half of the
    samples and tried on the other, both ways."""
    middle = len(scores) // 2
    halves = [slice(0, middle), slice(middle, None)]
    losing: dict[int, Floats] = {}
    paying: dict[int, Floats] = {}
    for laid, tried in (halves, halves[::-1]):
        for index, scale in enumerate(_scales(scores[laid], losses[laid], costs)):
            limits = _limits(scale, scores[laid], costs)
            if not len(limits):
                continue
            even = np.rint(np.linspace(0, len(limits) - 1, NUM_STEPS)).astype(np.int64)
            loss, cost = _sweep(scale, scores[tried], losses[tried], costs, limits[even])
            losing[index] = losing.get(index, 0.0) + loss / 2
            paying[index] = paying.get(index, 0.0) + cost / 2
    worth = {}
    for index, loss in losing.items():
        if budget is not None:
            within = np.append(paying[index] <= budget, True).argmax()
            worth[index] = -np.append(loss, np.inf)[within] - (index > 0) / len(scores)
            continue
        allowed = np.append(loss > bound, True).argmax()
        worth[index] = 1 - paying[index][allowed - 1] / costs.full - PREFERENCE * (index > 0) if allowed else 0.0
    best = max(worth, key=lambda index: worth[index], default=0)
    return list(_scales(scores, losses, costs))[best]


def _scales(scores: Scores, losses: Floats, costs: ExitCosts) -> Iterator[Scale]:
    """That of the scores with every exit open, that of the risk, and that of the scores with some exits closed, where
    their heads are so dear that closing them can pay."""
    every = np.arange(scores.shape[1])
    yield Scale((True,) * len(every))
    if len(every) == 1:
        return
    yield _risk_scale(scores, losses, costs)
    heads, dear = np.array(costs.head), PREFERENCE * costs.full
    yield from (Scale(tuple((every != k).tolist())) for k in every if heads[k] > dear)
    if len(every) > 2:
        yield from (Scale(tuple((every == k).tolist())) for k in every if heads.sum() - heads[k] > dear)


def _risk_scale(scores: Scores, losses: Floats, costs: ExitCosts) -> Scale:
    """The mean loss at each exit of samples with such a score, taken to rise with it (isotonic regression), over the
    cost that leaving there saves. Where the loss is level, as it is at 0, the share of lower scores decides."""
    cost = costs.cumulative([True] * scores.shape[1])
    known, mapped = [], []
    for k, column in enumerate(scores.T):
        in_order = np.argsort(column, kind="stable")[: np.isfinite(column).sum()]
        values, counts = np.unique(column[in_order], return_counts=True)
        last = counts.cumsum() - 1
        if len(in_order):
            risk = isotonic_regression(losses[in_order, k]).x[last].clip(0) / max(cost[-1] - cost[k], TIE * costs.full)
        else:
            risk = np.empty(0)
        known.append(values)
        mapped.append(risk + TIE * (last + 1) / max(len(in_order), 1) / costs.full)
    return Scale((True,) * scores.shape[1], tuple(known), tuple(mapped))


TIE = 1e-6
"""Far less than any loss that shows in samples."""


def _limits(scale: Scale, scores: Scores, costs: ExitCosts, highest: float = np.inf) -> Floats:
    """Limits up to ``highest`` whose policies save more and more, by even steps, of what the boldest of them saves;
    ascending."""
    least = np.minimum.accumulate(scale(scores), axis=1)
    values = np.unique(least[np.isfinite(least) & (least <= highest)])
    if not len(values):
        return values
    _, cost = _sweep(scale, scores, np.zeros((len(scores), scores.shape[1] + 1)), costs, values)
    saved = np.maximum.accumulate(cost[0] - cost)
    steps = np.searchsorted(saved, np.linspace(0, saved[-1], NUM_STEPS))
    limits: Floats = values[np.unique(steps)]
    return limits


def _sweep(scale: Scale, scores: Scores, losses: Floats, costs: ExitCosts, limits: Floats) -> tuple[Floats, Floats]:
    """Mean loss and mean cost under each of the limits, ``(m,)``, ascending.

    A sample is at exit ``k`` or before it as soon as the limit reaches the least of its values up to ``k``; so each
    exit adds the difference between leaving there and leaving at the next.
    """
    place = np.searchsorted(limits, np.minimum.accumulate(scale(scores), axis=1))
    cost, length = costs.cumulative(scale.is_open), len(limits) + 1
    loss, paid = np.full(length, losses[:, -1].sum()), np.full(length, cost[-1] * len(scores))
    for k in range(scores.shape[1]):
        loss += np.bincount(place[:, k], losses[:, k] - losses[:, k + 1], length).cumsum()
        paid += (cost[k] - cost[k + 1]) * np.bincount(place[:, k], minlength=length).cumsum()
    return loss[:-1] / len(scores), paid[:-1] / len(scores)
