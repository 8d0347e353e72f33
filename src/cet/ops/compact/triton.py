"""Compaction on Triton's kernels, which are imported when a call needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cet.ops.compact.definition import (
    Compaction,
    RowOrder,
    RowPairs,
    gather_definition,
    memory_order,
    without_repeats,
)


def order_rows(exit_mask: Tensor) -> RowOrder:
    """The order of all rows; the number kept stays on the device."""
    from cet.kernels import compact as kernels

    order = exit_mask.new_empty(exit_mask.shape, dtype=torch.int64)
    num_kept = exit_mask.new_empty((), dtype=torch.int64)
    kernels.order_rows_into(exit_mask.contiguous(), order, num_kept)
    return RowOrder(order, num_kept)


def compact(exit_mask: Tensor, tensors: Sequence[Tensor], dims: Sequence[int]) -> Compaction:
    """See :func:`cet.ops.compact`."""
    return compact_by(order_rows(exit_mask), tensors, dims)


def compact_by(row_order: RowOrder, tensors: Sequence[Tensor], dims: Sequence[int]) -> Compaction:
    """Compaction of rows that are in order already. It waits for the device once, to learn how many are kept.

    The copy is launched before that, into tensors for all rows, where cutting these off afterwards leaves the strides
    that tensors of the right size have.
    """
    order, num_kept = row_order
    assert isinstance(num_kept, Tensor)
    cut_off = all(memory_order(without_repeats(tensor))[0] == dim for tensor, dim in zip(tensors, dims, strict=True))
    gathered = gather_rows(tensors, dims, row_order, order.shape[0] if cut_off else int(num_kept))
    kept, exited = row_order.trimmed()
    count = kept.shape[0]
    return Compaction(kept, exited, [x.narrow(dim, 0, count) for x, dim in zip(gathered, dims, strict=True)])


def gather_rows(tensors: Sequence[Tensor], dims: Sequence[int], row_order: RowOrder, capacity: int) -> list[Tensor]:
    """New tensors for ``capacity`` rows, laid out as the given ones, of which the first are the kept rows.

    What the row copy cannot describe, PyTorch's operations move.
    """
    from cet.kernels import compact as kernels

    order, num_kept = row_order
    gathered, moves = [], []
    for tensor, dim in zip(tensors, dims, strict=True):
        source = without_repeats(tensor)
        shape = (*source.shape[:dim], capacity, *source.shape[dim + 1 :])
        target = torch.empty_permuted(shape, memory_order(source), dtype=tensor.dtype, device=tensor.device)
        move = None if tensor.stride(dim) == 0 else kernels.as_move(source, target, dim)
        if move is None:
            gathered.append(gather_definition(tensor, dim, order[:capacity]))
            continue
        gathered.append(target.expand(*tensor.shape[:dim], capacity, *tensor.shape[dim + 1 :]))
        if target.numel() > 0:
            moves.append(move)
    kernels.move_into(moves, [], capacity, order, None, num_kept, None)
    return gathered


def scatter_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    """See :func:`cet.ops.scatter_rows`; of contiguous tensors."""
    from cet.kernels import compact as kernels

    kernels.scatter_rows(output, rows, index, positions)


def gather_and_scatter_rows(
    order: Tensor, positions: Tensor, num_kept: Tensor, count: Tensor, kept: RowPairs, exited: RowPairs
) -> None:
    """See :func:`cet.ops.padded.gather_and_scatter_rows`."""
    from cet.kernels import compact as kernels

    kernels.gather_and_scatter_rows(order, positions, num_kept, count, kept, exited)
