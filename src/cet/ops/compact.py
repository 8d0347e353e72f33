"""Compaction: the rows that stay are moved together in their order, those that leave are written to the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cet.ops.backend import (
    is_tracing,
    kernels_for,
    needs_grad,
    no_tensor,
    runs_on_triton,
    traced_backend,
    triton_kernels,
)

KEPT_MEMORY = (32 << 20) - 4096
"""Bytes up to which glibc keeps freed memory; larger allocations are mapped afresh, page by page when written."""

_MAX_ROWS = 2**31 - 1  # what the kernels of every device can count


class Compaction(NamedTuple):
    """What :func:`compact` returns.

    Attributes:
        staying: ``(N,)`` int64, the rows that stay, ascending.
        leaving: ``(B - N,)`` int64, the rows that leave, ascending.
        tensors: the given tensors with the ``N`` rows that stay.
    """

    staying: Tensor
    leaving: Tensor
    tensors: list[Tensor]


def compact_reference(leaves: Tensor, tensors: Sequence[Tensor], dims: Sequence[int]) -> Compaction:
    """The definition of :func:`compact`."""
    staying, leaving = (~leaves).nonzero().squeeze(1), leaves.nonzero().squeeze(1)
    moved = [_take(tensor, dim, staying) for tensor, dim in zip(tensors, dims, strict=True)]
    return Compaction(staying, leaving, moved)


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor.index_select(dim, index)
    core = _without_repeats(tensor)
    order = memory_order(core)
    if tensor.stride(dim) != 0:
        core = core.permute(order).index_select(order.index(dim), index)
        core = core.permute(sorted(range(tensor.ndim), key=order.__getitem__))
    return core.expand(*tensor.shape[:dim], index.numel(), *tensor.shape[dim + 1 :])


def _without_repeats(tensor: Tensor) -> Tensor:
    """What is expanded is one and the same along that dimension: it is moved once, and expanded again."""
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0:
            tensor = tensor.narrow(d, 0, min(1, size))
    return tensor


def memory_order(tensor: Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda d: -strides[d])


def _compact_cpp(
    kernels: Any, leaves: Tensor, tensors: Sequence[Tensor], dims: Sequence[int], *, may_alias: bool
) -> Compaction:
    rows = leaves.shape[0]
    order = leaves.new_empty(rows, dtype=torch.int64)
    flags = leaves.contiguous()  # by name, or a copy would be freed before it is read
    count = kernels.partition(flags.data_ptr(), rows, order.data_ptr())
    staying, leaving = split(order, count)
    if count == rows and may_alias:
        return Compaction(staying, leaving, list(tensors))
    return Compaction(staying, leaving, move(kernels, tensors, dims, staying))


def split(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` entries and the others."""
    rows = order.shape[0]
    if count == 0:
        return order.new_empty(0), order
    if count == rows:
        return order, order.new_empty(0)
    staying, leaving = order.split_with_sizes((count, rows - count))
    return staying, leaving


def move(kernels: Any, tensors: Sequence[Tensor], dims: Sequence[int], staying: Tensor) -> list[Tensor]:
    """The rows ``staying`` of each tensor, in new memory."""
    count = staying.shape[0]
    moved, moves = [], []
    for tensor, dim in zip(tensors, dims, strict=True):
        contiguous = tensor.is_contiguous()
        row_bytes = tensor.numel() * tensor.element_size() // max(tensor.shape[dim], 1)
        if contiguous and count * row_bytes < KEPT_MEMORY:
            # A microsecond of torch's, which the kernels beat only on strided and on fresh memory.
            moved.append(tensor.index_select(dim, staying))
            continue
        if needs_grad((tensor,)) or (not contiguous and tensor.stride(dim) == 0):
            moved.append(_take(tensor, dim, staying))
            continue
        source = tensor
        shape = (*tensor.shape[:dim], count, *tensor.shape[dim + 1 :])
        if contiguous:
            target = result = tensor.new_empty(*shape)
        else:
            source = _without_repeats(tensor)
            sizes = (*source.shape[:dim], count, *source.shape[dim + 1 :])
            target = torch.empty_permuted(sizes, memory_order(source), dtype=tensor.dtype, device=tensor.device)
            result = target.expand(*shape)
        moved.append(result)
        if count > 0:
            strides = source.stride(), target.stride()
            moves.append((source.data_ptr(), target.data_ptr(), tensor.element_size(), target.shape, *strides, dim))
    if moves:
        kernels.take_rows(moves, staying.data_ptr(), torch.get_num_threads())
    return moved


def _compact(leaves: Tensor, tensors: Sequence[Tensor], dims: Sequence[int], *, may_alias: bool) -> Compaction:
    if runs_on_triton("compact", (leaves, *tensors)) and not needs_grad(tensors):
        compaction: Compaction = triton_kernels("compact").compact(leaves, tensors, dims)
        return compaction
    kernels = kernels_for("compact", (leaves, *tensors))
    if kernels is None:
        return compact_reference(leaves, tensors, dims)
    return _compact_cpp(kernels, leaves, tensors, dims, may_alias=may_alias)


# staying, leaving and the tensors in one list: what a custom operator can return.
@torch.library.custom_op("cet::compact", mutates_args=())
def _compact_op(leaves: Tensor, tensors: list[Tensor], dims: list[int]) -> list[Tensor]:
    staying, leaving, moved = _compact(leaves, tensors, dims, may_alias=False)
    return [staying, leaving.clone(), *moved]  # of one memory, which an operator's outputs must not share


@_compact_op.register_fake
def _(leaves: Tensor, tensors: list[Tensor], dims: list[int]) -> list[Tensor]:
    context = torch.library.get_ctx()
    staying, leaving = (leaves.new_empty((context.new_dynamic_size(),), dtype=torch.int64) for _ in range(2))
    torch._check(staying.shape[0] + leaving.shape[0] == leaves.shape[0])  # type: ignore[no-untyped-call]
    return [staying, leaving, *(_take(tensor, dim, staying) for tensor, dim in zip(tensors, dims, strict=True))]


def compact(leaves: Tensor, tensors: Sequence[Tensor], dims: Sequence[int] | None = None) -> Compaction:
    """Keep the rows that stay, in their order.

    The outputs keep the memory layout of the inputs (a channels-last tensor stays channels-last, a transposed one
    transposed), because later operations may rely on it, as ``view`` does, or be faster with it, as convolutions are.
    Where all rows stay, an eager call may return the tensors themselves. Gradients flow through the tensors.

    Args:
        leaves: ``(B,)`` bool, true for the rows that leave.
        tensors: any number of tensors of any dtype with ``B`` rows each.
        dims: for each tensor the dimension that holds the rows; 0 for all when not given.

    Raises:
        ValueError: when a tensor has another number of rows or is on another device than ``leaves``, or ``dims`` does
            not name a dimension of each tensor.
        TypeError: for ``leaves`` of another dtype.
    """
    if dims is None:
        dims = (0,) * len(tensors)
    _check_leaves(leaves)
    check_rows("compact", leaves.shape[0], leaves.device, tensors, dims)
    if not is_tracing():
        return _compact(leaves, tensors, dims, may_alias=True)
    if traced_backend(leaves.device.type) != "reference" and not needs_grad(tensors):
        staying, leaving, *moved = _compact_op(leaves, list(tensors), list(dims))
        return Compaction(staying, leaving, moved)
    return compact_reference(leaves, tensors, dims)


def _check_leaves(leaves: Tensor) -> None:
    if not isinstance(leaves, Tensor):
        raise no_tensor("compact", "leaves", leaves)
    if leaves.dtype is not torch.bool:
        raise TypeError(f"compact: leaves are {leaves.dtype}; give bool flags")
    if leaves.ndim != 1 or leaves.shape[0] > _MAX_ROWS:
        raise ValueError(f"compact: leaves have shape {tuple(leaves.shape)}; give (B,), at most 2^31 - 1 rows")


def check_rows(op: str, rows: int, device: torch.device, tensors: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Refuse tensors that do not hold so many rows where ``dims`` says."""
    if len(dims) != len(tensors):
        raise ValueError(f"{op}: {len(dims)} dims for {len(tensors)} tensors; give one per tensor")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise no_tensor(op, f"tensors[{index}]", tensor)
        dim = dims[index]
        if not 0 <= dim < tensor.ndim or tensor.shape[dim] != rows:
            raise ValueError(
                f"{op}: tensors[{index}] has shape {tuple(tensor.shape)}, whose dimension {dim} does not hold {rows} "
                "rows; give tensors with one row per flag, and in dims, counted from 0, where they are"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: tensors[{index}] is on {tensor.device}, the flags on {device}; move one")


def put_rows_reference(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    """The definition of :func:`put_rows`."""
    output.index_copy_(0, index if positions is None else positions[index], rows[index].to(output.dtype))


def _put_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    indices = (index,) if positions is None else (index, positions)
    on_triton = runs_on_triton("put_rows", (output, rows, *indices))
    kernels = triton_kernels("compact") if on_triton else kernels_for("put_rows", (output, rows, *indices))
    together = all(tensor.is_contiguous() for tensor in (output, rows, *indices))
    # Where torch refuses to write to a tensor of the inference mode, so does this.
    refused = output.is_inference() and not torch.is_inference_mode_enabled()
    if kernels is None or not together or rows.dtype != output.dtype or refused or needs_grad((output, rows)):
        put_rows_reference(output, rows, index, positions)
        return
    if on_triton:
        kernels.put_rows(output, rows, index, positions)
    else:
        row_bytes = output.element_size() * math.prod(output.shape[1:])
        where = 0 if positions is None else positions.data_ptr()
        kernels.put_rows(
            rows.data_ptr(),
            rows.shape[0],
            output.data_ptr(),
            output.shape[0],
            row_bytes,
            index.data_ptr(),
            len(index),
            where,
        )
    if not output.is_inference():
        increment_version(output)


@torch.library.custom_op("cet::put_rows", mutates_args=("output",))
def _put_rows_op(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    _put_rows(output, rows, index, positions)


@_put_rows_op.register_fake
def _(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    pass


def put_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None = None) -> None:
    """Write finished rows to the output: ``output[positions[index]] = rows[index]``.

    Args:
        output: ``(B, ...)``, changed in place; gradients flow through it.
        rows: ``(n, ...)``, cast to the dtype of ``output``.
        index: ``(m,)`` int64 in ``[0, n)``, the rows to write, each at most once.
        positions: ``(n,)`` int64 in ``[0, B)``, where each of ``rows`` belongs; ``None`` where that is its own index.

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: for indices that are not int64.
        IndexError: for an index or a position out of range, before anything is written.
    """
    for name, given in (("output", output), ("rows", rows), ("index", index)):
        if not isinstance(given, Tensor):
            raise no_tensor("put_rows", name, given)
    if rows.shape[1:] != output.shape[1:]:
        raise ValueError(
            f"put_rows: rows are {tuple(rows.shape)}, output is {tuple(output.shape)}; give rows of its shape"
        )
    for name, tensor in (("index", index), ("positions", positions)):
        if tensor is not None and tensor.dtype is not torch.int64:
            raise TypeError(f"put_rows: {name} is {tensor.dtype}; give int64")
    if positions is not None and positions.shape != rows.shape[:1]:
        raise ValueError(f"put_rows: positions are {tuple(positions.shape)} for {rows.shape[0]} rows; give one per row")
    if not is_tracing():
        _put_rows(output, rows, index, positions)
    elif traced_backend(output.device.type) != "reference" and not needs_grad((output, rows)):
        _put_rows_op(output, rows, index, positions)
    else:
        put_rows_reference(output, rows, index, positions)
