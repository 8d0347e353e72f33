"""Triton's interpreter with programs side by side: they take turns at random, at every access that others may see.

The interpreter itself runs one program after the other, to its end: a program that waits for another would wait for
ever.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter

RESIDENT = 20
"""How many programs run at once; those of a row must fit."""


class _Program(threading.Thread):
    def __init__(self, index: tuple[int, ...], work: Callable[[], None], paused: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.index, self.error = index, None
        self._work, self._paused, self._go = work, paused, threading.Semaphore(0)
        self.ended = False

    def run(self) -> None:
        self._go.acquire()
        try:
            with np.errstate(all="ignore"):
                self._work()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._paused.release()

    def resume(self) -> None:
        """Run it until it pauses or ends."""
        interpreter.interpreter_builder.set_grid_idx(*self.index)
        self._go.release()
        self._paused.acquire()

    def pause(self) -> None:
        self._paused.release()
        self._go.acquire()


def _run_all(indices: list[tuple[int, ...]], work: Callable[[], None], draw: random.Random) -> None:
    paused = threading.Semaphore(0)
    waiting = draw.sample(indices, len(indices))
    running: list[_Program] = []
    while waiting or running:
        while waiting and len(running) < RESIDENT:
            running.append(_Program(waiting.pop(), work, paused))
            running[-1].start()
        program = draw.choice(running)
        program.resume()
        if program.error is not None:
            raise program.error
        if program.ended:
            running.remove(program)


def _pause() -> None:
    program = threading.current_thread()
    if isinstance(program, _Program):
        program.pause()


@contextmanager
def interleaved(seed: int = 7) -> Iterator[None]:
    """Interpret all launches so, and let rows be shared by programs that wait for each other."""
    draw = random.Random(seed)
    builder = interpreter.interpreter_builder
    atomic, load = builder.create_atomic_rmw, builder.create_masked_load

    def call(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        scope = interpreter._patch_lang(self.fn)
        try:
            args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            args = {n: arg if n in self.constexprs else interpreter._implicit_cvt(arg) for n, arg in args.items()}
            grid = (*(self.grid(args) if callable(self.grid) else self.grid), 1, 1)[:3]
            builder.set_grid_dim(*grid)
            _run_all(list(itertools.product(*map(range, grid))), lambda: self.fn(**args), draw)
        finally:
            scope.restore()
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    def pausing_atomic(*args: Any) -> Any:
        _pause()
        return atomic(*args)

    def pausing_load(*args: Any) -> Any:
        if args[-1] is True:  # is volatile
            _pause()
        return load(*args)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
        mock.patch.object(builder, "create_atomic_rmw", pausing_atomic),
        mock.patch.object(builder, "create_masked_load", pausing_load),
        mock.patch("cet.kernels.launch.runs_one_by_one", return_value=False),
    ):
        yield
