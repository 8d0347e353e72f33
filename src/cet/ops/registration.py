"""What an operation is made of, and the one decision which of its kernels runs a call.

An :class:`Operation` states its definition in plain PyTorch, its kernels by backend with the dtypes that they take, and
how a traced call is recorded. :meth:`Operation.dispatch` chooses, and knows why a faster backend was not taken.
:func:`explain` answers for a call as a user makes it; the logger ``cet.ops`` tells, at level DEBUG, of every call that
does not take the fastest kernel.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from cet.ops import backend as backends
from cet.ops.backend import CHOSEN, PREFERRED, is_transforming

_log = logging.getLogger("cet.ops")

NO_TRANSFORMS = "knows no torch.func and no tangents; use use_backend('reference')"
GRADIENT = "a gradient is needed, which PyTorch's operations have"
AUTOCAST = "autocast is on, which chooses the dtype of PyTorch's operations"
MASKED = "masked pooling runs as a masked mean in PyTorch, then the gate's kernel"


class Choice(NamedTuple):
    """What runs a call.

    Attributes:
        operation: the operation that is called.
        backend: ``"reference"``, ``"cpp"`` or ``"triton"``.
        way: what runs, in a few words: ``"definition"``, ``"kernel"``, or which of them in what order.
        reasons: why nothing faster does; empty where nothing is.
    """

    operation: str
    backend: str
    way: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f": {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{self.operation} runs on {self.backend}, {self.way}{why}"

    def but(self, way: str, *reasons: str) -> Choice:
        """Another way on the same backend, and why."""
        choice = Choice(self.operation, self.backend, way, (*self.reasons, *reasons))
        _log.debug("%s", choice)
        return choice


class Operation:
    """An operation: its definition, its kernels, and how it is recorded.

    Args:
        name: as in messages, and behind ``cet::`` where it is recorded.
        definition: plain PyTorch. It and the kernels take the same arguments.
        kernels: what runs it by backend, fastest first; the adapters beside the definition.
        dtypes: what the kernels take; any where not given.
    """

    def __init__(
        self,
        name: str,
        *,
        definition: Callable[..., Any],
        kernels: Mapping[str, Callable[..., Any]],
        dtypes: Collection[torch.dtype] | None = None,
    ) -> None:
        self.name = name
        self.run: dict[str, Callable[..., Any]] = {"reference": definition, **kernels}
        """What runs a call, by the backend of a :class:`Choice`."""
        self._dtypes = dtypes
        self._choices = {
            backend: Choice(name, backend, "kernel") for backend in kernels if backend != "cpp" or backends.has_cpp()
        }
        self._definition = Choice(name, "reference", "definition")
        self._recorded: Any = None

    def dispatch(self, tensors: Sequence[Tensor]) -> Choice:
        """The backend that runs a call with these tensors.

        Where nothing is chosen, CPU tensors go to the compiled kernels if these can take them.

        Raises:
            ValueError: when the chosen backend cannot run the call.
        """
        # In one piece and without helpers: this is a part of every call, and a small call takes six microseconds.
        backend = CHOSEN.get() or PREFERRED.get() or "cpp"
        if backend == "reference":
            return self._definition
        choice = self._choices.get(backend)
        if choice is not None and not is_transforming():
            on_cpu = backend == "cpp" or backends.interprets_triton()
            dtypes = self._dtypes
            for tensor in tensors:
                kind = type(tensor)
                # Whether it can be read at its address as its shape and strides tell.
                if not (
                    (kind is Tensor or kind is Parameter)
                    and (tensor.is_cpu if on_cpu else tensor.is_cuda and tensor.device == tensors[0].device)
                    and tensor.layout is torch.strided
                    and not tensor.is_neg()
                    and (tensor.dtype in dtypes if dtypes is not None else not tensor.is_conj())
                ):
                    break
            else:
                return choice
            reason = self._cannot_take("CPU" if backend == "cpp" else "CUDA", tensor)
        elif choice is not None:
            reason = NO_TRANSFORMS
        elif backend in self.run:
            reason = "is not installed; install cet with a C++17 compiler and CET_BUILD_CPP=1"
        else:
            reason = "has no kernel for it; use use_backend('reference')"
        if CHOSEN.get() is not None:
            raise ValueError(f"{self.name}: backend {backend!r} {reason}")
        reasons = [f"backend {backend!r} {reason}"]
        if backend == "cpp" and tensors and tensors[0].is_cuda and "triton" in self.run:
            reasons.append("backend 'triton' serves where it is chosen, and in CUDA graphs; use use_backend('triton')")
        return self._definition.but("definition", *reasons)

    def _cannot_take(self, devices: str, tensor: Tensor) -> str:
        wanted = f" of {', '.join(map(str, self._dtypes))}" if self._dtypes else ""
        return (
            f"cannot take a {tensor.dtype} {type(tensor).__name__} on {tensor.device} with layout {tensor.layout}; "
            f"give strided {devices} tensors{wanted}, all on one device, or use_backend('reference')"
        )

    def record_as(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        run: Callable[..., Any] | None = None,
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
    ) -> None:
        """Make it a custom operator ``cet::name``, as which traced calls are recorded.

        Args:
            schema: of the operator.
            fake: outputs without values, for shapes.
            run: what runs a recorded call; by default what :meth:`dispatch` chooses for all tensors given.
            backward: see :func:`torch.library.register_autograd`.
            setup_context: likewise.
            mutates: names of the arguments that are written to.
        """
        run = run or (lambda *args: self.run[self.dispatch(_tensors_among(args)).backend](*args))
        self._recorded = torch.library.custom_op(f"cet::{self.name}", run, mutates_args=tuple(mutates), schema=schema)
        self._recorded.register_fake(fake)
        if backward is not None:
            self._recorded.register_autograd(backward, setup_context=setup_context)

    def recorded(self, *args: Any) -> Any:
        """Call the custom operator."""
        return self._recorded(*args)


def _tensors_among(args: Iterable[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)):
            tensors += _tensors_among(arg)
    return tensors


_explained: dict[Callable[..., Any], Callable[..., Choice]] = {}

F = TypeVar("F", bound=Callable[..., Any])


def explained_by(explainer: Callable[..., Choice]) -> Callable[[F], F]:
    """Let :func:`explain` ask ``explainer``, which takes the arguments of the public function by name, about it."""

    def register(function: F) -> F:
        _explained[function] = explainer
        return function

    return register


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which kernel would run an eager call of an operation, and if not the fastest, why not. Nothing is computed.

    >>> print(cet.ops.explain(cet.ops.gate, logits.double(), threshold=0.5))
    gate runs on reference, definition: backend 'cpp' cannot take a torch.float64 Tensor on cpu ...

    Args:
        op: a function of :mod:`cet.ops`.
        *args: as for a call of it.
        **kwargs: as for a call of it.

    Raises:
        TypeError: for anything else than an operation, and for arguments that it does not take.
        ValueError: when a backend was chosen that cannot run the call, as the call itself would.
    """
    if op not in _explained:
        raise TypeError(f"explain: {op!r} is no operation; give a function of cet.ops that computes")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    return _explained[op](**bound.arguments)
