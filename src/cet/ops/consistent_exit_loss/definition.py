"""What the consistency objective means, in plain PyTorch, on the logits of all exits at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.data.batches import UNLABELLED

Target = Literal["soft", "hard"]
Teacher = Literal["mean", "self", "final"]

HALF_GRADIENT_SCALE = 2.0**15
"""What the kernels multiply differences of probabilities by, where they store gradients in float16.

Divided by the number of rows already, small gradients would round to zero before the loss scale of mixed-precision
training can save them.
"""


@dataclass(frozen=True)
class LossConfig:
    """What the loss is made of, see :func:`consistent_exit_loss`."""

    consistency_weight: float
    supervise_perturbed: float
    target: Target
    teacher: Teacher
    min_confidence: float
    exit_weights: tuple[float, ...]

    def half_factors(self, num_rows: int) -> list[tuple[float, float]]:
        """What the kernels' gradients in float16 still have to be multiplied by: for each of the clean logits, then of
        the perturbed, the sum of the first number and of the second over the number of labelled rows."""
        weights = [weight / HALF_GRADIENT_SCALE for weight in self.exit_weights]
        shared = self.consistency_weight / num_rows
        return [(0.0, w) for w in weights] + [(w * shared, w * self.supervise_perturbed) for w in weights]


class ExitLosses(NamedTuple):
    """What :func:`consistent_exit_loss` returns; each part is a float32 tensor ``(E,)`` before any weight."""

    loss: Tensor
    supervised: Tensor
    consistency: Tensor
    confident: Tensor
    supervised_perturbed: Tensor


def loss_definition(logits: Sequence[Tensor], labels: Tensor, config: LossConfig) -> ExitLosses:
    """The definition of :func:`consistent_exit_loss`; ``logits`` are the clean ones, then the perturbed."""
    clean, perturbed = logits[: len(logits) // 2], logits[len(logits) // 2 :]
    labelled = (labels != UNLABELLED).sum().clamp(min=1)
    rows = max(len(labels), 1)
    teachers = _teacher_log_probabilities(clean, config.teacher)
    loss = clean[0].new_zeros((), dtype=torch.float32)
    parts = []
    for clean_k, perturbed_k, teacher_k, weight in zip(clean, perturbed, teachers, config.exit_weights, strict=True):
        perturbed_k = (
            perturbed_k.float()
        )  # once: in half precision the gradients of both terms are added before rounding
        confidence, prediction = teacher_k.max(dim=1)
        mask = (confidence.exp() >= config.min_confidence).float()
        student = F.log_softmax(perturbed_k, dim=1)
        if config.target == "soft":
            divergences = F.kl_div(student, teacher_k, reduction="none", log_target=True)
            # A class that the teacher rules out adds nothing, whatever the student's logit.
            divergence = divergences.masked_fill(teacher_k.exp() == 0.0, 0.0).sum(dim=1)
        else:
            divergence = F.nll_loss(student, prediction, reduction="none")
        supervised, supervised_perturbed = (
            F.cross_entropy(x.float(), labels, ignore_index=UNLABELLED, reduction="sum") / labelled
            for x in (clean_k, perturbed_k)
        )
        consistency = (mask * divergence).sum() / rows
        loss = loss + weight * supervised
        # A term of weight 0 may be infinite.
        if config.supervise_perturbed:
            loss = loss + weight * config.supervise_perturbed * supervised_perturbed
        if config.consistency_weight:
            loss = loss + weight * config.consistency_weight * consistency
        parts.append((supervised, consistency, mask.sum() / rows, supervised_perturbed))
    return ExitLosses(loss, *(torch.stack(part).detach() for part in zip(*parts, strict=True)))


def _teacher_log_probabilities(clean: Sequence[Tensor], teacher: Teacher) -> list[Tensor]:
    """Of each exit, ``(B, K)`` float32."""
    exits = [F.log_softmax(logits.detach().float(), dim=1) for logits in clean]
    if teacher == "self":
        return exits
    shared = exits[-1] if teacher == "final" else torch.stack(exits).logsumexp(dim=0) - math.log(len(exits))
    return [shared] * len(exits)


def refuse_second_derivative() -> None:
    """Autograd would take the gradients for constants, where it is asked to differentiate them again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "consistent_exit_loss: the kernels' gradients have no gradient of their own; for create_graph=True compute "
            "the loss under use_backend('reference')"
        )
