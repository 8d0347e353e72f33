"""How well a calibrated model does on people it has not seen, as the input gets worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from cet.calibration.cost import ExitCosts
from cet.calibration.thresholds import simulate
from cet.data.smartwatch import Windows
from cet.model.early_exit import EarlyExit
from cet.ops import exit_score
from cet.perturb.base import Perturbation
from cet.training import perturbation

BATCH_SIZE = 512
CURVE_POINTS = 33

Preset = Callable[[float], Perturbation]
"""The perturbation of each severity."""


class Quality(TypedDict):
    """Of the predicted labels, both in [0, 1]."""

    accuracy: float
    macro_f1: float


class EarlyQuality(Quality):
    """Of a batch whose samples leave early: where they leave, shallow first, and what a sample costs on average."""

    exit_shares: list[float]
    mean_flops: float


class AtSeverity(TypedDict):
    """At one severity: each exit if all samples left there (the last is the full network), and the policy.

    ``group_losses`` is, for each group of the windows, such as a person, what leaving early loses of its accuracy.
    """

    severity: float
    exits: list[Quality]
    early: EarlyQuality
    group_losses: list[float]


class CurvePoint(TypedDict):
    """Accuracy and mean FLOPs per sample with one entropy threshold for all exits; with ``None``, all are closed."""

    threshold: float | None
    accuracy: float
    mean_flops: float


def perturbed(windows: Windows, severity: float, seed: int, preset: Preset = perturbation) -> Tensor:
    """The windows ``(N, C, L)`` at a severity; a seed draws the same perturbations at every severity, only stronger."""
    x: Tensor = preset(severity)(windows.x, generator=torch.Generator().manual_seed(seed))
    return x


def at_severity(model: EarlyExit, x: Tensor, y: Tensor, group: Tensor, costs: ExitCosts, severity: float) -> AtSeverity:
    """Evaluate on inputs ``x`` that were perturbed with ``severity``, and whose groups are ``(N,)``."""
    answers = [model.predict(batch) for batch in torch.split(x, BATCH_SIZE)]
    exit_index = torch.cat([answer.exit_index for answer in answers])
    labels = torch.cat([answer.labels for answer in answers])
    cost = torch.from_numpy(costs.cumulative([threshold is not None for threshold in model.policy.thresholds]))
    shares = exit_index.bincount(minlength=model.num_exits) / len(exit_index)
    alone = [logits.argmax(1) for logits in exit_logits(model, x)]
    lost = (alone[-1] == y).double() - (labels == y).double()
    return AtSeverity(
        severity=severity,
        exits=[_quality(predictions, y, model.num_classes) for predictions in alone],
        early=EarlyQuality(
            **_quality(labels, y, model.num_classes),
            exit_shares=shares.tolist(),
            mean_flops=cost[exit_index].mean().item(),
        ),
        group_losses=[lost[group == each].mean().item() for each in torch.unique(group)],
    )


def curve_thresholds(model: EarlyExit, calibration: Windows) -> list[float]:
    """Entropy thresholds from one at which hardly any sample leaves to one at which all leave at once.

    They are quantiles of the scores of all early exits on the calibration persons: nothing is chosen on test persons.
    """
    scores = _scores(model, exit_logits(model, calibration.x))
    thresholds: list[float] = np.quantile(scores, np.linspace(0, 1, CURVE_POINTS)).tolist()
    return thresholds


def accuracy_compute_curve(
    model: EarlyExit, x: Tensor, y: Tensor, costs: ExitCosts, thresholds: Sequence[float]
) -> list[CurvePoint]:
    """The full network, then one point per threshold, which all exits share.

    The exit of a sample is worked out from its scores at all exits, by the rule that :meth:`EarlyExit.predict` follows.
    """
    logits = exit_logits(model, x)
    scores = _scores(model, logits)
    correct = torch.stack([exit_.argmax(dim=1) == y for exit_ in logits], dim=1).numpy()
    cost = costs.cumulative([True] * (model.num_exits - 1))
    points = [CurvePoint(threshold=None, accuracy=correct[:, -1].mean().item(), mean_flops=costs.full)]
    for threshold in thresholds:
        exit_index = simulate([threshold] * scores.shape[1], scores)
        points.append(
            CurvePoint(
                threshold=threshold,
                accuracy=correct[np.arange(len(y)), exit_index].mean().item(),
                mean_flops=cost[exit_index].mean().item(),
            )
        )
    return points


@torch.no_grad()
def exit_logits(model: EarlyExit, x: Tensor) -> list[Tensor]:
    """``E`` tensors ``(N, K)``."""
    batches = [model.exit_logits(batch) for batch in torch.split(x, BATCH_SIZE)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _scores(model: EarlyExit, logits: Sequence[Tensor]) -> NDArray[np.float32]:
    """Entropies of the early exits, ``(N, E - 1)``, at the model's temperatures."""
    columns = [exit_score(early, "entropy", model.policy.temperature(k)) for k, early in enumerate(logits[:-1])]
    return torch.stack(columns, dim=1).numpy()


def _quality(labels: Tensor, y: Tensor, num_classes: int) -> Quality:
    return Quality(
        accuracy=(labels == y).double().mean().item(),
        macro_f1=multiclass_f1_score(labels, y, num_classes, average="macro").item(),
    )
