"""Thresholds of all early exits at once: the least mean cost that keeps a promised accuracy.

Minimise the mean cost over samples, subject to at most ``max_drop`` less accuracy than the final exit has, over one
threshold per early exit. Every distinct score of an exit is a candidate, and so is closing it. The search improves a
few exits at a time while the others stay: it evaluates every combination of candidates of one, two or three exits
exactly, from cumulative sums over a joint histogram of their scores, and takes the best, until no such move helps.
It is exact for one early exit, and for two or three with few distinct scores; otherwise it ends in a local optimum.

Here scores are oriented so that a sample leaves when its score is ``<=`` the threshold, as with entropy; negate
confidence and margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cet.calibration.cost import ExitCosts

MAX_BLOCK = 3
"""How many exits move together at most."""

MAX_COMBINATIONS = 2**16
"""How many combinations of candidates one move of several exits looks at."""

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
    leaves = (np.asarray(scores, dtype=np.float32) <= limits) & (limits > -np.inf)
    exit_index: Ints = np.column_stack([leaves, np.ones(len(leaves), dtype=bool)]).argmax(axis=1)
    return exit_index


def search_thresholds(scores: ArrayLike, correct: ArrayLike, costs: ExitCosts, max_drop: float) -> OperatingPoint:
    """The cheapest thresholds found that lose at most ``max_drop`` of the final exit's accuracy.

    Thresholds lie half-way between the scores of the samples that leave and of those that stay, so that rounding at
    run time moves no sample. Closing every exit is always allowed, so there is always an answer.

    Args:
        scores: ``(n, E - 1)`` of each sample at each early exit, low where it may leave; a NaN never leaves.
        correct: ``(n, E)`` bool, whether the prediction of each exit is right.
        costs: cost of stages and heads.
        max_drop: of accuracy, in [0, 1].

    Raises:
        ValueError: for no samples, shapes that disagree, or ``max_drop`` out of range.
    """
    return frontier(scores, correct, costs, [max_drop])[0]


def frontier(scores: ArrayLike, correct: ArrayLike, costs: ExitCosts, drops: Sequence[float]) -> list[OperatingPoint]:
    """One operating point per entry of ``drops``: what each loss of accuracy buys.

    A larger drop never costs more than a smaller one. Arguments and errors are those of :func:`search_thresholds`.
    """
    for drop in drops:
        if not 0 <= drop <= 1:
            raise ValueError(f"max_drop is {drop}; give a loss of accuracy in [0, 1]")
    problem = _Problem(scores, correct, costs)
    closed = np.zeros_like(problem.num_levels)
    found: dict[float, Ints] = {}
    previous = closed
    for drop in sorted(set(drops)):
        starts = [closed, previous] if previous.any() else [closed]
        previous = min((problem.improve(start, drop) for start in starts), key=problem.mean_cost)
        found[drop] = previous
    return [problem.operating_point(found[drop]) for drop in drops]


class _Problem:
    """The samples, with scores as ranks.

    The state of the search is a *level* per early exit: 0 closes it, ``l`` lets the samples with one of the ``l``
    lowest distinct scores leave.
    """

    def __init__(self, scores: ArrayLike, correct: ArrayLike, costs: ExitCosts) -> None:
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
        self.scores = np.nan_to_num(score_array, nan=np.inf, posinf=np.inf)
        self.correct = np.ascontiguousarray(correct_array.T, dtype=np.float64)
        self.samples = np.arange(num_samples)
        self.ranks = np.empty((num_exits - 1, num_samples), dtype=np.int64)
        self.num_levels = np.empty(num_exits - 1, dtype=np.int64)
        for k, column in enumerate(self.scores.T):
            values, ranks = np.unique(column, return_inverse=True)
            self.ranks[k] = ranks + 1
            self.num_levels[k] = np.count_nonzero(values < np.inf)
        # Whole numbers, so that sums are exact and equal costs compare equal.
        unit = costs.cumulative(np.ones(num_exits - 1, dtype=bool))[-1] / 2**30
        self.stage, self.head = np.rint(np.divide(costs.stage, unit)), np.rint(np.divide(costs.head, unit))

    def leaving_exit(self, levels: Ints) -> Ints:
        leaves = self.ranks <= levels[:, None]
        exit_index: Ints = np.vstack([leaves, np.ones_like(self.samples, dtype=bool)]).argmax(axis=0)
        return exit_index

    def path_cost(self, levels: Ints) -> Floats:
        """The cost of leaving at each exit."""
        cost: Floats = np.cumsum(self.stage) + np.cumsum(np.append(self.head * (levels > 0), 0.0))
        return cost

    def mean_cost(self, levels: Ints) -> float:
        return float(self.path_cost(levels)[self.leaving_exit(levels)].mean())

    def improve(self, levels: Ints, max_drop: float) -> Ints:
        """Move one to three exits at a time until no move helps."""
        drops = np.arange(len(self.samples) + 1) / len(self.samples)
        min_correct = self.correct[-1].sum() - np.flatnonzero(drops <= max_drop)[-1]
        exits = range(len(levels))
        blocks = [block for size in range(1, MAX_BLOCK + 1) for block in combinations(exits, size)]
        while True:
            before = levels
            for block in blocks:
                levels = self.move(levels, block, min_correct)
            if np.array_equal(levels, before):
                return levels

    def move(self, levels: Ints, block: tuple[int, ...], min_correct: float) -> Ints:
        """Give the exits in ``block`` the best of their candidate levels.

        Best is the cheapest, then the most accurate, then the first in lexicographic order. The present levels are
        among the candidates, so every change is a step down in that order, and the search ends.
        """
        grids = [self.candidates(k, levels[k], len(block)) for k in block]
        correct, cost = self.totals(levels, block, grids)
        cost = np.where(correct >= min_correct, cost, np.inf)
        best = np.unravel_index(np.where(cost == cost.min(), correct, -1.0).argmax(), cost.shape)
        moved = levels.copy()
        moved[list(block)] = [grid[i] for grid, i in zip(grids, best, strict=True)]
        return moved

    def candidates(self, k: int, level: int, block_size: int) -> Ints:
        """Levels to try at exit ``k``, ascending: all, or if they are too many an even grid that grows ever denser
        towards ``level``."""
        top = self.num_levels[k]
        count = int(MAX_COMBINATIONS ** (1 / block_size))
        if block_size == 1 or top < count:
            return np.arange(top + 1)
        steps = np.geomspace(1, top, count // 4)
        grid = np.concatenate([np.linspace(0, top, count // 2), level - steps, [level], level + steps])
        return np.unique(np.rint(grid).astype(np.int64).clip(0, top))

    def totals(self, levels: Ints, block: tuple[int, ...], grids: list[Ints]) -> tuple[Floats, Floats]:
        """Correct answers and cost, summed over samples, for every combination of levels of the exits in ``block``.

        With the whole block closed, each sample has one outcome. Exit ``k`` of the block changes it for those that
        reach ``k``, stay at the earlier exits of the block and leave here. They are binned by the first grid position
        at which they would leave, in one dimension per exit; cumulative sums then answer for all positions at once.

        Returns:
            Two arrays with one axis per exit of the block, as long as its grid.
        """
        others = levels.copy()
        others[list(block)] = 0
        leaving, path_cost = self.leaving_exit(others), self.path_cost(others)
        correct_else, cost_else = self.correct[leaving, self.samples], path_cost[leaving]
        # The rank behind all levels, of a sample that never leaves, falls behind the grid: into the last bin.
        bins = [
            np.searchsorted(grid, np.arange(self.num_levels[k] + 2))[self.ranks[k]]
            for k, grid in zip(block, grids, strict=True)
        ]
        correct = np.full([len(grid) for grid in grids], correct_else.sum())
        cost = np.full(correct.shape, cost_else.sum())
        for axis, k in enumerate(block):
            reach = np.flatnonzero(leaving > k)
            shape = [len(grid) + 1 for grid in grids[: axis + 1]]
            cells = np.ravel_multi_index([b[reach] for b in bins[: axis + 1]], shape)
            changes = (None, self.correct[k, reach] - correct_else[reach], path_cost[k] - cost_else[reach])
            sums = np.stack([np.bincount(cells, change, np.prod(shape)) for change in changes]).reshape(3, *shape)
            for earlier in range(1, axis + 1):
                sums = sums.sum(earlier, keepdims=True) - sums.cumsum(earlier)
            head_cost = self.head[k] * np.append(grids[axis] > 0, False) * sums[0].sum(-1, keepdims=True)
            more_correct, more_cost = sums[1:].cumsum(-1)
            without_last_bins = (slice(-1),) * (axis + 1) + (None,) * (len(block) - axis - 1)
            correct += more_correct[without_last_bins]
            cost += (more_cost + head_cost)[without_last_bins]
        return correct, cost

    def operating_point(self, levels: Ints) -> OperatingPoint:
        leaving = self.leaving_exit(levels)
        thresholds = [_threshold(self.scores[leaving == k, k], self.scores[leaving > k, k]) for k in range(len(levels))]
        leaving = simulate(thresholds, self.scores)
        cost = self.costs.cumulative(np.isfinite(thresholds))[leaving]
        accuracy = self.correct[leaving, self.samples].mean()
        return OperatingPoint(tuple(thresholds), float(accuracy), float(cost.mean()))


def _threshold(leaving: NDArray[np.float32], staying: NDArray[np.float32]) -> float:
    """A float32 value half-way between the scores that leave and those that stay; ``-inf`` when none leaves."""
    last, following = float(leaving.max(initial=-np.inf)), float(staying.min(initial=np.inf))
    middle = float(np.float32((last + following) / 2))
    return middle if last <= middle < following < np.inf else last
