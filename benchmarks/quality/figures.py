"""Figures of every test person, from the logits that the trainings left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.conditions import INPUTS
from benchmarks.quality.runs import Job, Result
from cet.calibration.thresholds import simulate
from cet.ops import exit_score

CURVE_POINTS = 33
BINS = 15
DIGITS = 6


@dataclass(frozen=True)
class Figures:
    """Of one training on one person's windows under one input; means over the exits unless told otherwise.

    Attributes:
        accuracy: of all exits, in percent like all that follow.
        first: accuracy of the first exit.
        final: accuracy of the last exit.
        macro_f1: the mean over the classes that occur.
        area: accuracy under the curve of accuracy against compute, one entropy threshold for all exits; the mean over
            compute from the first exit's cost to that of all.
        policy: accuracy of the policy calibrated on clean samples of others.
        cost: its mean FLOPs, of those of the largest net without exits.
        ece: calibration error of the largest probability, in 15 bins (Guo et al. 2017, arXiv 1706.04599).
        scaled_ece: the same at the policy's temperatures.
        flips: windows whose label differs from that on clean input.
    """

    labels: str
    method: str
    split: int
    seed: int
    person: int
    input: str
    severity: float
    accuracy: float
    first: float
    final: float
    macro_f1: float
    area: float
    policy: float
    cost: float
    ece: float
    scaled_ece: float
    flips: float


VALUES = [field.name for field in fields(Figures)][7:]


def figures_of(job: Job, result: Result, full: float) -> Iterator[Figures]:
    """One per person and input. ``full`` is the cost of the largest net without exits."""
    facts = result.facts
    # Without an exit that counts there is nothing but the last.
    is_static = job.method == "static"
    exits = slice(-1, None) if is_static else slice(None)
    temperatures = facts["temperatures"] or [1.0] * len(result.calibration)
    thresholds = [-np.inf if t is None else t for t in facts["thresholds"]]
    closed = [-np.inf] * len(thresholds)
    curve = np.quantile(_scores(result.calibration, temperatures), np.linspace(0, 1, CURVE_POINTS))
    clean = result.logits[0].argmax(-1)
    policy_cost, open_cost = np.array(facts["policy_cost"]) / full, np.array(facts["open_cost"]) / full
    for (kind, severity), logits in zip(INPUTS, result.logits, strict=True):
        scores = _scores(logits, temperatures)
        predicted = logits.argmax(-1)
        right = predicted == result.y
        leaving = simulate(closed if is_static else thresholds, scores)
        at_curve = [simulate([threshold] * scores.shape[1], scores) for threshold in curve]
        errors = [
            _confidence_gap(logits, right, of_exits)
            for of_exits in (np.ones(len(temperatures)), np.array(temperatures))
        ]
        for person in np.unique(result.person):
            rows = np.flatnonzero(result.person == person)
            of_exits = right[:, rows].mean(axis=1)
            points = [(open_cost[at[rows]].mean(), right[at[rows], rows].mean()) for at in at_curve]
            costs, accuracies = np.array(
                sorted([*points, (open_cost[0], of_exits[0]), (open_cost[-1], of_exits[-1])])
            ).T
            values = (
                of_exits[exits].mean(),
                of_exits[exits][0],
                of_exits[-1],
                np.mean([_macro_f1(labels[rows], result.y[rows]) for labels in predicted[exits]]),
                of_exits[-1] if is_static else np.trapezoid(accuracies, costs) / (costs[-1] - costs[0]),
                right[leaving[rows], rows].mean(),
                facts["full_cost"] / full if is_static else policy_cost[leaving[rows]].mean(),
                *(_expected(gap[exits][:, rows], sure[exits][:, rows]) for gap, sure in errors),
                (predicted != clean)[exits][:, rows].mean(),
            )
            percent = (round(100 * float(value), DIGITS - 2) for value in values)
            yield Figures(job.labels, job.method, job.split, job.seed, int(person), kind, severity, *percent)


def _scores(logits: NDArray[np.float16], temperatures: Sequence[float]) -> NDArray[np.float32]:
    """Entropies of the early exits, ``(n, E - 1)``."""
    early = zip(torch.from_numpy(logits).float()[:-1], temperatures, strict=False)
    scores: NDArray[np.float32] = torch.stack([exit_score(x, "entropy", t) for x, t in early], dim=1).numpy()
    return scores


def _confidence_gap(
    logits: NDArray[np.float16], right: NDArray[np.bool_], temperatures: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By how much each answer is surer than right, and how sure it is, ``(E, n)``."""
    scaled = torch.from_numpy(logits).double() / torch.from_numpy(temperatures)[:, None, None]
    sure: NDArray[np.float64] = scaled.softmax(-1).amax(-1).numpy()
    return sure - right, sure


def _expected(gap: NDArray[np.float64], sure: NDArray[np.float64]) -> float:
    """The mean over exits of the calibration error."""
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    sums = [np.abs(np.bincount(b, g, BINS)).sum() / len(g) for b, g in zip(bins, gap, strict=True)]
    return float(np.mean(sums))


def _macro_f1(predicted: NDArray[np.int64], y: NDArray[np.int64]) -> float:
    """Over the classes that occur among the labels."""
    return float(
        np.mean(
            [2 * np.sum((predicted == k) & (y == k)) / (np.sum(predicted == k) + np.sum(y == k)) for k in np.unique(y)]
        )
    )
