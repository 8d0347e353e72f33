"""What a calibrated policy does on the samples that it was calibrated on: by exit, by class, and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from cet.ops.definitions import ScoreName

MAX_CLASSES_SHOWN = 10
"""How many classes the text of a report lists; :meth:`CalibrationReport.to_dict` holds all of them."""


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
class ClassReport:
    """One class that occurs among the calibration samples.

    Attributes:
        label: the class index.
        num_samples: samples with this label.
        recall: the fraction of them that the policy gets right.
        final_recall: the fraction of them that the final exit gets right.
        num_leaving: how many of them leave at each exit, shallow first.
    """

    label: int
    num_samples: int
    recall: float
    final_recall: float
    num_leaving: tuple[int, ...]

    @property
    def drop(self) -> float:
        """The recall that the policy loses."""
        return self.final_recall - self.recall

    @property
    def exit_shares(self) -> tuple[float, ...]:
        """The fraction of the class that leaves at each exit."""
        return tuple(count / self.num_samples for count in self.num_leaving)


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibrated policy does on the samples it was calibrated on.

    Attributes:
        num_samples: labelled samples.
        score: the policy's score.
        exits: one :class:`ExitReport` per exit, shallow first.
        classes: one :class:`ClassReport` per class that occurs, by label.
        accuracy: of the policy.
        final_accuracy: of the final exit on all samples.
        drop: ``final_accuracy - accuracy``.
        metric: the name of the metric that was bounded.
        metric_drop: what the metric loses; for ``"per_class"`` the largest loss of recall.
        max_drop: what ``metric_drop`` was allowed to be.
        interval: two-sided confidence interval of ``drop`` on samples drawn like these.
        confidence: its level.
        mean_cost: per sample under the policy.
        full_cost: per sample for the backbone alone.
        unit: of all costs.
    """

    num_samples: int
    score: ScoreName
    exits: tuple[ExitReport, ...]
    classes: tuple[ClassReport, ...]
    accuracy: float
    final_accuracy: float
    drop: float
    metric: str
    metric_drop: float
    max_drop: float
    interval: tuple[float, float]
    confidence: float
    mean_cost: float
    full_cost: float
    unit: str

    @property
    def warning(self) -> str | None:
        """A sentence about the classes that lose more recall than ``max_drop``; ``None`` when there is none."""
        # A recall is a fraction of at most 2^53 samples: a difference within 1e-9 is rounding.
        losing = [row for row in self.classes if row.drop > self.max_drop + 1e-9]
        if not losing:
            return None
        worst = max(losing, key=lambda row: row.drop)
        lose = "class loses" if len(losing) == 1 else "classes lose"
        return (
            f"{len(losing)} {lose} more recall than {100 * self.max_drop:.4g} points, most of all class {worst.label}, "
            f"from {worst.final_recall:.2%} to {worst.recall:.2%} of {worst.num_samples} samples; bound it with "
            "metric='per_class' or 'balanced'"
        )

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold, the warning included."""
        return {**asdict(self), "warning": self.warning}

    def __str__(self) -> str:
        low, high = self.interval
        bounded = "" if self.metric == "accuracy" else f"{self.metric} drops by {100 * self.metric_drop:.2f} points; "
        return "\n".join(
            [
                *self._exit_lines(),
                f"{bounded}accuracy {self.accuracy:.2%} against {self.final_accuracy:.2%} of the final exit, a drop of "
                f"{100 * self.drop:.2f} points ({self.confidence:.0%} interval {100 * low:.2f} to {100 * high:.2f}) "
                f"on {self.num_samples} samples",
                f"mean cost {self.mean_cost:.4g} {self.unit}, {self.mean_cost / self.full_cost:.1%} of the backbone",
                *self._class_lines(),
                *([f"warning: {self.warning}"] if self.warning else []),
            ]
        )

    def _exit_lines(self) -> list[str]:
        width = max(len(row.name) for row in self.exits)
        lines = [f"{'exit':<{width}}  accuracy  temperature  threshold  leaving  {self.unit:>10}"]
        for row in self.exits:
            threshold = "-" if row.threshold is None else f"{row.threshold:.4g}"
            lines.append(
                f"{row.name:<{width}}  {row.accuracy:>8.2%}  {row.temperature:>11.3f}  {threshold:>9}  "
                f"{row.fraction:>7.1%}  {row.cost:>10.4g}"
            )
        return lines

    def _class_lines(self) -> list[str]:
        """The classes that lose most recall, in the order of that loss."""
        shown = sorted(self.classes, key=lambda row: (-row.drop, row.label))[:MAX_CLASSES_SHOWN]
        names = [row.name for row in self.exits]
        widths = [max(len(name), 6) for name in names]
        head = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
        lines = [f"class  samples  recall  of final  leaving at: {head}"]
        for row in shown:
            shares = "  ".join(f"{share:>{width}.1%}" for share, width in zip(row.exit_shares, widths, strict=True))
            lines.append(
                f"{row.label:>5}  {row.num_samples:>7}  {row.recall:>6.1%}  {row.final_recall:>8.1%}  {'':<11} {shares}"
            )
        if len(self.classes) > len(shown):
            lines.append(f"and {len(self.classes) - len(shown)} classes that lose less")
        return lines


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
