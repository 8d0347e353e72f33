"""What launching a kernel takes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

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


_MOST_PROGRAMS = (1 << 31) - 1  # of more Triton's launcher starts none, without a word
_MOST_COMPILED = 4096
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """``kernel[(programs,)](*args, num_warps=num_warps, **constants)``, in less time where such arguments were seen.

    Triton looks at each argument in each call, and asks the driver about each address. All that a kernel is compiled
    for is compared here: dtypes, whether addresses are multiples of 16, and whole numbers, of which Triton only asks
    whether they are 1 or multiples of 16.

    Raises:
        ValueError: for more programs than a launch has.
    """
    if programs > _MOST_PROGRAMS:
        raise ValueError(f"a launch of {programs} programs is more than a GPU takes; give smaller batches")
    if is_interpreted():
        kernel[(programs,)](*args, num_warps=num_warps, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    key = [kernel, device, num_warps, *constants.values()]
    numbers = _numbers_of(args, kernel.params, key)
    compiled = _compiled.get(tuple(key))
    if compiled is None:
        assert [*constants] == kernel.arg_names[len(args) :], "constants are given in another order"
        if len(_compiled) == _MOST_COMPILED:
            _compiled.clear()
        _compiled[tuple(key)] = kernel[(programs,)](*args, num_warps=num_warps, **constants)
        return
    stream = active.get_current_stream(device)
    values = *numbers, *constants.values()
    about = compiled.launch_metadata((programs,), stream, *values)
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, about, *hooks, *values)


def _numbers_of(args: tuple[Any, ...], params: Any, key: list[Any]) -> tuple[Any, ...]:
    """The arguments with addresses for tensors, and into ``key`` what their kernel was compiled for. Of numbers for
    which nothing is compiled, as ``params`` tells, it is only asked whether they have 32 bits."""
    numbers = []
    for index, arg in enumerate(args):
        kind = type(arg)
        if arg is None or kind is float:
            key.append(kind)
        elif kind is int:
            key.append(arg >> 31 if params is not None and params[index].do_not_specialize else arg)
        elif isinstance(arg, tuple):
            key.append(len(arg))
            arg = _numbers_of(arg, None, key)
        else:
            dtype = arg.dtype
            arg = arg.data_ptr()
            key += dtype if isinstance(dtype, torch.dtype) else dtype.name, arg & 15 == 0
        numbers.append(arg)
    return tuple(numbers)
