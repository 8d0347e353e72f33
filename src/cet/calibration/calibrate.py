"""Calibration: an exit policy from held-out samples that keeps a stated accuracy at the least mean cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cet.calibration.cost import ExitCosts, exit_costs
from cet.calibration.threshold_search import search_thresholds, simulate
from cet.data.batches import call, check_batch
from cet.model.early_exit import EarlyExit
from cet.ops import exit_score
from cet.ops.consistent_exit_loss import UNLABELLED
from cet.ops.definitions import SCORE_NAMES, ScoreName
from cet.partition.stages import evaluating
from cet.runtime.policy import ExitPolicy

MAX_TEMPERATURE = 20.0
"""Temperatures are kept within ``[1 / MAX_TEMPERATURE, MAX_TEMPERATURE]``."""


@dataclass(frozen=True)
class ExitReport:
    """One exit on the calibration samples.

    Attributes:
        name: the exit's submodule, or ``"final"``.
        accuracy: of this exit alone on all samples.
        temperature: divides its logits before the softmax.
        threshold: of its score; ``None`` for a closed exit and the final one.
        fraction: of the samples that leave here.
        cost: of a sample that leaves here, the heads of the open exits on the way included.
    """

    name: str
    accuracy: float
    temperature: float
    threshold: float | None
    fraction: float
    cost: float


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibrated policy does on the samples it was calibrated on.

    Attributes:
        num_samples: labelled samples.
        score: the policy's score.
        exits: one :class:`ExitReport` per exit, shallow first.
        accuracy: of the policy.
        final_accuracy: of the final exit on all samples.
        drop: ``final_accuracy - accuracy``.
        max_drop: what ``drop`` was allowed to be.
        interval: two-sided confidence interval of the drop on samples drawn like these.
        confidence: its level.
        mean_cost: per sample under the policy.
        full_cost: per sample for the backbone alone.
        unit: of all costs.
    """

    num_samples: int
    score: ScoreName
    exits: tuple[ExitReport, ...]
    accuracy: float
    final_accuracy: float
    drop: float
    max_drop: float
    interval: tuple[float, float]
    confidence: float
    mean_cost: float
    full_cost: float
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.exits)
        lines = [f"{'exit':<{width}}  accuracy  temperature  threshold  leaving  {self.unit:>10}"]
        for row in self.exits:
            threshold = "-" if row.threshold is None else f"{row.threshold:.4g}"
            lines.append(
                f"{row.name:<{width}}  {row.accuracy:>8.2%}  {row.temperature:>11.3f}  {threshold:>9}  "
                f"{row.fraction:>7.1%}  {row.cost:>10.4g}"
            )
        low, high = self.interval
        return "\n".join(
            [
                *lines,
                f"accuracy {self.accuracy:.2%} against {self.final_accuracy:.2%} of the final exit, a drop of "
                f"{100 * self.drop:.2f} points ({self.confidence:.0%} interval {100 * low:.2f} to {100 * high:.2f}) "
                f"on {self.num_samples} samples",
                f"mean cost {self.mean_cost:.4g} {self.unit}, {self.mean_cost / self.full_cost:.1%} of the backbone",
            ]
        )


@dataclass(frozen=True)
class Calibration:
    """The policy, to be assigned to ``model.policy``, and what it does on the calibration samples."""

    policy: ExitPolicy
    report: CalibrationReport


def calibrate(
    model: EarlyExit,
    loader: Iterable[Any],
    max_accuracy_drop: float = 0.01,
    confidence: float = 0.95,
    *,
    score: ScoreName = "entropy",
    temperature: bool = True,
    costs: ExitCosts | None = None,
) -> Calibration:
    """Choose temperatures and thresholds on held-out samples; ``model`` keeps its policy until you assign the new one.

    The loss of accuracy against the final exit is at most ``max_accuracy_drop`` **on the calibration samples**. What is
    known about others is the report's confidence interval of that loss, and it is optimistic, because the thresholds
    were chosen on the same samples. There is no distribution-free guarantee. The logits of all exits are held in
    memory, ``4 * E * n * K`` bytes for ``n`` samples and ``K`` classes.

    Args:
        model: runs in eval mode, and has its own modes back afterwards.
        loader: yields ``(x, y)``: ``x`` a tensor, a tuple of positional inputs or a dict of keyword inputs; ``y``
            ``(B,)`` int64 class indices, -100 for rows to ignore.
        max_accuracy_drop: as a fraction, in [0, 1); 0.01 is one percentage point.
        confidence: level of the interval, in (0, 1).
        score: the score of the policy.
        temperature: whether to fit a temperature per exit, see :func:`fit_temperature`; else all are 1.
        costs: what stages and heads cost; :func:`cet.exit_costs` when not given.

    Raises:
        ValueError: for arguments out of range, a loader without labelled rows, labels out of range, or a backbone whose
            FLOPs cannot be counted when ``costs`` is not given.
        TypeError: for a loader that does not yield ``(x, y)`` and labels that are not int64.
    """
    if not 0 <= max_accuracy_drop < 1:
        raise ValueError(f"max_accuracy_drop is {max_accuracy_drop}; give a fraction in [0, 1), 0.01 for one point")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a level in (0, 1)")
    if score not in SCORE_NAMES:
        raise ValueError(f"score {score!r} is unknown; choose one of {', '.join(SCORE_NAMES)}")
    if costs is not None and len(costs.stage) != model.num_exits:
        raise ValueError(f"costs has {len(costs.stage)} stages but the model has {model.num_exits} exits; give as many")
    costs = costs or exit_costs(model)
    exit_logits, labels = _collect(model, loader)

    temperatures = tuple(fit_temperature(logits, labels) if temperature else 1.0 for logits in exit_logits)
    scores = torch.stack(
        [exit_score(logits, score, t) for logits, t in zip(exit_logits[:-1], temperatures, strict=False)], dim=1
    ).numpy()
    correct = torch.stack([logits.argmax(dim=1) == labels for logits in exit_logits], dim=1).numpy()
    sign = 1.0 if score == "entropy" else -1.0  # the search lets low scores leave
    point = search_thresholds(sign * scores, correct, costs, max_accuracy_drop)
    thresholds = tuple(None if t == -math.inf else sign * t for t in point.thresholds)

    exit_index = simulate(point.thresholds, sign * scores)
    right, right_at_final = correct[np.arange(len(correct)), exit_index], correct[:, -1]
    lost, won = int((right_at_final & ~right).sum()), int((right & ~right_at_final).sum())
    fractions = np.bincount(exit_index, minlength=model.num_exits) / len(labels)
    survival = tuple((1.0 - fractions.cumsum()[:-1]).clip(0, 1).tolist())
    columns = zip(
        model.exit_names,
        correct.mean(axis=0).tolist(),
        temperatures,
        (*thresholds, None),
        fractions.tolist(),
        costs.cumulative([t is not None for t in thresholds]).tolist(),
        strict=True,
    )
    report = CalibrationReport(
        num_samples=len(labels),
        score=score,
        exits=tuple(ExitReport(*row) for row in columns),
        accuracy=point.accuracy,
        final_accuracy=float(right_at_final.mean()),
        drop=(lost - won) / len(labels),
        max_drop=max_accuracy_drop,
        interval=drop_interval(lost, won, len(labels), confidence),
        confidence=confidence,
        mean_cost=point.cost,
        full_cost=costs.full,
        unit=costs.unit,
    )
    return Calibration(ExitPolicy(score, thresholds, temperatures if temperature else None, survival), report)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [1/20, 20] that minimises the cross-entropy of ``softmax(logits / temperature)`` (Guo et al.
    2017, arXiv 1706.04599).

    The labels are smoothed by ``1 / (n + 2)``, in the manner of Platt (1999): ``n`` samples without an error do not
    show that there are none, and would otherwise drive all probabilities to 1, where samples cannot be told apart.
    Cross-entropy is convex in the inverse temperature, so its slope changes sign once, which bisection finds.

    Args:
        logits: ``(n, K)``; rows that are not finite are left out.
        labels: ``(n,)`` int64.
    """
    finite = logits.isfinite().all(dim=1)
    if not finite.any():
        return 1.0
    logits, labels = logits[finite].double(), labels[finite]
    smoothing = 1 / (len(labels) + 2)
    of_label = torch.lerp(logits.gather(1, labels[:, None]).mean(), logits.mean(), smoothing)
    low, high = -math.log(MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(30):
        middle = (low + high) / 2
        expected = (torch.softmax(logits * math.exp(middle), dim=1) * logits).sum(dim=1).mean()
        if expected < of_label:  # the loss still falls as the logits are scaled up
            low = middle
        else:
            high = middle
    return math.exp(-middle)


def drop_interval(lost: int, won: int, num_samples: int, confidence: float) -> tuple[float, float]:
    """Two-sided interval for the difference of two accuracies on the same samples: adjusted Wald interval for paired
    proportions (Bonett & Price 2012, J. Educ. Behav. Stat. 37(4), 479-488).

    Args:
        lost: samples that only the first classifier, the final exit, gets right.
        won: samples that only the second one, the policy, gets right.
        num_samples: all samples.
        confidence: level of the interval, in (0, 1).
    """
    p_lost, p_won = (lost + 1) / (num_samples + 2), (won + 1) / (num_samples + 2)
    difference = p_lost - p_won
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    margin = z * math.sqrt((p_lost + p_won - difference**2) / (num_samples + 2))
    return max(difference - margin, -1.0), min(difference + margin, 1.0)


def _collect(model: EarlyExit, loader: Iterable[Any]) -> tuple[list[Tensor], Tensor]:
    """Logits of each exit, ``E`` tensors ``(n, K)`` float32, and labels ``(n,)``, of the labelled rows, on the CPU."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batches: list[list[Tensor]] = []
    labels: list[Tensor] = []
    with torch.no_grad(), evaluating(model):
        for batch in loader:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(f"the loader yields {type(batch).__name__}; give one that yields pairs (x, y)")
            x, y = batch[0], batch[1].cpu() if isinstance(batch[1], Tensor) else batch[1]
            x = dict(x) if isinstance(x, Mapping) else x
            check_batch(x, y, model.num_classes, "the loader's ")
            is_labelled = y != UNLABELLED
            if not is_labelled.any():
                continue
            exit_logits = call(model.exit_logits, pytree.tree_map_only(Tensor, lambda t: t.to(device), x))
            batches.append([logits.float().cpu()[is_labelled] for logits in exit_logits])
            labels.append(y[is_labelled])
    if not labels:
        raise ValueError("loader yields no labelled rows; give it held-out samples with class indices as labels")
    return [torch.cat(parts) for parts in zip(*batches, strict=True)], torch.cat(labels)
