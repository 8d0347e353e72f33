"""The gate on Triton's kernels, which are imported when a call needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cet.ops.compact.definition import RowOrder


def gate(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`cet.ops.gate`."""
    from cet.kernels import exit_gate as kernels

    decided: tuple[Tensor, Tensor] = kernels.gate(*args)
    return decided


def exit_gate(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cet.ops.exit_gate`."""
    from cet.kernels import exit_gate as kernels

    gated: tuple[Tensor, Tensor, Tensor] = kernels.exit_gate(*args)
    return gated


def exit_gate_and_order(*args: Any) -> tuple[Tensor, Tensor, RowOrder]:
    """As :func:`exit_gate`, but with the rows in order, in the same launch, instead of the exit mask."""
    from cet.kernels import exit_gate as kernels

    logits, scores, order, num_kept = kernels.exit_gate_and_order(*args)
    return logits, scores, RowOrder(order, num_kept)


def padded_gate(*args: Any) -> tuple[Tensor, Tensor]:
    """See :func:`cet.ops.padded.padded_gate`."""
    from cet.kernels import exit_gate as kernels

    gated: tuple[Tensor, Tensor] = kernels.padded_gate(*args)
    return gated


def padded_exit_gate(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cet.ops.padded.padded_exit_gate`."""
    from cet.kernels import exit_gate as kernels

    gated: tuple[Tensor, Tensor, Tensor] = kernels.padded_exit_gate(*args)
    return gated
