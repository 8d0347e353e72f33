"""Time as meters, windows and the protocol see it: they take a clock, which tests can turn.

`watch` and `process`, which follow other programs, read the time themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds, from an arbitrary origin."""

    def now(self) -> float:
        """Seconds; never runs backwards."""

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        """Call ``action`` again and again in the background, the first time after ``seconds``.

        Returns:
            a function that ends it, and returns when no call is under way any more.
        """


class MonotonicClock:
    """The system's monotonic clock, ``CLOCK_MONOTONIC`` on Linux; :meth:`every` starts a thread."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        stopped = threading.Event()

        def repeat() -> None:
            while not stopped.wait(seconds):
                action()

        thread = threading.Thread(target=repeat, name="cet-energy-sampler", daemon=True)
        thread.start()

        def stop() -> None:
            stopped.set()
            thread.join()

        return stop
