"""What launching a kernel takes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest load and store of a thread


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors.

    Triton's own functions tell, as they are made when it is imported: later ``TRITON_INTERPRET=1`` has no effect.
    """
    return not isinstance(tl.sum, triton.JITFunction)


def runs_one_by_one() -> bool:
    """Whether a program that waits for another one of its launch would wait for ever, as in the interpreter."""
    return is_interpreted()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device and its current stream: make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of one where there is none, so that few programs are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def alignment(itemsize: int, *extents: int) -> int:
    """The most elements that a thread can load at once where rows and strides are these multiples."""
    return math.gcd(VECTOR_BYTES // itemsize, *extents)


def block_size(extent: int, largest: int, smallest: int = 1) -> int:
    """The power of two that covers the extent, within limits."""
    return max(smallest, min(largest, 1 << (max(1, extent) - 1).bit_length()))
