"""Which code runs an operation: the reference in plain PyTorch, or kernels.

Left to itself an operation on CPU tensors runs on the compiled kernels, where these are installed and can take them,
and every other on the reference. The Triton kernels serve where they are chosen: they have not run on a GPU yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Collection, Iterable, Sequence
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Backend = Literal["reference", "cpp", "triton"]

CAPABILITY_VARIABLE = "CET_CPU_CAPABILITY"

_chosen: ContextVar[Backend | None] = ContextVar("cet_backend", default=None)


class use_backend:  # noqa: N801 (a function to its users, as torch.no_grad)
    """Choose the backend of :mod:`cet.ops`, from now on or for a ``with`` block.

    The choice holds for the current thread and context (:mod:`contextvars`).

    Args:
        name: ``"reference"``, plain PyTorch; ``"cpp"``, the compiled kernels, for CPU tensors; or ``"triton"``, those
            for CUDA tensors, which Triton's interpreter (``TRITON_INTERPRET=1``) runs on CPU tensors too. An operation
            that the chosen backend cannot run then raises. ``None`` leaves the choice to each call, as at first.

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
        if name == "triton" and not (torch.cuda.is_available() or triton_kernels().is_interpreted()):
            raise RuntimeError(
                "backend 'triton' cannot run: there is no CUDA device; to interpret the kernels on CPU tensors, start "
                "Python with TRITON_INTERPRET=1 in the environment"
            )
        self._name, self._before = name, _chosen.get()
        _chosen.set(name)

    def __enter__(self) -> None:
        _chosen.set(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.set(self._before)


@cache
def kernels() -> Any:
    """The kernels for this processor, ``None`` where cet was installed without them.

    The variable ``CET_CPU_CAPABILITY``, read once, names a set of instructions to use instead of the best.

    Raises:
        ValueError: when the variable names one that this build or processor lacks.
    """
    if importlib.util.find_spec("cet._C") is None:
        return None
    extension = importlib.import_module("cet._C")
    available = extension.capabilities()
    capability = os.environ.get(CAPABILITY_VARIABLE) or available[-1]
    if capability not in available:
        raise ValueError(f"{CAPABILITY_VARIABLE} is {capability!r}; choose one of {', '.join(available)}")
    return extension.kernels(capability)


@cache
def cuda_extension() -> Any:
    """The CUDA part of cet, ``None`` where it was installed without it."""
    return importlib.import_module("cet._cuda") if importlib.util.find_spec("cet._cuda") else None


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def triton_kernels(op: str | None = None) -> Any:
    """The module of an operation's Triton kernels, or of what they share."""
    return importlib.import_module("cet.kernels" if op is None else f"cet.kernels.{op}")


def chosen_backend() -> Backend | None:
    """What :class:`use_backend` chose."""
    return _chosen.get()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traced_backend(device_type: str) -> Backend:
    """What a traced call is recorded as: the custom operator, or, for ``"reference"``, its plain operations."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return "reference" if device_type != "cpu" or kernels() is None else "cpp"


def is_tracing() -> bool:
    """Whether calls are being recorded: by ``torch.compile``, ``torch.export`` or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def is_transforming() -> bool:
    """Whether calls go through ``torch.func`` or carry tangents: both are plain PyTorch's business."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def kernels_for(op: str, tensors: Sequence[Tensor], dtypes: Collection[torch.dtype] | None = None) -> Any:
    """The kernels if a call with these tensors runs on them, ``None`` if it runs on the reference.

    Raises:
        ValueError: when ``"cpp"`` was chosen and cannot take the tensors.
    """
    chosen = _chosen.get()
    if chosen is not None and chosen != "cpp":
        return None
    available = kernels()
    if available is None:
        return None
    if is_transforming():
        if chosen == "cpp":
            raise _no_transforms(op, "cpp")
        return None
    for tensor in tensors:
        if not (tensor.is_cpu and _is_plain(tensor, dtypes)):
            if chosen == "cpp":
                raise _cannot_take(op, "cpp", "CPU", tensor, dtypes)
            return None
    return available


def runs_on_triton(op: str, tensors: Sequence[Tensor], dtypes: Collection[torch.dtype] | None = None) -> bool:
    """Whether a call with these tensors runs on the Triton kernels.

    Raises:
        ValueError: when ``"triton"`` was chosen and cannot take the tensors.
    """
    if _chosen.get() != "triton":
        return False
    if is_transforming():
        raise _no_transforms(op, "triton")
    device = tensors[0].device
    for tensor in tensors:
        reachable = tensor.is_cuda or (tensor.is_cpu and triton_kernels().is_interpreted())
        if not (reachable and tensor.device == device and _is_plain(tensor, dtypes)):
            raise _cannot_take(op, "triton", "CUDA", tensor, dtypes)
    return True


def _is_plain(tensor: Tensor, dtypes: Collection[torch.dtype] | None) -> bool:
    """Whether it can be read at its address as its shape and strides say."""
    return (
        (type(tensor) is Tensor or type(tensor) is nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and (tensor.dtype in dtypes if dtypes is not None else not tensor.is_conj())
    )


def _no_transforms(op: str, backend: Backend) -> ValueError:
    return ValueError(f"{op}: backend {backend!r} knows no torch.func and no tangents; use use_backend('reference')")


def _cannot_take(
    op: str, backend: Backend, devices: str, tensor: Tensor, dtypes: Collection[torch.dtype] | None
) -> ValueError:
    wanted = f" of {', '.join(map(str, dtypes))}" if dtypes else ""
    return ValueError(
        f"{op}: backend {backend!r} cannot take a {tensor.dtype} {type(tensor).__name__} on {tensor.device} with "
        f"layout {tensor.layout}; give strided {devices} tensors{wanted}, all on one device, or "
        "use_backend('reference')"
    )


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
