"""Exports a backbone: its graph, and the conditions under which the graph is right."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from cet.partition.inputs import InputFormat
from cet.partition.opaque_ops import OpaqueOps
from cet.partition.stages import CutError, logits_of

PREFIX = "backbone."
"""What export puts before the paths of the backbone's submodules."""

CUTTING = threading.RLock()
"""Held by the one thread that cuts a backbone, because ``torch.export`` patches torch while it traces.

A fork waits for the end of the cut: the child would otherwise have a patched torch, and a lock that nobody releases.
"""
os.register_at_fork(before=CUTTING.acquire, after_in_parent=CUTTING.release, after_in_child=CUTTING.release)


def export(
    backbone: nn.Module, exits: Sequence[str], input_format: InputFormat, inputs: Sequence[Any], *, dynamic: bool
) -> ExportedProgram:
    """The graph of a backbone from its inputs to its logits, for any number of rows.

    Args:
        backbone: in eval mode; its parameters are swapped during the export, so it must be a private copy.
        exits: submodules whose outputs are to be marked in the graph.
        input_format: the format of the inputs.
        inputs: the inputs of one call, with at least two rows.
        dynamic: whether all other sizes of the inputs may vary too, where the code allows it.

    Raises:
        CutError: when the backbone cannot be exported.
    """
    tensors, shapes = [], []
    for value, batched in zip(inputs, input_format.is_batched, strict=True):
        if isinstance(value, Tensor):
            dims = dict.fromkeys(range(value.ndim), Dim.AUTO) if dynamic else {}
            tensors.append(value.clone())
            shapes.append({**dims, 0: Dim.AUTO} if batched else dims)
    try:
        with CUTTING, _quiet():
            return torch.export.export(
                _Logits(backbone, input_format, inputs).eval(),
                tuple(tensors),
                dynamic_shapes=(tuple(shapes),),
                preserve_module_call_signature=tuple(PREFIX + path for path in exits),
                strict=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CutError(
            f"torch.export cannot trace {type(backbone).__name__} ({reason}); "
            "give its stages explicitly as cet.Stages(...)"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what PyTorch prints, logs and warns of while it traces in this thread from the user: it is in the error."""
    thread = threading.get_ident()
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_others)
    before = sys.stderr
    sys.stderr = _OfOthers(before, thread)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr = before
        log.removeFilter(is_of_others)


class _OfOthers(io.TextIOBase):
    """Passes on what other threads write."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))

    def flush(self) -> None:
        self._stream.flush()


class _Logits(nn.Module):
    """The logits of the backbone as a function of the tensors among its inputs, so that nothing else is computed."""

    def __init__(self, backbone: nn.Module, input_format: InputFormat, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self._input_format = input_format
        self._constants = [None if isinstance(value, Tensor) else value for value in inputs]
        self._is_tensor = [isinstance(value, Tensor) for value in inputs]

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        inputs = [next(given) if t else c for t, c in zip(self._is_tensor, self._constants, strict=True)]
        args, kwargs = self._input_format.unflatten(inputs)
        with OpaqueOps():
            return logits_of(self.backbone(*args, **kwargs, **self._input_format.without_cache()))


def guards_of(program: ExportedProgram) -> list[sympy.Basic]:
    """The conditions on sizes that the code of the backbone tested while it was traced.

    ``torch.export`` keeps them to itself: an ``if x.shape[-1] > 150`` becomes the branch that the example took.
    """
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            environment = mode.shape_env
            replacements = environment.replacements
            return [guard.expr.xreplace(replacements) for guard in environment.guards]
    return []


def compile_guards(guards: Sequence[sympy.Basic], names: dict[sympy.Symbol, str]) -> Callable[..., bool] | None:
    """One function of the sizes, in the order of ``names``, that tests all guards."""
    if not guards:
        return None
    symbols = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    source = " and ".join(f"({_source(guard.xreplace(symbols))})" for guard in guards)
    test: Callable[..., bool] = eval(f"lambda {', '.join(names.values())}: {source}", {"math": math, "torch": torch})
    return test


def _source(condition: sympy.Basic) -> str:
    """Python source of a condition."""
    if isinstance(condition, sympy.And | sympy.Or):
        joint = " and " if isinstance(condition, sympy.And) else " or "
        return joint.join(f"({_source(argument)})" for argument in condition.args)
    if isinstance(condition, sympy.Not):
        return f"not ({_source(condition.args[0])})"
    if isinstance(condition, sympy.core.relational.Relational):
        left, right = (PythonPrinter().doprint(side) for side in (condition.lhs, condition.rhs))
        return f"({left}) {condition.rel_op} ({right})"
    return str(PythonPrinter().doprint(condition))
