"""Signals that ask a process to stop, as exceptions, so that what is finished can be kept."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise :class:`Stopped` in the main thread on SIGINT, SIGTERM and SIGHUP."""

    def stop(signum: int, _frame: object) -> NoReturn:
        raise Stopped(signum)

    # Where there is no SIGHUP, nobody hangs up.
    stopping = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    before = {signum: signal.signal(signum, stop) for signum in dict.fromkeys(stopping)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
