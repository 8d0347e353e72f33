"""Bounded metrics against brute force over every combination of thresholds, on small problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cet.calibration import thresholds
from cet.calibration.cost import ExitCosts
from cet.calibration.metrics import check_metric, metric_on
from cet.calibration.thresholds import search_thresholds, simulate

CLASSES = 3
INF = float("inf")


def macro_f1(labels: Tensor, predictions: Tensor) -> float:
    """Of the classes that occur or are predicted."""
    scores = []
    for label in range(CLASSES):
        hits = ((labels == label) & (predictions == label)).sum().item()
        if positives := ((labels == label).sum() + (predictions == label).sum()).item():
            scores.append(2 * hits / positives)
    return float(np.mean(scores))


class Problem:
    """Random scores, predictions, labels with a rare class, and costs."""

    def __init__(self, seed: int, num_exits: int, num_samples: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.choice(CLASSES, size=num_samples, p=[0.6, 0.3, 0.1])
        ease = rng.normal(size=(num_samples, 1))
        skill = ease + np.linspace(-0.5, 1, num_exits) + 0.7 * rng.normal(size=(num_samples, num_exits))
        correct = skill > 0
        self.predictions = np.where(
            correct, self.labels[:, None], (self.labels[:, None] + rng.integers(1, CLASSES, correct.shape)) % CLASSES
        )
        self.scores = np.round(-2 * skill[:, :-1], 1 if seed % 2 else 0).astype(np.float32)
        self.costs = ExitCosts(tuple(0.2 + rng.random(num_exits)), tuple(0.1 * rng.random(num_exits - 1)))

    def search(self, metric: Any, class_weights: Sequence[float] | None, max_drop: float) -> tuple[float, ...]:
        labels, predictions = torch.from_numpy(self.labels), torch.from_numpy(self.predictions)
        bounded = metric_on(metric, class_weights, labels, predictions)
        correct = self.predictions == self.labels[:, None]
        return search_thresholds(self.scores, correct, self.costs, max_drop, bounded).thresholds

    def drop(self, metric: Any, class_weights: Sequence[float] | None, exit_index: NDArray[np.int64]) -> float:
        """By the metric's definition, class by class."""
        chosen = self.predictions[np.arange(len(self.labels)), exit_index]
        final = self.predictions[:, -1]
        if callable(metric):
            return metric(torch.from_numpy(self.labels), torch.from_numpy(final)) - metric(
                torch.from_numpy(self.labels), torch.from_numpy(chosen)
            )
        present = np.unique(self.labels)
        counts = [(self.labels == c).sum() for c in present]
        lost = [
            ((final == self.labels) & (self.labels == c)).sum() - ((chosen == self.labels) & (self.labels == c)).sum()
            for c in present
        ]
        weights = np.ones(CLASSES) if class_weights is None else np.array(class_weights)
        if metric == "per_class":
            return max(loss / count for loss, count in zip(lost, counts, strict=True))
        if metric == "balanced":
            recalls = [loss / count for loss, count in zip(lost, counts, strict=True)]
            return float(np.average(recalls, weights=weights[present]))
        return float(np.dot(weights[present], lost) / np.dot(weights[present], counts))

    def cost(self, limits: Sequence[float]) -> float:
        exit_index = simulate(limits, self.scores)
        return float(self.costs.cumulative([t > -INF for t in limits])[exit_index].mean())

    def brute_force(self, is_allowed: Callable[[NDArray[np.int64]], bool]) -> float:
        """The least cost over every combination of candidate thresholds."""
        candidates = [[-INF, *np.unique(column)] for column in self.scores.T]
        return min(self.cost(limits) for limits in product(*candidates) if is_allowed(simulate(limits, self.scores)))


METRICS: list[tuple[Any, Sequence[float] | None]] = [
    ("accuracy", None),
    ("accuracy", (1.0, 0.0, 7.5)),
    ("balanced", None),
    ("balanced", (0.2, 0.3, 3.0)),
    ("per_class", None),
    (macro_f1, None),
]


@pytest.mark.parametrize(("metric", "class_weights"), METRICS)
@pytest.mark.parametrize(("num_exits", "num_samples"), [(2, 40), (3, 12)])
def test_search_is_optimal_on_small_problems(
    metric: Any, class_weights: Sequence[float] | None, num_exits: int, num_samples: int
) -> None:
    some_exit_open = 0
    for seed in range(12):
        problem = Problem(seed, num_exits, num_samples)
        max_drop = (0.0, 0.04, 0.12)[seed % 3]
        limits = problem.search(metric, class_weights, max_drop)
        some_exit_open += limits != (-INF,) * (num_exits - 1)

        def is_allowed(exit_index: NDArray[np.int64], problem: Problem = problem, max_drop: float = max_drop) -> bool:
            return problem.drop(metric, class_weights, exit_index) <= max_drop + 1e-12

        assert is_allowed(simulate(limits, problem.scores))
        assert problem.cost(limits) == pytest.approx(problem.brute_force(is_allowed), rel=1e-6)
    assert some_exit_open >= 6


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METRICS), st.integers(0, 2**20), st.integers(2, 5), st.sampled_from([0.0, 0.01, 0.1]))
def test_every_answer_keeps_its_promise(
    metric: tuple[Any, Sequence[float] | None], seed: int, num_exits: int, max_drop: float
) -> None:
    problem = Problem(seed, num_exits, 60)
    limits = problem.search(*metric, max_drop)
    assert problem.drop(*metric, simulate(limits, problem.scores)) <= max_drop + 1e-12
    assert problem.cost(limits) <= problem.costs.full * (1 + 1e-8)


@pytest.mark.parametrize(("metric", "class_weights"), METRICS)
def test_drop_of_a_metric_is_that_of_its_definition(metric: Any, class_weights: Sequence[float] | None) -> None:
    problem = Problem(5, 4, 200)
    labels, predictions = torch.from_numpy(problem.labels), torch.from_numpy(problem.predictions)
    bounded = metric_on(metric, class_weights, labels, predictions)
    exit_index = simulate((0.0, 0.3, 0.1), problem.scores)
    drop = bounded.drop(problem.predictions == problem.labels[:, None], exit_index)
    assert drop == pytest.approx(problem.drop(metric, class_weights, exit_index))
    assert drop != 0


def test_a_function_is_called_for_a_bounded_number_of_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "MAX_EVALUATIONS", 64)
    calls = 0

    def never_better(labels: Tensor, predictions: Tensor) -> float:
        nonlocal calls
        calls += 1
        return -float(calls > 1)  # all but the final exit itself is too bad

    problem = Problem(1, 3, 400)
    assert problem.search(never_better, None, 0.5) == (-INF, -INF)
    assert 10 < calls <= 1 + 3 * 2 * 64  # grids hold up to twice as many, and there are three groups


def test_a_rare_class_is_kept() -> None:
    """One per cent of the samples may be lost: overall accuracy gives the rare class away, the others do not."""
    labels = torch.tensor([0] * 990 + [1] * 10)
    predictions = torch.stack([torch.zeros(1000, dtype=torch.int64), labels], dim=1)
    scores = np.linspace(0, 1, 1000, dtype=np.float32)[:, None]
    costs = ExitCosts((1.0, 1.0), (0.0,))
    recalls = {}
    for metric in ("accuracy", "balanced", "per_class"):
        bounded = metric_on(metric, None, labels, predictions)  # type: ignore[arg-type]
        point = search_thresholds(scores, (predictions == labels[:, None]).numpy(), costs, 0.01, bounded)
        exit_index = simulate(point.thresholds, scores)
        recalls[metric] = float((exit_index[-10:] == 1).mean())
        assert (exit_index[:990] == 0).all()
    assert recalls == {"accuracy": 0.0, "balanced": 1.0, "per_class": 1.0}


def no_number(labels: Tensor, predictions: Tensor) -> float:
    return float("nan")


@pytest.mark.parametrize(
    ("metric", "class_weights", "error", "message"),
    [
        ("f1", None, ValueError, "metric 'f1' is unknown; choose one of accuracy, balanced, per_class, dis"),
        (["accuracy"], None, ValueError, "is unknown"),
        ("accuracy", (1.0, 2.0), ValueError, r"class_weights is \[1.0, 2.0\]; give 3 finite numbers >= 0"),
        ("balanced", (1.0, -1.0, 1.0), ValueError, "class_weights is"),
        ("balanced", (0.0, 0.0, 0.0), ValueError, "not all 0"),
        ("accuracy", (1.0, INF, 1.0), ValueError, "finite numbers"),
        ("accuracy", 3.0, TypeError, "class_weights is 3.0; give one number per class"),
        ("accuracy", ("a", "b", "c"), TypeError, "give one number per class"),
        ("per_class", (1.0, 1.0, 1.0), ValueError, "leave them out for per_class, which bounds each class"),
        (macro_f1, (1.0, 1.0, 1.0), ValueError, "leave them out for a function"),
    ],
)
def test_bad_metrics_are_refused(metric: Any, class_weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_metric(metric, class_weights, CLASSES)


def test_metrics_that_bound_nothing_are_refused() -> None:
    labels, predictions = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="class_weights are 0 for every class that occurs"):
        metric_on("accuracy", (0.0, 1.0, 1.0), labels, predictions)
    bounded = metric_on(no_number, None, labels, predictions)
    with pytest.raises(ValueError, match="metric gives nan; give a function that returns a finite number"):
        search_thresholds(np.zeros((4, 1)), np.ones((4, 2)), ExitCosts((1, 1), (0,)), 0.1, bounded)
