"""What the consistency objective means, in plain PyTorch, on the logits of all exits at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.data.batches import UNLABELLED

Target = Literal["soft", "hard"]
Teacher = Literal["self", "final"]

HALF_GRADIENT_SCALE = 2.0**15
"""What the kernels multiply differences of probabilities by, where they store gradients in float16.

Divided by the number of rows already, small gradients would round to zero before the loss scale of mixed-precision
training can save them.
"""


@dataclass(frozen=True)
class LossConfig:
    """What the loss is made of, see :func:`consistent_exit_loss`."""

    consistency_weight: float
    target: Target
    teacher: Teacher
    min_confidence: float
    exit_weights: tuple[float, ...]

    def half_factors(self, num_rows: int) -> tuple[list[float], list[float]]:
        """What the kernels' gradients in float16 still have to be multiplied by, per exit: those of the clean logits,
        which are divided by the number of labelled rows too, and those of the perturbed."""
        supervised = [weight / HALF_GRADIENT_SCALE for weight in self.exit_weights]
        return supervised, [weight * (self.consistency_weight / num_rows) for weight in supervised]


class ExitLosses(NamedTuple):
    """What :func:`consistent_exit_loss` returns; each part is a float32 tensor ``(E,)`` before any weight."""

    loss: Tensor
    supervised: Tensor
    consistency: Tensor
    confident: Tensor


def loss_definition(logits: Sequence[Tensor], labels: Tensor, config: LossConfig) -> ExitLosses:
    """The definition of :func:`consistent_exit_loss`; ``logits`` are the clean ones, then the perturbed."""
    clean, perturbed = logits[: len(logits) // 2], logits[len(logits) // 2 :]
    labelled = (labels != UNLABELLED).sum().clamp(min=1)
    rows = max(len(labels), 1)
    final = _teacher_log_probabilities(clean[-1])
    loss = clean[0].new_zeros((), dtype=torch.float32)
    supervised, consistency, confident = [], [], []
    for clean_k, perturbed_k, weight in zip(clean, perturbed, config.exit_weights, strict=True):
        teacher_k = _teacher_log_probabilities(clean_k) if config.teacher == "self" else final
        confidence, prediction = teacher_k.max(dim=1)
        mask = (confidence.exp() >= config.min_confidence).float()
        student = F.log_softmax(perturbed_k.float(), dim=1)
        if config.target == "soft":
            divergences = F.kl_div(student, teacher_k, reduction="none", log_target=True)
            # A class that the teacher rules out adds nothing, whatever the student's logit.
            divergence = divergences.masked_fill(teacher_k.exp() == 0.0, 0.0).sum(dim=1)
        else:
            divergence = F.nll_loss(student, prediction, reduction="none")
        s = F.cross_entropy(clean_k.float(), labels, ignore_index=UNLABELLED, reduction="sum") / labelled
        c = (mask * divergence).sum() / rows
        loss = loss + weight * (s + config.consistency_weight * c)
        supervised.append(s.detach())
        consistency.append(c.detach())
        confident.append(mask.sum() / rows)
    return ExitLosses(loss, torch.stack(supervised), torch.stack(consistency), torch.stack(confident))


def _teacher_log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.detach().float(), dim=1)


def refuse_second_derivative() -> None:
    """Autograd would take the gradients for constants, where it is asked to differentiate them again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "consistent_exit_loss: the kernels' gradients have no gradient of their own; for create_graph=True compute "
            "the loss under use_backend('reference')"
        )
