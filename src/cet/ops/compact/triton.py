"""Compaction on Triton's kernels, which are imported when a call needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from cet.kernels.compact import RowMove


_MUCH_ROOM = 8


def compact(exit_mask: Tensor, tensors: Sequence[Tensor], dims: Sequence[int]) -> Compaction:
    """See :func:`cet.ops.compact`."""
    from cet.kernels import compact as kernels

    row_order = RowOrder.empty(exit_mask)
    kernels.order_rows_into(exit_mask.contiguous(), *row_order)
    rows = exit_mask.shape[0]
    gathering = Gathering(rows, tensors, dims)
    kernels.moves_into(gathering.moves, [], rows, row_order.order, None, row_order.num_kept, None)
    return gathering.finish(row_order)


class Gathering:
    """Where kept rows go whose number only the device knows.

    Attributes:
        moves: of the tensors whose first rows, in a target for all rows, have the strides that those of the right size
            have. They move before the host waits for the number.
    """

    def __init__(self, rows: int, tensors: Sequence[Tensor], dims: Sequence[int]) -> None:
        from cet.kernels import compact as kernels

        self._rows, self._tensors, self._dims = rows, tensors, dims
        self.moves: list[tuple[RowMove, int]] = []
        self._targets: list[Tensor | None] = []
        for tensor, dim in zip(tensors, dims, strict=True):
            source, target = tensor, None
            if dim == 0 and tensor.is_contiguous():
                target = torch.empty_like(tensor) if tensor.stride(0) != 0 else None
            else:
                source = without_repeats(tensor)
                if tensor.stride(dim) != 0 and memory_order(source)[0] == dim:
                    target = _room(source, dim, rows)
            if target is not None:
                move = kernels.as_move(source, target, dim)
                if move is None:
                    target = None
                elif target.numel() > 0:
                    self.moves.append(move)
            self._targets.append(target)

    def finish(self, row_order: RowOrder) -> Compaction:
        """Wait, once, for the number of rows, cut the targets off behind them, and move what has none."""
        kept, exited = row_order.trimmed()
        count = kept.shape[0]
        moved = []
        for tensor, dim, target in zip(self._tensors, self._dims, self._targets, strict=True):
            if target is None:
                moved.append(_gather(tensor, dim, row_order, kept))
                continue
            first = target.narrow(dim, 0, count)
            # Few rows do not hold on to the memory of many.
            first = first.clone() if _MUCH_ROOM * count <= self._rows else first
            moved.append(first.expand(*tensor.shape[:dim], count, *tensor.shape[dim + 1 :]))
        return Compaction(kept, exited, moved)


def _room(source: Tensor, dim: int, rows: int) -> Tensor:
    """For so many rows, laid out as the source."""
    shape = (*source.shape[:dim], rows, *source.shape[dim + 1 :])
    return torch.empty_permuted(shape, memory_order(source), dtype=source.dtype, device=source.device)


def _gather(tensor: Tensor, dim: int, row_order: RowOrder, kept: Tensor) -> Tensor:
    """The kept rows; what the row copy cannot describe, PyTorch's operations move."""
    from cet.kernels import compact as kernels

    source = without_repeats(tensor)
    count = kept.shape[0]
    target = _room(source, dim, count)
    move = None if tensor.stride(dim) == 0 else kernels.as_move(source, target, dim)
    if move is None:
        return gather_definition(tensor, dim, kept)
    if target.numel() > 0:
        kernels.moves_into([move], [], count, row_order.order, None, row_order.num_kept, None)
    return target.expand(*tensor.shape[:dim], count, *tensor.shape[dim + 1 :])


def scatter_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    """See :func:`cet.ops.scatter_rows`; of contiguous tensors."""
    from cet.kernels import compact as kernels

    kernels.scatter_rows(output, rows, index, positions)


def gather_and_scatter_rows(
    order: Tensor | None,
    positions: Tensor,
    num_kept: Tensor | None,
    count: Tensor,
    kept: RowPairs,
    exited: RowPairs,
) -> None:
    """See :func:`cet.ops.padded.gather_and_scatter_rows`."""
    from cet.kernels import compact as kernels

    moves = kernels.moves_of(kept), kernels.moves_of(exited)
    kernels.moves_into(*moves, len(positions), order, positions, num_kept, count)
