"""Shows how far a measurement is, on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PERIOD = 10.0
"""s between two lines where there is no terminal."""


class Windows:
    """Windows done and time left: a bar in a terminal, lines anywhere else; a context manager.

    Everything is drawn between windows, when :func:`cet.energy.protocol.measure` calls: what draws by itself would take
    part in the measurement.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("[dim]{task.fields[left]}[/]"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=None, left="")
        self._last_line = time.monotonic()

    def __enter__(self) -> Windows:
        if self._console.is_terminal:
            self._bar.start()
            self._bar.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, done: int, total: int, seconds_left: float) -> None:
        left = f"window {done} of {total}, about {duration(seconds_left)} left"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total, left=left, refresh=True)
        elif time.monotonic() - self._last_line >= PERIOD and done < total:
            self._last_line = time.monotonic()
            self._console.print(f"{self._title}: {left}", markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
