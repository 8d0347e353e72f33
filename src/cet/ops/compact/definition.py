"""What compaction means, in plain PyTorch: kept rows are moved together in their order, the others to the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RowPairs = Sequence[tuple[Tensor, Tensor]]
"""Sources and targets of rows that move."""


class RowOrder(NamedTuple):
    """What a gate on a GPU hands to compaction; whoever moves rows trims by the number kept, or pads.

    Attributes:
        order: ``(2, B)`` integers: first the positions of the kept rows, then of those that leave, both ascending. What
            is behind them is undefined.
        num_kept: how many are kept, ``()``, known to the device.
    """

    order: Tensor
    num_kept: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> RowOrder:
        """For as many rows, not yet known."""
        return cls(like.new_empty(2, like.shape[0], dtype=torch.int64), like.new_empty((), dtype=torch.int64))

    def trimmed(self) -> tuple[Tensor, Tensor]:
        """The kept and the exited indices of a batch without padding. Waits for their number."""
        num_kept = int(self.num_kept)
        kept, exited = self.order.unbind()
        return kept[:num_kept], exited[: len(exited) - num_kept]


def split_order(order: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The kept and the exited indices."""
    rows = order.shape[0]
    if num_kept == 0:
        return order.new_empty(0), order
    if num_kept == rows:
        return order, order.new_empty(0)
    kept, exited = order.split_with_sizes((num_kept, rows - num_kept))
    return kept, exited


class Compaction(NamedTuple):
    """What :func:`compact` returns.

    Attributes:
        kept_indices: ``(N,)`` int64, positions of the rows that are kept, ascending.
        exited_indices: ``(B - N,)`` int64, positions of the rows that leave, ascending.
        tensors: the given tensors with the ``N`` kept rows.
    """

    kept_indices: Tensor
    exited_indices: Tensor
    tensors: list[Tensor]


def order_rows_definition(exit_mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Order ``(2, B)`` and number kept of a batch of which the first ``count`` rows are real."""
    is_real = torch.arange(len(exit_mask), device=exit_mask.device) < count
    is_kept = is_real & ~exit_mask
    flags = torch.stack([is_kept, is_real & exit_mask])
    return (~flags).int().argsort(dim=1, stable=True), is_kept.sum()


def compact_definition(exit_mask: Tensor, tensors: Sequence[Tensor], dims: Sequence[int]) -> Compaction:
    """The definition of :func:`compact`."""
    # By nonzero, whose size a traced graph can hold.
    kept, exited = (~exit_mask).nonzero().squeeze(1), exit_mask.nonzero().squeeze(1)
    return Compaction(kept, exited, [gather_definition(x, dim, kept) for x, dim in zip(tensors, dims, strict=True)])


def gather_definition(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The rows ``index`` of a tensor, in a new one that is laid out as it is."""
    if tensor.is_contiguous():
        return tensor.index_select(dim, index)
    core = without_repeats(tensor)
    order = memory_order(core)
    if tensor.stride(dim) != 0:
        core = core.permute(order).index_select(order.index(dim), index)
        core = core.permute(sorted(range(tensor.ndim), key=order.__getitem__))
    return core.expand(*tensor.shape[:dim], index.numel(), *tensor.shape[dim + 1 :])


def without_repeats(tensor: Tensor) -> Tensor:
    """What is expanded is one and the same along that dimension: it is moved once, and expanded again."""
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0:
            tensor = tensor.narrow(d, 0, min(1, size))
    return tensor


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions, the one with the largest stride first."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda d: -strides[d])


def scatter_rows_definition(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    """The definition of :func:`scatter_rows`."""
    # index_select refuses what counts from the end.
    places = index if positions is None else positions.index_select(0, index)
    output.index_copy_(0, places, rows[index].to(output.dtype))


def gather_and_scatter_rows_definition(
    order: Tensor | None,
    positions: Tensor,
    num_kept: Tensor | None,
    count: Tensor,
    kept: RowPairs,
    exited: RowPairs,
) -> None:
    """The definition of :func:`cet.ops.padded.gather_and_scatter_rows`."""
    place = torch.arange(len(positions), device=positions.device)
    order_of_kept = order_of_exited = place.int()
    is_exiting = place < count
    is_kept = torch.zeros_like(place, dtype=torch.bool) if num_kept is None else place < num_kept
    if order is not None and num_kept is not None:
        is_exiting = place < count - num_kept
        # Of a kernel's order the rest is undefined, and may be no row.
        order_of_kept, order_of_exited = order.masked_fill(~torch.stack([is_kept, is_exiting]), 0).unbind()
    for source, target in kept:
        first = target[: len(place)]
        first.copy_(torch.where(_per_row(is_kept, source), source[order_of_kept], first))
    for source, target in exited:
        capacity = len(target)
        # Rows that do not leave share one entry behind the last, where it does not matter who comes second.
        entry = torch.where(is_exiting, positions[order_of_exited], capacity).long()
        origin = order_of_exited.new_full((capacity + 1,), -1).scatter(0, entry, order_of_exited)[:-1]
        target.copy_(torch.where(_per_row(origin >= 0, source), source[origin.clamp(min=0)], target))


def _per_row(flags: Tensor, rows: Tensor) -> Tensor:
    return flags.view(-1, *(1,) * (rows.ndim - 1))
