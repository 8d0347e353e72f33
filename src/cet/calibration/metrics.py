"""What the allowed drop is a drop of: accuracy, mean recall, the recall of every class, or the user's own function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MetricName = Literal["accuracy", "balanced", "per_class"]
MetricFunction = Callable[[Tensor, Tensor], Any]
"""Of labels ``(n,)`` and predictions ``(n,)``, int64 tensors on the CPU; more is better. It returns one number."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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
    """

    weights: Floats
    strata: Ints
    of_exits: Callable[[Ints], float] | None = None

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
        right = correct[np.arange(len(correct)), exit_index]
        lost = self.weights * (correct[:, -1].astype(np.float64) - right)
        return float((np.bincount(self.strata, lost) / np.bincount(self.strata, self.weights)).max())


def check_metric(metric: MetricName | MetricFunction, class_weights: Sequence[float] | Tensor | None, k: int) -> None:
    """Refuse a metric that is unknown, and weights that do not fit it or the ``k`` classes.

    Raises:
        ValueError, TypeError: then.
    """
    if not callable(metric) and metric not in get_args(MetricName):
        raise ValueError(
            f"metric {metric!r} is unknown; choose one of {', '.join(get_args(MetricName))}, or give a function of "
            "labels and predictions"
        )
    if class_weights is None:
        return
    if callable(metric) or metric == "per_class":
        raise ValueError(
            "class_weights weigh the samples of metric 'accuracy' and the classes of 'balanced'; leave them out for "
            f"{'a function, which can weigh by itself' if callable(metric) else 'per_class, which bounds each class'}"
        )
    try:
        weights = [float(weight) for weight in class_weights]
    except (TypeError, ValueError):
        raise TypeError(f"class_weights is {class_weights!r}; give one number per class") from None
    if len(weights) != k or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(f"class_weights is {weights}; give {k} finite numbers >= 0, one per class, not all 0")


def metric_on(
    metric: MetricName | MetricFunction,
    class_weights: Sequence[float] | Tensor | None,
    labels: Tensor,
    predictions: Tensor,
) -> Metric:
    """The metric on calibration samples.

    Args:
        metric: as :func:`cet.calibrate` takes it, checked by :func:`check_metric`.
        class_weights: likewise.
        labels: ``(n,)`` int64.
        predictions: ``(n, E)`` int64, of each exit.

    Raises:
        ValueError: when only classes of weight 0 occur, or the user's function gives no finite number.
    """
    y: Ints = labels.numpy()
    _, classes, counts = np.unique(y, return_inverse=True, return_counts=True)
    if callable(metric):
        return Metric(np.ones(len(y)), np.zeros_like(y), _of_exits(metric, labels, predictions))
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
