"""Compaction on the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cet.ops import backend
from cet.ops.backend import needs_grad
from cet.ops.compact.definition import Compaction, gather_definition, memory_order, split_order, without_repeats

KEPT_MEMORY = (32 << 20) - 4096
"""Bytes up to which glibc keeps freed memory; larger allocations are mapped afresh, page by page when written."""


def order_rows(exit_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kept and the exited indices, see :class:`Compaction`."""
    rows = exit_mask.shape[0]
    order = exit_mask.new_empty(rows, dtype=torch.int64)
    flags = exit_mask.contiguous()  # by name, or a copy would be freed before it is read
    num_kept = backend.kernels().order_rows(flags.data_ptr(), rows, order.data_ptr())  # type: ignore[union-attr]
    return split_order(order, num_kept)


def compact(exit_mask: Tensor, tensors: Sequence[Tensor], dims: Sequence[int], *, may_alias: bool = True) -> Compaction:
    """See :func:`cet.ops.compact`. With ``may_alias`` a call that keeps all rows returns the tensors themselves."""
    kept, exited = order_rows(exit_mask)
    if may_alias and exited.shape[0] == 0:
        return Compaction(kept, exited, list(tensors))
    return Compaction(kept, exited, gather_rows(tensors, dims, kept))


def gather_rows(tensors: Sequence[Tensor], dims: Sequence[int], index: Tensor) -> list[Tensor]:
    """The rows ``index`` of each tensor, in new memory."""
    count = index.shape[0]
    gathered, moves = [], []
    for tensor, dim in zip(tensors, dims, strict=True):
        contiguous = tensor.is_contiguous()
        row_bytes = tensor.numel() * tensor.element_size() // max(tensor.shape[dim], 1)
        if contiguous and count * row_bytes < KEPT_MEMORY:
            # A microsecond of torch's, which the kernels beat only on strided and on fresh memory.
            gathered.append(tensor.index_select(dim, index))
            continue
        if needs_grad((tensor,)) or (not contiguous and tensor.stride(dim) == 0):
            gathered.append(gather_definition(tensor, dim, index))
            continue
        source = tensor
        shape = (*tensor.shape[:dim], count, *tensor.shape[dim + 1 :])
        if contiguous:
            target = result = tensor.new_empty(*shape)
        else:
            source = without_repeats(tensor)
            sizes = (*source.shape[:dim], count, *source.shape[dim + 1 :])
            target = torch.empty_permuted(sizes, memory_order(source), dtype=tensor.dtype, device=tensor.device)
            result = target.expand(*shape)
        gathered.append(result)
        if count > 0:
            strides = source.stride(), target.stride()
            moves.append((source.data_ptr(), target.data_ptr(), tensor.element_size(), target.shape, *strides, dim))
    if moves:
        backend.kernels().gather_rows(moves, index.data_ptr(), torch.get_num_threads())  # type: ignore[union-attr]
    return gathered


def scatter_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    """See :func:`cet.ops.scatter_rows`; of contiguous tensors."""
    backend.kernels().scatter_rows(  # type: ignore[union-attr]
        rows.data_ptr(),
        rows.shape[0],
        output.data_ptr(),
        output.shape[0],
        output.element_size() * math.prod(output.shape[1:]),
        index.data_ptr(),
        len(index),
        0 if positions is None else positions.data_ptr(),
    )
