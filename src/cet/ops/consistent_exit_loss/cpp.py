"""The loss and its gradients on the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cet.data.batches import UNLABELLED
from cet.ops import backend
from cet.ops.consistent_exit_loss.definition import ExitLosses, LossConfig, refuse_second_derivative
from cet.ops.exit_gate.definition import DTYPES


def consistent_exit_loss(logits: Sequence[Tensor], labels: Tensor, config: LossConfig) -> ExitLosses:
    """See :func:`cet.ops.consistent_exit_loss`."""
    return ExitLosses(*_ConsistentExitLoss.apply(labels, config, *logits))  # type: ignore[no-untyped-call]


def losses_and_gradients(
    logits: Sequence[Tensor], labels: Tensor, config: LossConfig, gradients: Sequence[Tensor | None]
) -> ExitLosses:
    """The losses; the gradients of the loss are written to those ``gradients``, one per logits, that are given."""
    logits = [x if x.stride(1) == 1 else x.contiguous() for x in logits]
    exits = len(config.exit_weights)
    rows, classes = logits[0].shape
    loss = logits[0].new_empty((), dtype=torch.float32)
    supervised, consistency, confident, supervised_perturbed = (loss.new_empty((exits,)) for _ in range(4))
    labels = labels.contiguous()
    pointers = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
    backend.kernels().consistent_exit_loss(  # type: ignore[union-attr] # dispatch has seen them
        [
            (x.data_ptr(), x.stride(0), gradient, y.data_ptr(), y.stride(0), gradient_y, weight)
            for x, gradient, y, gradient_y, weight in zip(
                logits[:exits], pointers[:exits], logits[exits:], pointers[exits:], config.exit_weights, strict=True
            )
        ],
        DTYPES[logits[0].dtype],
        rows,
        classes,
        labels.data_ptr(),
        config.consistency_weight,
        config.supervise_perturbed,
        config.min_confidence,
        config.target == "hard",
        config.teacher,
        loss.data_ptr(),
        supervised.data_ptr(),
        consistency.data_ptr(),
        confident.data_ptr(),
        supervised_perturbed.data_ptr(),
        torch.get_num_threads(),
    )
    return ExitLosses(loss, supervised, consistency, confident, supervised_perturbed)


class _ConsistentExitLoss(torch.autograd.Function):
    """Forward computes the gradients too: both softmaxes of a row are at hand then."""

    @staticmethod
    def forward(ctx: Any, labels: Tensor, config: LossConfig, *logits: Tensor) -> ExitLosses:
        # In one piece: glibc keeps one large piece when it is freed, and gives many back to the system each time.
        wanted = ctx.needs_input_grad[2:]
        pieces = iter(logits[0].new_empty((sum(wanted), *logits[0].shape)).unbind())
        gradients = [next(pieces) if want else None for want in wanted]
        losses = losses_and_gradients(logits, labels, config, gradients)
        ctx.factors = _half_factors(labels, config) if logits[0].dtype is torch.float16 else [1.0] * len(logits)
        ctx.save_for_backward(*gradients)  # which lets go of them in time for a leaf to keep, rather than copy, its own
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # Mostly the loss is what backward() starts from: then there is nothing to scale. A number is not rounded to
        # half precision before it multiplies, as a tensor is: there a loss scale may be infinite.
        scale = grad.item()
        return (
            None,
            None,
            *(
                g if g is None or scale * factor == 1.0 else g * (scale * factor)
                for g, factor in zip(ctx.saved_tensors, ctx.factors, strict=True)
            ),
        )


def _half_factors(labels: Tensor, config: LossConfig) -> list[float]:
    labelled = max(1, int((labels != UNLABELLED).sum()))
    return [shared + supervised / labelled for shared, supervised in config.half_factors(len(labels))]
