"""The loss and its gradients on Triton's kernels, which are imported when a call needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cet.ops.consistent_exit_loss.definition import ExitLosses, LossConfig, refuse_second_derivative


def consistent_exit_loss(logits: Sequence[Tensor], labels: Tensor, config: LossConfig) -> ExitLosses:
    """See :func:`cet.ops.consistent_exit_loss`."""
    return ExitLosses(*_ConsistentExitLoss.apply(labels, config, *logits))  # type: ignore[no-untyped-call]


def losses_and_gradients(
    logits: Sequence[Tensor], labels: Tensor, config: LossConfig, wanted: Sequence[bool]
) -> tuple[ExitLosses, list[Tensor | None], Tensor]:
    """The losses; the gradients of the loss, of the clean logits where any is wanted, and so of the perturbed, not yet
    scaled in float16; and the number of labelled rows, on the device."""
    from cet.kernels import consistent_exit_loss as kernels

    losses, gradients, labelled = kernels.losses_and_gradients(logits, labels, config, wanted)
    return ExitLosses(*losses), gradients, labelled


class _ConsistentExitLoss(torch.autograd.Function):
    """Forward computes the gradients too: both softmaxes of a row are at hand then."""

    @staticmethod
    def forward(ctx: Any, labels: Tensor, config: LossConfig, *logits: Tensor) -> ExitLosses:
        ctx.wanted, ctx.config = ctx.needs_input_grad[2:], config
        losses, ctx.gradients, labelled = losses_and_gradients(logits, labels, config, ctx.wanted)
        ctx.save_for_backward(labels, labelled, *logits)
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> tuple[Tensor | None, ...]:
        from cet.kernels import consistent_exit_loss as kernels

        refuse_second_derivative()
        # Whoever takes the gradients owns them, so they can be scaled in place. A second call, on a graph that was
        # retained, computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        labels, labelled, *logits = ctx.saved_tensors
        if gradients is None:
            _, gradients, _ = losses_and_gradients(logits, labels, ctx.config, ctx.wanted)
        factors = ctx.config.half_factors(len(labels)) if logits[0].dtype is torch.float16 else None
        kernels.scale_into(gradients, grad, factors, labelled)
        return None, None, *(g if want else None for g, want in zip(gradients, ctx.wanted, strict=True))
