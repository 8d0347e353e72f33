"""Observes what submodules return in one call of a backbone, whatever other threads do with the backbone meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import nn

from cet.ops.backend import constant_in_graphs
from cet.partition.fingerprint import ExitHook

_Observers = Mapping[nn.Module, Callable[[Any], None]]


class _Calls(threading.local):
    """The observed calls of a thread, innermost last."""

    def __init__(self) -> None:
        self.observed: list[_Observers] = []


_calls = _Calls()


class _Tap(ExitHook):
    """A hook of one call: where several calls observe a submodule, in other threads or around this one, each sees only
    what it caused itself."""

    def __init__(self, observers: _Observers) -> None:
        self._observers = observers

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        innermost = next((call for call in reversed(_calls.observed) if module in call), None)
        if innermost is self._observers:
            self._observers[module](output)


@contextmanager
def observing(observers: _Observers) -> Iterator[None]:
    """Hand what these submodules return within the block, in this thread, to their observers."""
    if torch.compiler.is_dynamo_compiling():
        with _observing_in_a_graph(observers):
            yield
        return
    tap = _Tap(observers)
    _calls.observed.append(observers)
    try:
        with ExitStack() as hooks:
            for module in observers:
                hooks.callback(module.register_forward_hook(tap).remove)
            yield
    finally:
        _calls.observed.pop()


class _Recording:
    """The observers of the call that is being recorded by ``torch.compile``."""

    observers: _Observers | None = None


_recording = _Recording()


class _RecordedTap(ExitHook):
    """A hook that stays once a call was recorded, and does nothing otherwise: a graph can hold no change of hooks."""

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            observers = _recording.observers
            if observers is not None and module in observers:
                observers[module](output)


@contextmanager
def _observing_in_a_graph(observers: _Observers) -> Iterator[None]:
    for module in observers:
        _tap(module)
    before = _recording.observers
    _recording.observers = observers
    yield
    _recording.observers = before


@constant_in_graphs
def _tap(module: nn.Module) -> None:
    if not any(isinstance(hook, _RecordedTap) for hook in module._forward_hooks.values()):
        module.register_forward_hook(_RecordedTap())


def is_inside_reentrant_checkpoint() -> bool:
    """Whether the caller runs in the forward pass of ``torch.utils.checkpoint`` with ``use_reentrant=True``."""
    frame = sys._getframe(1)
    code = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
