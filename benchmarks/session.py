"""One run of a benchmark: the options that all of them share, how it times, and its results, saved after each point."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import gpu
from benchmarks.harness import NOT_TIMED, Case, Row, measure, provenance, results_folder, write_results
from cet import ops
from cet.measure import timers
from cet.measure.rounds import MIN_ROUNDS, Timings

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = (
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch. [default: torch's own choice]"),
    click.option(
        "--seconds",
        type=click.FloatRange(min=0, min_open=True),
        help="Time to measure at each point; slow points take longer. [default: 1.5]",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option("--cold", is_flag=True, help="Empty the caches before each timed call."),
    click.option(
        "--cpu-time",
        is_flag=True,
        help="Time the processor's work for the calling thread: for one thread where others use the machine too.",
    ),
    click.option("--within", type=float, default=math.inf, help="Seconds after which no other point is begun."),
    click.option("--quick", is_flag=True, help="A smoke test of a few short rounds: its figures mean nothing."),
    click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for the results. [default: benchmarks/results; with --quick runs/benchmarks]",
    ),
)


def session_options(command: Command) -> Command:
    """Give a command the options that a :class:`Session` takes."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def require_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device here; use --device cpu")


class Session:
    """A run of the benchmark ``name``.

    Args:
        name: of the benchmark.
        file: of the results, without an ending.
        about: more settings, which stand in the results.
        threads, seconds, device, cold, cpu_time, within, quick, output: the options of :func:`session_options`.

    Attributes:
        device: what is timed.
        began: the time of :func:`time.perf_counter` at the start.
        end: the time after which no other point is begun.
        description: what the JSON file tells, less the measures.
        console: for tables.
    """

    def __init__(
        self,
        name: str,
        file: str,
        about: Mapping[str, Any],
        *,
        threads: int | None,
        seconds: float | None,
        device: str,
        cold: bool,
        cpu_time: bool,
        within: float,
        quick: bool,
        output: Path | None,
    ) -> None:
        self.began = time.perf_counter()
        self.end = self.began + within
        require_device(device)
        self.device = torch.device(device)
        self._output = results_folder(output or Path("runs/benchmarks" if quick else "benchmarks/results"))
        if device == "cuda":
            ops.use_backend("triton")  # which serves on request only
        if threads is not None:
            torch.set_num_threads(threads)
        self._file = file
        self._settings = {"seconds": seconds or (0.02 if quick else 1.5), "min_rounds": 3 if quick else MIN_ROUNDS}
        self._timer = timers.thread_clock if cpu_time else timers.timer_for(self.device)
        self._evict = timers.cache_eviction(self.device) if cold else None
        self.console = Console(width=None if sys.stdout.isatty() else 150)
        self.description = {
            "benchmark": name,
            **provenance(self.device, name),
            "settings": {**self._settings, "cold": cold, "cpu_time": cpu_time, **about},
            "ceilings": gpu.ceilings(self.device) if device == "cuda" else {},
        }

    def time(self, case: Case) -> Timings[str]:
        """Check and time a case, see :func:`benchmarks.harness.measure`."""
        return measure(case, self._timer, evict=self._evict, **self._settings)

    def save(self, rows: Sequence[tuple[Mapping[str, Any], Row]], measures: Any, figure: Figure | None = None) -> None:
        """Write all results so far; with the figure they are complete, and what was written is told."""
        written = write_results(self._output, self._file, rows, {**self.description, "measures": measures}, figure)
        if figure is None:
            return
        for path in written:
            self.console.print(f"wrote {path}")
        if any(row.note.startswith(NOT_TIMED) for _, row in rows):
            raise click.ClickException("some points failed and were not timed; their notes in the CSV file tell why")
