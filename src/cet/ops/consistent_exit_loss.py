"""The consistency objective on the logits of all exits at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Literal["soft", "hard"]
Teacher = Literal["self", "final"]

UNLABELLED = -100


class ExitLosses(NamedTuple):
    """What :func:`consistent_exit_loss` returns; each part is a float32 tensor ``(E,)`` before any weight."""

    loss: Tensor
    supervised: Tensor
    consistency: Tensor
    confident: Tensor


def consistent_exit_loss(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    labels: Tensor,
    *,
    consistency_weight: float = 1.0,
    target: Target = "soft",
    teacher: Teacher = "self",
    min_confidence: float = 0.0,
    exit_weights: Sequence[float] | None = None,
) -> ExitLosses:
    """``sum_k w_k [ CE(f_k(x), y) + consistency_weight * m * D(stop-grad p(x), p_k(x~)) ]``.

    ``CE`` is averaged over the labelled rows, ``m D`` over all rows. ``p`` is the softmax of the same exit
    (``teacher="self"``) or of the last one (``"final"``) on the clean input; ``D`` is the Kullback-Leibler divergence
    from it (``target="soft"``; Xie et al. 2020, arXiv 1904.12848) or the cross-entropy with its most likely class
    (``"hard"``; Sohn et al. 2020, arXiv 2001.07685); ``m`` is 1 where the largest entry of ``p`` reaches
    ``min_confidence``, else 0. All arithmetic is in float32.

    Args:
        clean: E tensors ``(B, K)``, the logits on the clean input, shallow exit first.
        perturbed: E tensors ``(B, K)``, the logits on the perturbed input.
        labels: ``(B,)`` int64 in ``[0, K)``, or -100 for a row without a label, which adds the consistency term only.
        consistency_weight: the weight lambda of the consistency term.
        target: ``"soft"`` or ``"hard"``.
        teacher: ``"self"`` or ``"final"``.
        min_confidence: rows whose teacher is less sure than this add no consistency term.
        exit_weights: one weight ``w_k`` per exit; ``1 / E`` each when not given.

    Returns:
        The scalar loss, and per exit the supervised term, the consistency term, and the fraction of rows with
        ``m = 1``. Gradients flow through the loss alone.
    """
    labelled = (labels != UNLABELLED).sum().clamp(min=1)
    weights = exit_weights if exit_weights is not None else [1.0 / len(clean)] * len(clean)
    final = _teacher_log_probabilities(clean[-1])
    loss = clean[0].new_zeros((), dtype=torch.float32)
    supervised, consistency, confident = [], [], []
    for clean_k, perturbed_k, weight in zip(clean, perturbed, weights, strict=True):
        teacher_k = _teacher_log_probabilities(clean_k) if teacher == "self" else final
        confidence, prediction = teacher_k.max(dim=1)
        mask = (confidence.exp() >= min_confidence).float()
        student = F.log_softmax(perturbed_k.float(), dim=1)
        if target == "soft":
            divergence = F.kl_div(student, teacher_k, reduction="none", log_target=True).sum(dim=1)
        else:
            divergence = F.nll_loss(student, prediction, reduction="none")
        s = F.cross_entropy(clean_k.float(), labels, ignore_index=UNLABELLED, reduction="sum") / labelled
        c = (mask * divergence).mean()
        loss = loss + weight * (s + consistency_weight * c)
        supervised.append(s.detach())
        consistency.append(c.detach())
        confident.append(mask.mean())
    return ExitLosses(loss, torch.stack(supervised), torch.stack(consistency), torch.stack(confident))


def _teacher_log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.detach().float(), dim=1)
