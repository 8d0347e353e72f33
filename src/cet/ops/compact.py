"""Compaction: the rows that stay, moved together in their order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def compact(index: Tensor, tensors: Sequence[Tensor], dims: Sequence[int] | None = None) -> list[Tensor]:
    """Keep the rows ``index`` of each of ``tensors``.

    The outputs keep the memory layout of the inputs (a channels-last tensor stays channels-last, a transposed one
    transposed), because later operations may rely on it, as ``view`` does, or be faster with it, as convolutions are.

    Args:
        index: ``(N,)`` int64, the rows to keep, ascending.
        tensors: any number of tensors of any dtype.
        dims: for each tensor the dimension that holds the rows; 0 for all when not given.

    Returns:
        A list of new tensors with ``N`` rows each.
    """
    if dims is None:
        return [_take(tensor, 0, index) for tensor in tensors]
    return [_take(tensor, dim, index) for tensor, dim in zip(tensors, dims, strict=True)]


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor.index_select(dim, index)
    shape, strides = tensor.shape, tensor.stride()
    # What is expanded is one and the same along that dimension: it is moved once, and expanded again.
    for d in range(tensor.ndim):
        if strides[d] == 0:
            tensor = tensor.narrow(d, 0, min(1, shape[d]))
    order = sorted(range(tensor.ndim), key=lambda d: -strides[d])
    if strides[dim] != 0:
        tensor = tensor.permute(order).index_select(order.index(dim), index)
        tensor = tensor.permute(sorted(range(tensor.ndim), key=order.__getitem__))
    return tensor.expand(*shape[:dim], index.numel(), *shape[dim + 1 :])
