"""Which code runs an operation: the reference in plain PyTorch, or the compiled kernels.

Left to itself an operation runs on the kernels where they are built and can take the tensors, else on the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Container, Iterable, Sequence
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Backend = Literal["reference", "cpp"]

CAPABILITY_VARIABLE = "CET_CPU_CAPABILITY"

_chosen: ContextVar[Backend | None] = ContextVar("cet_backend", default=None)


class use_backend:  # noqa: N801 (a function to its users, as torch.no_grad)
    """Choose the backend of :mod:`cet.ops`, from now on or for a ``with`` block.

    The choice holds for the current thread and context (:mod:`contextvars`).

    Args:
        name: ``"reference"``, plain PyTorch, or ``"cpp"``, the compiled kernels, for CPU tensors. An operation that the
            chosen backend cannot run then raises. ``None`` leaves the choice to each call, as in the beginning.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for ``"cpp"`` where cet was installed without its kernels.
    """

    def __init__(self, name: Backend | None) -> None:
        if name is not None and name not in get_args(Backend):
            raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(get_args(Backend))}, or None")
        if name == "cpp" and kernels() is None:
            raise RuntimeError(
                "backend 'cpp' cannot run: cet was installed without its compiled kernels; "
                "install it with a C++17 compiler and CET_BUILD_CPP=1"
            )
        self._token = _chosen.set(name)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.reset(self._token)


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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traced_backend() -> Backend:
    """What a traced call is recorded as: ``"cpp"``, the custom operator, or ``"reference"``, its plain operations."""
    return _chosen.get() or ("reference" if kernels() is None else "cpp")


def is_tracing() -> bool:
    """Whether calls are being recorded: by ``torch.compile``, ``torch.export`` or a dispatch mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def kernels_for(op: str, tensors: Sequence[Tensor], dtypes: Container[torch.dtype] | None = None) -> Any:
    """The kernels if a call with these tensors runs on them, ``None`` if it runs on the reference.

    Raises:
        ValueError: when ``"cpp"`` was chosen and cannot take the tensors.
    """
    chosen = _chosen.get()
    if chosen == "reference":
        return None
    available = kernels()
    if available is None:
        return None
    for tensor in tensors:
        # What can be read at an address as its shape and strides say.
        plain = (
            tensor.is_cpu
            and (type(tensor) is Tensor or type(tensor) is nn.Parameter)
            and tensor.layout is torch.strided
            and not tensor.is_neg()
            and (tensor.dtype in dtypes if dtypes is not None else not tensor.is_conj())
        )
        if not plain:
            if chosen == "cpp":
                raise ValueError(
                    f"{op}: backend 'cpp' cannot take a {tensor.dtype} {type(tensor).__name__} on {tensor.device} with "
                    f"layout {tensor.layout}; give strided CPU tensors of a dtype that it supports, or "
                    "use_backend('reference')"
                )
            return None
    return available


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd would record an operation on them."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
