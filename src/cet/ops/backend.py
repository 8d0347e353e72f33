"""Backends: what a user chose to run the operations, what is installed, and what is asked of tensors everywhere.

Left to itself an operation on CPU tensors runs on the compiled kernels, where these are installed and can take them,
and every other on the reference. The Triton kernels serve where they are chosen, and within CUDA graphs, where a launch
costs the host nothing; launched from Python they took 0.66 to 1.1 of eager PyTorch's speed (docs/gpu.md).
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from cet._C import Kernels

Function = TypeVar("Function", bound=Callable[..., Any])

Backend = Literal["reference", "cpp", "triton"]

CAPABILITY_VARIABLE = "CET_CPU_CAPABILITY"

CHOSEN: ContextVar[Backend | None] = ContextVar("cet_backend", default=None)
PREFERRED: ContextVar[Backend | None] = ContextVar("cet_preferred_backend", default=None)


class use_backend:  # noqa: N801 (a function to its users, as torch.no_grad)
    """Choose the backend of :mod:`cet.ops`, from now on or for a ``with`` block.

    The choice holds for the current thread and context (:mod:`contextvars`).

    Args:
        name: ``"reference"``, plain PyTorch; ``"cpp"``, the compiled kernels, for CPU tensors; or ``"triton"``, those
            for CUDA tensors, which Triton's interpreter (``TRITON_INTERPRET=1``) runs on CPU tensors too. An operation
            then raises for tensors that the chosen backend cannot read. Steps for which it has no kernel, such as those
            that need gradients, are taken by PyTorch, as :func:`cet.ops.explain` tells. ``None`` leaves the choice to
            each call, as at first.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for ``"cpp"`` where cet was installed without its kernels, and for ``"triton"`` without Triton, or
            with neither a CUDA device nor the interpreter.
    """

    def __init__(self, name: Backend | None) -> None:
        if name is not None and name not in get_args(Backend):
            raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(get_args(Backend))}, or None")
        if name == "cpp" and kernels() is None:
            raise RuntimeError(
                "backend 'cpp' cannot run: cet was installed without its compiled kernels; "
                "install it with a C++17 compiler and CET_BUILD_CPP=1"
            )
        if name == "triton" and not has_triton():
            raise RuntimeError("backend 'triton' cannot run: the package triton is not installed; install it")
        if name == "triton" and not (torch.cuda.is_available() or interprets_triton()):
            raise RuntimeError(
                "backend 'triton' cannot run: there is no CUDA device; to interpret the kernels on CPU tensors, start "
                "Python with TRITON_INTERPRET=1 in the environment"
            )
        self._name, self._before = name, CHOSEN.get()
        CHOSEN.set(name)

    def __enter__(self) -> None:
        CHOSEN.set(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        CHOSEN.set(self._before)


@cache
def has_cpp() -> bool:
    """Whether the compiled kernels are installed."""
    return importlib.util.find_spec("cet._C") is not None


@cache
def kernels() -> Kernels | None:
    """The kernels for this processor, ``None`` where cet was installed without them.

    The variable ``CET_CPU_CAPABILITY``, read once, names a set of instructions to use instead of the best.

    Raises:
        ValueError: when the variable names one that this build or processor lacks.
    """
    if not has_cpp():
        return None
    from cet._C import capabilities
    from cet._C import kernels as kernels_of

    available = capabilities()
    capability = os.environ.get(CAPABILITY_VARIABLE) or available[-1]
    if capability not in available:
        raise ValueError(f"{CAPABILITY_VARIABLE} is {capability!r}; choose one of {', '.join(available)}")
    return kernels_of(capability)


@cache
def cuda_extension() -> Any:
    """The CUDA part of cet, ``None`` where it was installed without it."""
    if importlib.util.find_spec("cet._cuda") is None:
        return None
    import cet._cuda as extension

    return extension


@contextmanager
def preferring_triton(device: torch.device) -> Iterator[None]:
    """Within, calls for which no backend was chosen run on Triton's kernels, where these work and can take them."""
    token = PREFERRED.set("triton" if why_no_triton(device) is None else None)
    try:
        yield
    finally:
        PREFERRED.reset(token)


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels do not work on a device, found by a launch of each that a graph may hold; ``None`` where
    they do.

    What lies in the environment, as a compiler that Triton lacks, is told in a warning too, once.
    """
    try:
        return _why_no_triton(device)
    except torch.OutOfMemoryError:  # which is not kept: there may be more another time
        return f"{device} has no memory left to try its kernels; free some"


@cache
def _why_no_triton(device: torch.device) -> str | None:
    if not has_triton():
        return "the package triton is not installed; install it"
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{device} is older than compute capability 8.0, which the kernels need"
    try:
        _launch_on(device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # the second is of work that came before
        raise
    except Exception as error:  # whatever it is, nothing was launched, and there is another way
        message = (str(error).splitlines() or [""])[0]
        if "out of memory" in message:  # as Triton tells it
            raise torch.OutOfMemoryError(message) from error
        reason = (
            f"its kernels cannot be launched on {device} ({type(error).__name__}: {message}); cet doctor tells more"
        )
        warnings.warn(f"backend 'triton': {reason}", RuntimeWarning, stacklevel=3)
        return reason
    return None


def _launch_on(device: torch.device) -> None:
    from cet.kernels import compact
    from cet.ops.exit_gate import triton

    numbers, logits = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(1, 2, device=device)
    compact.order_rows_into(numbers[:1].bool(), numbers[:2], numbers[2])
    triton.gate(logits, "entropy", 0.5, 1.0)
    triton.exit_gate(logits[..., None], logits, None, "channels_first", "mean", "entropy", 0.5, 1.0)


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton, which must be installed, interprets its kernels, on CPU tensors."""
    from cet.kernels import launch

    return bool(launch.is_interpreted())


def chosen_backend() -> Backend | None:
    """What :class:`use_backend` chose."""
    return CHOSEN.get()


def constant_in_graphs(function: Function) -> Function:
    """Mark a function as :func:`torch.compiler.assume_constant_result` does, which would import all of torch.compile:
    as much again as torch itself takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def traced_backend(device_type: str) -> Backend:
    """What a traced call is recorded as: the custom operator, or, for ``"reference"``, its plain operations."""
    chosen = CHOSEN.get()
    if chosen is not None:
        return chosen
    return "reference" if device_type != "cpu" or kernels() is None else "cpp"


def is_tracing() -> bool:
    """Whether calls of this thread are being recorded: by ``torch.compile``, ``torch.export`` or a dispatch mode.

    ``torch.compiler.is_compiling`` and ``is_exporting`` are true in every thread while one of them exports.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def is_transforming() -> bool:
    """Whether calls go through ``torch.func`` or carry tangents: both are plain PyTorch's business."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def no_tensor(op: str, name: str, value: object) -> TypeError:
    """The error for what is no tensor."""
    return TypeError(f"{op}: {name} is a {type(value).__name__}; give a tensor")


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd would record an operation on them."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
