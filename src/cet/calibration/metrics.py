"""What the allowed drop is a drop of: accuracy, mean recall, the recall of every class, agreement with the full model,
the Brier score, or the user's own loss or function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cet.words import counted

MetricName = Literal["accuracy", "balanced", "per_class", "disagreement", "brier"]
MetricFunction = Callable[[Tensor, Tensor], Any]
"""Of labels ``(n,)`` and predictions ``(n,)``, int64 tensors on the CPU; more is better. It returns one number."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BoundedLoss:
    """A loss of the user's own, one number per sample, of which the mean may grow by the allowed drop.

    Args:
        function: of logits ``(n, K)`` as the model returns them, and labels ``(n,)`` int64, both on the CPU; it returns
            ``(n,)`` losses, less for better.
        low, high: what no loss ever leaves. The closer they are, the more can be guaranteed.

    Raises:
        ValueError: unless ``low < high``, both finite.
    """

    function: Callable[[Tensor, Tensor], Any]
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function is {self.function!r}; give a function of logits and labels")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the loss is between {self.low} and {self.high}; give finite numbers, low < high")

    def of(self, logits: Tensor, labels: Tensor) -> Floats:
        """The losses of one exit, ``(n,)`` float64, checked; of logits that are not finite, ``high``.

        Raises:
            ValueError: for a result of another shape, or out of bounds.
        """
        losses = torch.as_tensor(self.function(logits, labels)).detach().double().cpu()
        if losses.shape != labels.shape:
            raise ValueError(
                f"metric gives shape {tuple(losses.shape)} for {counted(len(labels), 'sample')}; give one loss each"
            )
        losses = losses.where(logits.isfinite().all(dim=1), self.high)
        outside = losses[~((losses >= self.low - 1e-6) & (losses <= self.high + 1e-6))]
        if outside.numel():
            raise ValueError(
                f"metric gives a loss of {outside[0].item():g}; give low and high that no loss leaves, "
                f"they are {self.low:g} and {self.high:g}"
            )
        values: Floats = losses.clamp(self.low, self.high).numpy()
        return values


def brier_score(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance between the softmax of the logits and the label's unit vector, ``(n,)`` in [0, 2]."""
    probabilities = torch.softmax(logits.float(), dim=1)
    of_label = probabilities.gather(1, labels[:, None]).squeeze(1)
    return probabilities.square().sum(dim=1) - 2 * of_label + 1


BRIER = BoundedLoss(brier_score, 0.0, 2.0)

MetricChoice = MetricName | MetricFunction | BoundedLoss


@dataclass(frozen=True)
class Metric:
    """A metric on given samples, in the form in which the threshold search bounds it.

    Samples are divided into strata. In every stratum the weighted share of right answers may fall by the allowed drop:
    accuracy and mean recall have one stratum, the recall of every class has one per class.

    Attributes:
        weights: ``(n,)`` float64, of each sample, >= 0 and in each stratum not all 0.
        strata: ``(n,)`` int64, the stratum of each sample, from 0.
        of_exits: of the exit at which each sample leaves, ``(n,)``, the value of the user's own function, which is
            bounded in the place of the shares; ``None`` when there is no function.
        gain: ``(n, E)`` in [0, 1], what the answer of each exit is worth; ``None``: 1 if it is right.
        unit: what a gain of 1 is in the units of the metric.
    """

    weights: Floats
    strata: Ints
    of_exits: Callable[[Ints], float] | None = None
    gain: NDArray[Any] | None = None
    unit: float = 1.0

    @classmethod
    def accuracy(cls, num_samples: int) -> Metric:
        """The share of right answers."""
        return cls(np.ones(num_samples), np.zeros(num_samples, dtype=np.int64))

    def drop(self, correct: NDArray[np.bool_], exit_index: Ints) -> float:
        """What is lost against the final exit, in the stratum that loses most.

        Args:
            correct: ``(n, E)``, whether the prediction of each exit is right.
            exit_index: ``(n,)``, where each sample leaves.
        """
        if self.of_exits is not None:
            return self.of_exits(np.full_like(exit_index, correct.shape[1] - 1)) - self.of_exits(exit_index)
        lost = self.weights * self.losses(correct)[np.arange(len(correct)), exit_index]
        return float((np.bincount(self.strata, lost) / np.bincount(self.strata, self.weights)).max())

    def losses(self, correct: NDArray[np.bool_]) -> NDArray[np.float32]:
        """``(n, E)``: what a sample loses by leaving at each exit against the final one, in units of the metric."""
        gain = (correct if self.gain is None else self.gain).astype(np.float32)
        return np.float32(self.unit) * (gain[:, -1:] - gain)


def check_metric(metric: MetricChoice, class_weights: Sequence[float] | Tensor | None, k: int) -> None:
    """Refuse a metric that is unknown, and weights that do not fit it or the ``k`` classes.

    Raises:
        ValueError, TypeError: then.
    """
    own = callable(metric) or isinstance(metric, BoundedLoss)
    if not own and metric not in get_args(MetricName):
        raise ValueError(
            f"metric {metric!r} is unknown; choose one of {', '.join(get_args(MetricName))}, or give a function of "
            "labels and predictions, or a cet.BoundedLoss"
        )
    if class_weights is None:
        return
    if metric not in ("accuracy", "balanced"):
        whose = "a function, which can weigh by itself" if own else str(metric)
        whose += ", which bounds each class" * (metric == "per_class")
        raise ValueError(
            "class_weights weigh the samples of metric 'accuracy' and the classes of 'balanced'; leave them out for "
            f"{whose}"
        )
    try:
        weights = [float(weight) for weight in class_weights]
    except (TypeError, ValueError):
        raise TypeError(f"class_weights is {class_weights!r}; give one number per class") from None
    if len(weights) != k or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(f"class_weights is {weights}; give {k} finite numbers >= 0, one per class, not all 0")


def metric_on(
    metric: MetricChoice,
    class_weights: Sequence[float] | Tensor | None,
    labels: Tensor,
    predictions: Tensor,
    exit_logits: Sequence[Tensor] | None = None,
) -> Metric:
    """The metric on calibration samples.

    Args:
        metric: as :func:`cet.calibrate` takes it, checked by :func:`check_metric`.
        class_weights: likewise.
        labels: ``(n,)`` int64.
        predictions: ``(n, E)`` int64, of each exit.
        exit_logits: ``E`` tensors ``(n, K)``, which the Brier score and a :class:`BoundedLoss` are computed from.

    Raises:
        ValueError: when only classes of weight 0 occur, or the user's function gives no finite number.
    """
    y: Ints = labels.numpy()
    _, classes, counts = np.unique(y, return_inverse=True, return_counts=True)
    if metric == "brier":
        metric = BRIER
    if isinstance(metric, BoundedLoss):
        assert exit_logits is not None
        unit = metric.high - metric.low
        gain = [(metric.high - metric.of(logits, labels)) / unit for logits in exit_logits]
        return Metric(np.ones(len(y)), np.zeros_like(y), gain=np.stack(gain, axis=1).astype(np.float32), unit=unit)
    if callable(metric):
        return Metric(np.ones(len(y)), np.zeros_like(y), _of_exits(metric, labels, predictions))
    if metric == "disagreement":
        return Metric(np.ones(len(y)), np.zeros_like(y), gain=(predictions == predictions[:, -1:]).numpy())
    if metric == "per_class":
        return Metric(np.ones(len(y)), classes)
    weights = np.ones(len(y)) if class_weights is None else np.array([float(w) for w in class_weights])[y]
    if not weights.any():
        raise ValueError("class_weights are 0 for every class that occurs in the loader; give one of them a weight")
    if metric == "balanced":
        weights = weights / counts[classes]
    return Metric(weights, np.zeros_like(y))


def _of_exits(function: MetricFunction, labels: Tensor, predictions: Tensor) -> Callable[[Ints], float]:
    def value(exit_index: Ints) -> float:
        chosen = predictions.gather(1, torch.from_numpy(exit_index)[:, None]).squeeze(1)
        number = float(function(labels, chosen))
        if not math.isfinite(number):
            raise ValueError(f"metric gives {number}; give a function that returns a finite number, more for better")
        return number

    return value
