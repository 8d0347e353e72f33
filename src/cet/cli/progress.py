"""Shows the stages of a run: live bars in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """A bar per stage, with the time it has taken; a context manager around the whole run."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
            console=console,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, title: str) -> Iterator[_Bar]:
        bar = _Bar(self._progress, self._progress.add_task(title, total=None, note=""))
        yield bar
        self._progress.update(bar.task, total=1, completed=1)


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self.task = task

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self.task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._progress.update(self.task, note=text)


class Lines:
    """A line per stage and per note."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextmanager
    def stage(self, title: str) -> Iterator[_Line]:
        begin = time.monotonic()
        yield _Line(self._console, title)
        self._console.print(f"{title}: done in {time.monotonic() - begin:.1f} s")


class _Line:
    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title

    def advance(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        self._console.print(f"{self._title}: {text}")


def show(console: Console) -> Bars | Lines:
    """What fits the console."""
    return Bars(console) if console.is_terminal else Lines(console)
