"""Thresholds of all early exits at once: the least mean cost that keeps a promised accuracy.

Minimise the mean cost over samples, subject to at most ``max_drop`` less accuracy than the final exit has, or less of
another :class:`Metric`, over one threshold per early exit. Every distinct score of an exit is a candidate, and so is
closing it. The search improves a group of one, two or three exits at a time while the others stay: it evaluates every
combination of their candidates exactly, from cumulative sums over a joint histogram of their scores, and takes the
best, until no such move helps. It is exact for one early exit, and for two or three with few distinct scores; otherwise
it ends in a local optimum.

A metric that is a user's function is no sum over samples. Such a move looks at fewer combinations, in the order of
their cost, and calls the function until one keeps the promise.

Here scores are oriented so that a sample leaves when its score is ``<=`` the threshold, as with entropy; negate
confidence and margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cet.calibration.cost import ExitCosts
from cet.calibration.metrics import Metric

MAX_GROUP = 3
"""How many exits move together at most."""

MAX_COMBINATIONS = 2**16
"""How many combinations of candidates one move of several exits looks at."""

MAX_CELLS = 2**21
"""How many sums over the samples of a stratum one move of a single exit looks at."""

MAX_EVALUATIONS = 2**10
"""How many combinations of candidates one move looks at when the metric is a user's function."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OperatingPoint:
    """What thresholds achieve on the samples they were chosen on.

    Attributes:
        thresholds: one per early exit; a finite float32 value, or ``-inf`` for a closed exit.
        accuracy: in [0, 1].
        cost: mean cost per sample.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float


def simulate(thresholds: ArrayLike, scores: ArrayLike) -> Ints:
    """The exit at which each sample leaves, ``(n,)``: the first whose score is ``<=`` its threshold, else the last.

    Args:
        thresholds: ``(E - 1,)``; an exit with ``-inf`` is closed.
        scores: ``(n, E - 1)``; compared in float32, as at run time. A NaN never leaves.
    """
    limits = np.asarray(thresholds, dtype=np.float32)
    exit_mask = (np.asarray(scores, dtype=np.float32) <= limits) & (limits > -np.inf)
    exit_index: Ints = np.column_stack([exit_mask, np.ones(len(exit_mask), dtype=bool)]).argmax(axis=1)
    return exit_index


def search_thresholds(
    scores: ArrayLike,
    correct: ArrayLike,
    costs: ExitCosts,
    max_drop: float,
    metric: Metric | None = None,
    max_group: int = MAX_GROUP,
) -> OperatingPoint:
    """The cheapest thresholds found that lose at most ``max_drop`` of what the final exit has.

    Thresholds lie half-way between the scores of the samples that leave and of those that stay, so that rounding at
    run time moves no sample. Closing every exit is always allowed, so there is always an answer.

    Args:
        scores: ``(n, E - 1)`` of each sample at each early exit, low where it may leave; a NaN never leaves.
        correct: ``(n, E)`` bool, whether the prediction of each exit is right.
        costs: cost of stages and heads.
        max_drop: of the metric, in [0, 1].
        metric: what is bounded; accuracy when not given.
        max_group: how many exits move together at most; fewer are faster with many exits, and less exact.

    Raises:
        ValueError: for no samples, shapes that disagree, or ``max_drop`` out of range.
    """
    return frontier(scores, correct, costs, [max_drop], metric, max_group)[0]


def frontier(
    scores: ArrayLike,
    correct: ArrayLike,
    costs: ExitCosts,
    drops: Sequence[float],
    metric: Metric | None = None,
    max_group: int = MAX_GROUP,
) -> list[OperatingPoint]:
    """One operating point per entry of ``drops``: what each loss of the metric buys.

    A larger drop never costs more than a smaller one. Arguments and errors are those of :func:`search_thresholds`.
    """
    for drop in drops:
        if not 0 <= drop <= 1:
            raise ValueError(f"max_drop is {drop}; give a loss of accuracy in [0, 1]")
    problem = _Problem(scores, correct, costs, metric)
    closed = np.zeros_like(problem.num_levels)
    found: dict[float, Ints] = {}
    previous = closed
    for drop in sorted(set(drops)):
        starts = [closed, previous] if previous.any() else [closed]
        previous = min((problem.improve(start, drop, max_group) for start in starts), key=problem.mean_cost)
        found[drop] = previous
    return [problem.operating_point(found[drop]) for drop in drops]


class _Problem:
    """The samples, with scores as ranks.

    The state of the search is a *level* per early exit: 0 closes it, ``l`` lets the samples with one of the ``l``
    lowest distinct scores leave.
    """

    def __init__(self, scores: ArrayLike, correct: ArrayLike, costs: ExitCosts, metric: Metric | None) -> None:
        num_exits = len(costs.stage)
        score_array, correct_array = np.asarray(scores, dtype=np.float32), np.asarray(correct, dtype=bool)
        num_samples = len(score_array)
        for name, shape, width in (
            ("scores", score_array.shape, num_exits - 1),
            ("correct", correct_array.shape, num_exits),
        ):
            if shape != (num_samples, width):
                raise ValueError(
                    f"{name} has shape {shape}; for {num_samples} samples and the {num_exits} exits of costs "
                    f"give ({num_samples}, {width})"
                )
        if num_samples == 0:
            raise ValueError("scores holds no samples; give at least one")
        self.costs = costs
        self.metric = metric or Metric.accuracy(num_samples)
        self.scores = np.nan_to_num(score_array, nan=np.inf, posinf=np.inf)
        self.correct = np.ascontiguousarray(correct_array.T)
        self.samples = np.arange(num_samples)
        self.ranks = np.empty((num_exits - 1, num_samples), dtype=np.int64)
        self.num_levels = np.empty(num_exits - 1, dtype=np.int64)
        for k, column in enumerate(self.scores.T):
            values, ranks = np.unique(column, return_inverse=True)
            self.ranks[k] = ranks + 1
            self.num_levels[k] = np.count_nonzero(values < np.inf)
        # Whole numbers, so that sums are exact and equal sums compare equal.
        unit = costs.cumulative(np.ones(num_exits - 1, dtype=bool))[-1] / 2**30
        self.stage, self.head = np.rint(np.divide(costs.stage, unit)), np.rint(np.divide(costs.head, unit))
        self.weights = np.rint(self.metric.weights / self.metric.weights.sum() * 2**52)
        gain = self.correct if self.metric.gain is None else np.ascontiguousarray(self.metric.gain.T)
        self.right = np.rint(self.weights * gain)
        in_order = np.argsort(self.metric.strata, kind="stable")
        self.strata = np.split(in_order, np.bincount(self.metric.strata).cumsum()[:-1])
        self.known_values: dict[bytes, float] = {}

    def leaving_exit(self, levels: Ints) -> Ints:
        exit_mask = self.ranks <= levels[:, None]
        exit_index: Ints = np.vstack([exit_mask, np.ones_like(self.samples, dtype=bool)]).argmax(axis=0)
        return exit_index

    def path_cost(self, levels: Ints) -> Floats:
        """The cost of leaving at each exit."""
        cost: Floats = np.cumsum(self.stage) + np.cumsum(np.append(self.head * (levels > 0), 0.0))
        return cost

    def mean_cost(self, levels: Ints) -> float:
        return float(self.path_cost(levels)[self.leaving_exit(levels)].mean())

    def value(self, levels: Ints) -> float:
        """The user's own metric."""
        assert self.metric.of_exits is not None
        key = levels.tobytes()
        if key not in self.known_values:
            self.known_values[key] = self.metric.of_exits(self.leaving_exit(levels))
        return self.known_values[key]

    def improve(self, levels: Ints, max_drop: float, max_group: int) -> Ints:
        """Move one to ``max_group`` exits at a time until no move helps."""
        exits = range(len(levels))
        groups = [group for size in range(1, max_group + 1) for group in combinations(exits, size)]
        while True:
            before = levels
            for group in groups:
                levels = self.move(levels, group, max_drop)
            if np.array_equal(levels, before):
                return levels

    def move(self, levels: Ints, group: tuple[int, ...], max_drop: float) -> Ints:
        """Give the exits in ``group`` the best of their candidate levels.

        Best is the cheapest, then the one with most (weighted) right answers, then the first in lexicographic order.
        The present levels are among the candidates, so every change is a step down in that order, and the search ends.
        """
        grids = [self.candidates(k, levels[k], len(group)) for k in group]
        outcomes = _Outcomes(self, levels, group, grids)
        cost, right = outcomes.cost(), np.zeros([len(grid) for grid in grids])
        for samples in self.strata:
            in_stratum = outcomes.sum_of(self.right, samples)
            right += in_stratum
            if self.metric.of_exits is None:
                # The weights were rounded by at most half a unit each.
                allowed = max_drop / self.metric.unit * self.weights[samples].sum() + len(samples)
                cost[in_stratum < self.right[-1, samples].sum() - allowed] = np.inf

        def moved(index: Any) -> Ints:
            result = levels.copy()
            result[list(group)] = [grid[i] for grid, i in zip(grids, np.unravel_index(index, cost.shape), strict=True)]
            return result

        if self.metric.of_exits is None:
            return moved(np.where(cost == cost.min(), right, -1.0).argmax())
        least = self.value(np.zeros_like(levels)) - max_drop - 1e-12
        best_first = np.lexsort((-right.ravel(), cost.ravel()))
        return next(
            result for result in map(moved, best_first) if np.array_equal(result, levels) or self.value(result) >= least
        )

    def candidates(self, k: int, level: int, group_size: int) -> Ints:
        """Levels to try at exit ``k``, ascending: all, or if they are too many an even grid that grows ever denser
        towards ``level``."""
        top = self.num_levels[k]
        if self.metric.of_exits is None:
            alone = min(top + 1, MAX_CELLS // len(self.strata))
            count = int(MAX_COMBINATIONS ** (1 / group_size)) if group_size > 1 else alone
        else:
            count = int(MAX_EVALUATIONS ** (1 / group_size))
        if top < count:
            return np.arange(top + 1)
        steps = np.geomspace(1, top, count // 4)
        grid = np.concatenate([np.linspace(0, top, count // 2), level - steps, [level], level + steps])
        return np.unique(np.rint(grid).astype(np.int64).clip(0, top))

    def operating_point(self, levels: Ints) -> OperatingPoint:
        leaving = self.leaving_exit(levels)
        thresholds = [_threshold(self.scores[leaving == k, k], self.scores[leaving > k, k]) for k in range(len(levels))]
        leaving = simulate(thresholds, self.scores)
        cost = self.costs.cumulative(np.isfinite(thresholds))[leaving]
        accuracy = self.correct[leaving, self.samples].mean()
        return OperatingPoint(tuple(thresholds), float(accuracy), float(cost.mean()))


class _Outcomes:
    """Sums over samples for every combination of levels of a group of exits, while the other exits stay.

    With the whole group closed, each sample has one outcome. Exit ``k`` of the group changes it for those that reach
    ``k``, stay at the earlier exits of the group and leave here. They are binned by the first grid position at which
    they would leave, in one dimension per exit; cumulative sums then answer for all positions at once.

    All results have one axis per exit of the group, as long as its grid.
    """

    def __init__(self, problem: _Problem, levels: Ints, group: tuple[int, ...], grids: list[Ints]) -> None:
        others = levels.copy()
        others[list(group)] = 0
        self.problem, self.group, self.grids = problem, group, grids
        self.leaving, self.path_cost = problem.leaving_exit(others), problem.path_cost(others)
        # The rank behind all levels, of a sample that never leaves, falls behind the grid: into the last bin.
        self.bins = [
            np.searchsorted(grid, np.arange(problem.num_levels[k] + 2))[problem.ranks[k]]
            for k, grid in zip(group, grids, strict=True)
        ]

    def sum_of(self, values: Floats, samples: Ints) -> Floats:
        """The sum over ``samples`` of ``values``, ``(E, n)``, each at the exit where the sample leaves."""
        total = np.full([len(grid) for grid in self.grids], values[self.leaving[samples], samples].sum())
        for axis, k in enumerate(self.group):
            reach = samples[self.leaving[samples] > k]
            changes = self._arriving(axis, reach, values[k, reach] - values[self.leaving[reach], reach])
            total += self._on_grid(axis, changes.cumsum(-1))
        return total

    def cost(self) -> Floats:
        """The cost of all samples, the heads of the group's open exits included."""
        problem = self.problem
        total = self.sum_of(np.broadcast_to(self.path_cost[:, None], problem.right.shape), problem.samples)
        for axis, k in enumerate(self.group):
            arriving = self._arriving(axis, np.flatnonzero(self.leaving > k), None).sum(-1, keepdims=True)
            total += self._on_grid(axis, problem.head[k] * np.append(self.grids[axis] > 0, False) * arriving)
        return total

    def _arriving(self, axis: int, samples: Ints, changes: Floats | None) -> Floats:
        """Sums of ``changes`` (``None``: 1 each) over those of ``samples`` that stay at the earlier exits of the group,
        by the bin of this exit in the last axis."""
        shape = [len(grid) + 1 for grid in self.grids[: axis + 1]]
        cells = np.ravel_multi_index([bins[samples] for bins in self.bins[: axis + 1]], shape)
        sums: Floats = np.bincount(cells, changes, np.prod(shape)).reshape(shape).astype(np.float64)
        for earlier in range(axis):
            sums = sums.sum(earlier, keepdims=True) - sums.cumsum(earlier)
        return sums

    def _on_grid(self, axis: int, sums: Floats) -> Floats:
        """Without the bins of samples that never leave, and with an axis for each later exit of the group."""
        return sums[(slice(-1),) * (axis + 1) + (None,) * (len(self.group) - axis - 1)]


def _threshold(leaving: NDArray[np.float32], kept: NDArray[np.float32]) -> float:
    """A float32 value half-way between the scores that leave and those that stay; ``-inf`` when none leaves."""
    last, following = float(leaving.max(initial=-np.inf)), float(kept.min(initial=np.inf))
    middle = float(np.float32((last + following) / 2))
    return middle if last <= middle < following < np.inf else last
