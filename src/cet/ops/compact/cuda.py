"""Compaction of padded batches by the CUDA part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cet.ops.backend import cuda_extension
from cet.ops.compact.definition import RowPairs


def gather_and_scatter_rows(
    order: Tensor, positions: Tensor, num_kept: Tensor, count: Tensor, kept: RowPairs, exited: RowPairs
) -> None:
    """See :func:`cet.ops.padded.gather_and_scatter_rows`."""
    moves = []
    for pairs, is_exiting in ((kept, False), (exited, True)):
        for source, target in pairs:
            itemsize = source.element_size()
            strides = source.stride(0) * itemsize, target.stride(0) * itemsize
            row_bytes = math.prod(source.shape[1:]) * itemsize
            moves.append((source.data_ptr(), target.data_ptr(), *strides, row_bytes, is_exiting))
    addresses = [tensor.data_ptr() for tensor in (order, positions, num_kept, count)]
    stream = torch.cuda.current_stream(order.device).cuda_stream
    cuda_extension().gather_and_scatter_rows(order.device.index, stream, moves, *addresses, len(order))
