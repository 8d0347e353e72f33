"""The threshold search against brute force, and its answers replayed row by row."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cet
from cet.calibration import thresholds
from cet.calibration.cost import ExitCosts
from cet.calibration.thresholds import OperatingPoint, frontier, search_thresholds, simulate
from cet.ops.definitions import ScoreName
from thinned import slow

INF = float("inf")
NAN = float("nan")


class Problem:
    """Random scores, outcomes and costs; every third problem has ties, every fourth NaN scores."""

    def __init__(self, seed: int, num_exits: int, num_samples: int) -> None:
        rng = np.random.default_rng(seed)
        ease = rng.normal(size=(num_samples, 1))
        skill = ease + np.linspace(-0.5, 1, num_exits) + 0.7 * rng.normal(size=(num_samples, num_exits))
        self.correct = skill + 0.5 * rng.normal(size=skill.shape) > 0
        self.scores = (-skill[:, :-1]).astype(np.float32)
        if seed % 3 == 0:
            self.scores = np.round(2 * self.scores)
        if seed % 4 == 0:
            self.scores[rng.random(self.scores.shape) < 0.1] = NAN
        self.costs = ExitCosts(tuple(0.2 + rng.random(num_exits)), tuple(0.1 * rng.random(num_exits - 1)))
        self.max_drop = (0.0, 0.05, 0.15)[seed // 3 % 3]

    def search(self) -> OperatingPoint:
        return search_thresholds(self.scores, self.correct, self.costs, self.max_drop)

    def outcome(self, thresholds: tuple[float, ...]) -> tuple[float, float]:
        """Accuracy and mean cost, sample by sample."""
        right, paid = 0, 0.0
        for scores, correct in zip(self.scores, self.correct, strict=True):
            for k, stage in enumerate(self.costs.stage):
                paid += stage
                if k < len(thresholds) and thresholds[k] > -INF:
                    paid += self.costs.head[k]
                    if scores[k] <= thresholds[k]:
                        break
            right += bool(correct[k])
        return right / len(self.scores), paid / len(self.scores)

    def is_allowed(self, accuracy: float) -> bool:
        lost = round((self.correct[:, -1].mean() - accuracy) * len(self.correct))
        return lost / len(self.correct) <= self.max_drop

    def brute_force(self) -> float:
        """The least cost over every combination of candidate thresholds."""
        candidates = [[-INF, *np.unique(column[np.isfinite(column)])] for column in self.scores.T]
        thresholds = np.array(list(product(*candidates)), dtype=np.float32)
        leaves = self.scores <= thresholds[:, None]
        exits = np.where(leaves.any(axis=2), leaves.argmax(axis=2), len(self.costs.head))
        paths = np.array([self.costs.cumulative(row) for row in product((False, True), repeat=len(self.costs.head))])
        is_open = thresholds > -INF
        path = paths[is_open @ (2 ** np.arange(is_open.shape[1])[::-1])]
        cost = np.take_along_axis(path, exits, axis=1).mean(axis=1)
        correct = self.correct[np.arange(len(self.correct)), exits].sum(axis=1)
        allowed = (self.correct[:, -1].sum() - correct) / len(self.correct) <= self.max_drop
        return float(cost[allowed].min())


def excess_costs(num_exits: int, num_samples: int, seeds: range) -> NDArray[np.float64]:
    """By how much the search costs more than the optimum, relative to it; every answer is replayed."""
    excess = []
    for seed in seeds:
        problem = Problem(seed, num_exits, num_samples)
        point = problem.search()
        accuracy, cost = problem.outcome(point.thresholds)
        assert problem.is_allowed(accuracy)
        assert point.accuracy == pytest.approx(accuracy)
        assert point.cost == pytest.approx(cost)
        excess.append(cost / problem.brute_force() - 1)
    return np.array(excess)


@pytest.mark.parametrize(("num_exits", "num_samples"), [(2, 60), (3, 40), (4, 20)])
def test_few_exits_are_optimal(num_exits: int, num_samples: int) -> None:
    # Of one, two or three early exits all combinations fit into one move.
    assert excess_costs(num_exits, num_samples, range(24)) == pytest.approx(0.0, abs=1e-6)


def test_one_exit_is_optimal_among_many_candidates() -> None:
    problem = Problem(seed=1, num_exits=2, num_samples=3000)
    assert problem.search().cost == pytest.approx(problem.brute_force(), rel=1e-6)


@pytest.mark.parametrize(("num_exits", "num_samples"), [(5, 12), slow(6, 7)])
def test_more_exits_are_nearly_always_optimal(num_exits: int, num_samples: int) -> None:
    excess = excess_costs(num_exits, num_samples, range(40))
    assert (excess < 0.01).mean() >= 0.95
    assert excess.max() < 0.1


def test_grids_of_candidates_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "MAX_COMBINATIONS", 900)  # a move of three exits sees 9 of 31 candidates each
    excess = excess_costs(4, 30, range(24))
    assert (excess < 0.01).mean() >= 0.95
    assert excess.max() < 0.05


def test_many_samples_find_the_planted_optimum() -> None:
    # An exit is right exactly where its score is below its limit, and no error is allowed.
    rng = np.random.default_rng(0)
    limits = np.array([0.1, 0.4, 0.25, 0.7])
    scores = rng.random((20_000, 4)).astype(np.float32)
    correct = np.column_stack([scores <= limits, np.ones(len(scores), dtype=bool)])
    point = search_thresholds(scores, correct, ExitCosts((1, 1, 1, 1, 1), (0.01,) * 4), max_drop=0.0)
    assert point.thresholds == pytest.approx(limits, abs=1e-3)
    assert point.accuracy == 1.0
    assert np.array_equal(simulate(point.thresholds, scores), correct.argmax(axis=1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 5),
    st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, NAN, INF, -INF]), min_size=4, max_size=4), min_size=1),
    st.integers(0, 2**20),
    st.sampled_from([0.0, 0.01, 0.1, 1.0]),
)
def test_every_answer_keeps_its_promise(num_exits: int, rows: list[list[float]], seed: int, max_drop: float) -> None:
    rng = np.random.default_rng(seed)
    problem = Problem(0, num_exits, len(rows))
    problem.scores = np.array(rows, dtype=np.float32)[:, : num_exits - 1]
    problem.correct = rng.random((len(rows), num_exits)) < 0.6
    problem.max_drop = max_drop
    point = problem.search()
    accuracy, cost = problem.outcome(point.thresholds)
    assert problem.is_allowed(accuracy)
    assert (point.accuracy, point.cost) == (pytest.approx(accuracy), pytest.approx(cost))
    assert cost <= problem.costs.full * (1 + 1e-8)
    assert point.thresholds == tuple(np.float32(t) for t in point.thresholds)


def test_simulate() -> None:
    scores = [[0.1, 0.9], [0.5, 0.2], [0.5, 0.7], [NAN, 0.2], [NAN, NAN], [0.2, 0.0], [-INF, INF]]
    assert simulate([0.2, 0.2], scores).tolist() == [0, 1, 2, 1, 2, 0, 0]
    assert simulate([-INF, 0.7], scores).tolist() == [2, 1, 1, 1, 2, 1, 2]
    assert simulate([-INF, -INF], scores).tolist() == [2] * 7
    assert simulate([0.5, -INF], np.empty((0, 2))).tolist() == []


def test_simulate_compares_in_float32() -> None:
    assert simulate([0.1], np.array([[0.1]], dtype=np.float32)).tolist() == [0]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["entropy", "confidence", "margin"]),
    st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.5, -30.0, NAN, INF, -INF]), min_size=3, max_size=3),
        min_size=1,
        max_size=9,
    ),
    st.one_of(st.floats(-0.1, 1.2), st.sampled_from([INF, 0.0, 0.1]), st.integers(0, 8)),
    st.sampled_from([1.0, 0.37, 3.3]),
)
def test_simulate_and_the_gate_agree(
    score: ScoreName, rows: list[list[float]], threshold: float | int, temperature: float
) -> None:
    logits = torch.tensor(rows)
    scores = cet.ops.exit_score(logits, score, temperature)
    if isinstance(threshold, int):  # on the score of one of the rows
        threshold = scores[threshold % len(rows)].item()
        threshold = 0.0 if np.isnan(threshold) else threshold
    same, leaves = cet.ops.gate(logits, score=score, threshold=threshold, temperature=temperature)
    assert torch.equal(same.nan_to_num(7.0), scores.nan_to_num(7.0))
    sign = 1 if score == "entropy" else -1
    expected = simulate([sign * threshold], sign * scores.numpy()[:, None]) == 0
    if sign * threshold == -INF:  # a closed exit; no score is infinite
        assert not expected.any()
    else:
        assert leaves.tolist() == expected.tolist()


def test_equal_scores_leave_together() -> None:
    # One of the two samples of score 0.5 is wrong at the exit: neither may leave.
    scores = [[0.1], [0.5], [0.5], [0.9]]
    correct = [[True, True], [True, True], [False, True], [False, True]]
    point = search_thresholds(scores, correct, ExitCosts((1, 1), (0,)), max_drop=0.0)
    assert simulate(point.thresholds, scores).tolist() == [0, 1, 1, 1]
    assert point.cost == pytest.approx(1.75)


def test_threshold_lies_half_way() -> None:
    scores = [[0.25], [0.5], [1.0]]
    correct = [[True, True], [True, True], [False, True]]
    assert search_thresholds(scores, correct, ExitCosts((1, 1), (0,)), 0.0).thresholds == (0.75,)


def test_neighbouring_float32_scores_are_told_apart() -> None:
    low = np.float32(0.3)
    for _ in range(4):
        high = np.nextafter(low, np.float32(1))
        scores = np.array([[low], [high]])
        point = search_thresholds(scores, [[True, True], [False, True]], ExitCosts((1, 1), (0,)), 0.0)
        assert simulate(point.thresholds, scores).tolist() == [0, 1]
        low = high


def test_threshold_ignores_samples_that_left_before() -> None:
    # The second exit never sees the score 0.4: half-way is between 0.2 and 0.8.
    scores = [[0.0, 0.4], [1.0, 0.2], [1.0, 0.8]]
    correct = [[True, True, True], [False, True, True], [False, False, True]]
    point = search_thresholds(scores, correct, ExitCosts((1, 1, 1), (0, 0)), 0.0)
    assert point.thresholds == pytest.approx((0.5, 0.5))


def test_exit_that_costs_more_than_it_saves_is_closed() -> None:
    scores, correct = [[0.1], [0.9], [0.9]], [[True, True], [False, True], [False, True]]
    assert search_thresholds(scores, correct, ExitCosts((1, 1), (0.3,)), 0.0).thresholds[0] > -INF
    closed = search_thresholds(scores, correct, ExitCosts((1, 1), (0.4,)), 0.0)
    assert closed == OperatingPoint((-INF,), 1.0, 2.0)


def test_exit_at_which_nobody_leaves_is_closed() -> None:
    correct = [[False, False, True]] * 3
    scores = [[0.1, 0.2]] * 3
    assert search_thresholds(scores, correct, ExitCosts((1, 1, 1), (0, 0)), 0.0).thresholds == (-INF, -INF)


def test_nan_scores_close_the_exit() -> None:
    assert search_thresholds([[NAN]] * 3, [[True, True]] * 3, ExitCosts((1, 1), (0,)), 0.5).thresholds == (-INF,)


def test_drop_is_met_exactly() -> None:
    # 29 of 100 may be lost, though 0.29 * 100 is less than 29 in floating point.
    scores = np.arange(100)[:, None] / 100
    correct = np.column_stack([np.zeros(100, dtype=bool), np.ones(100, dtype=bool)])
    point = search_thresholds(scores, correct, ExitCosts((1, 1), (0,)), 0.29)
    assert simulate(point.thresholds, scores).tolist() == [0] * 29 + [1] * 71


def test_frontier_falls_with_the_drop() -> None:
    problem = Problem(seed=1, num_exits=5, num_samples=500)
    drops = [0.0, 0.002, 0.01, 0.03, 0.1, 0.5]
    points = frontier(problem.scores, problem.correct, problem.costs, drops)
    final = problem.correct[:, -1].mean()
    assert all(final - point.accuracy <= drop + 1e-12 for point, drop in zip(points, drops, strict=True))
    costs = [point.cost for point in points]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    assert points[0] == search_thresholds(problem.scores, problem.correct, problem.costs, 0.0)
    assert frontier(problem.scores, problem.correct, problem.costs, drops[::-1]) == points[::-1]


@pytest.mark.parametrize(
    ("scores", "correct", "max_drop", "message"),
    [
        ([[0.1, 0.2]], [[True, True]], 0.0, r"scores has shape \(1, 2\); .* give \(1, 1\)"),
        ([0.1], [[True, True]], 0.0, r"scores has shape \(1,\)"),
        ([[0.1]], [[True]], 0.0, r"correct has shape \(1, 1\); .* give \(1, 2\)"),
        (np.empty((0, 1)), np.empty((0, 2)), 0.0, "no samples"),
        ([[0.1]], [[True, True]], -0.1, r"max_drop is -0.1; give a loss of accuracy in \[0, 1\]"),
        ([[0.1]], [[True, True]], NAN, "max_drop is nan"),
    ],
)
def test_bad_arguments_are_refused(scores: object, correct: object, max_drop: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_thresholds(scores, correct, ExitCosts((1, 1), (0,)), max_drop)  # type: ignore[arg-type]
