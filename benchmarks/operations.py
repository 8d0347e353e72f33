"""What the benchmarks of single operations share: their command line, and the loop over their points."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import gpu
from benchmarks.harness import NO_TIME, Case, Row, WrongResultError, measure, provenance, write_results
from cet import ops
from cet.measure import timers
from cet.measure.rounds import MIN_ROUNDS, Timings

Point = Mapping[str, Any]
Measured = list[tuple[Point, Timings[str]]]
Ratio = tuple[str, str]


def command(
    name: str,
    points: Sequence[Point],
    set_up: Callable[[Point], Case],
    ratios: Sequence[Ratio],
    verdicts: Callable[[Measured], dict[str, Any]],
) -> click.Command:
    """The command line of the benchmark ``name``: time every point, print and write times, ratios and verdicts.

    A ratio ``(slow, fast)`` says how many times as long ``slow`` takes; where a point lacks one of
    them it is left out.
    """

    @click.command()
    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch. [default: torch's own choice]")
    @click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=1.5, show_default=True)
    @click.option(
        "--keep-freed-memory",
        is_flag=True,
        help="Have glibc keep all freed memory, so that no provider pays for fresh pages; written as NAME_kept_memory.",
    )
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--cold", is_flag=True, help="Empty the caches before each timed call.")
    @click.option("--within", type=float, default=math.inf, help="Seconds after which no other point is begun.")
    @click.option("--skip", multiple=True, help="Leave out this provider.")
    @click.option("--quick", is_flag=True, help="A smoke test: its figures mean nothing.")
    @click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the results.")
    def main(
        threads: int | None,
        seconds: float,
        keep_freed_memory: bool,
        device: str,
        cold: bool,
        within: float,
        skip: Sequence[str],
        quick: bool,
        output: Path | None,
    ) -> None:
        end = time.perf_counter() + within
        require_device(device)
        place = torch.device(device)
        if device == "cuda":
            ops.use_backend("triton")  # which serves on request only
        if threads is not None:
            torch.set_num_threads(threads)
        output = output or Path("runs/benchmarks" if quick else "benchmarks/results")
        output.mkdir(parents=True, exist_ok=True)
        settings = {"seconds": 0.02 if quick else seconds, "min_rounds": 3 if quick else MIN_ROUNDS}
        if keep_freed_memory and not timers.keep_freed_memory():
            raise click.ClickException("--keep-freed-memory needs glibc's allocator")
        evict = timers.cache_eviction(place) if cold else None
        ceilings = gpu.ceilings(place) if device == "cuda" else {}
        measured: Measured = []
        rows: list[tuple[Point, Row]] = []
        table = Table(*points[0], "us", *(f"{slow}/{fast}" for slow, fast in ratios), title=name)
        for point in points:
            if measured and time.perf_counter() > end:
                rows.append((point, Row("cet", "s", note=NO_TIME)))
                continue
            torch.compiler.reset()
            torch.manual_seed(0)
            try:
                with place:
                    case = set_up(point)
                unknown = set(skip) - case.providers.keys()
                if unknown:
                    names = ", ".join(case.providers)
                    raise click.BadParameter(f"{', '.join(unknown)} is none of {names}", param_hint="--skip")
                case = case.without(skip)
                timings = measure(case, timers.timer_for(place), evict=evict, **settings)
            except WrongResultError as error:
                rows.append((point, Row("cet", "s", note=f"not timed: {error}")))
                continue
            measured.append((point, timings))
            rows += [(point, row) for row in _rows(timings, ratios)]
            known = [r for r in ratios if set(r) <= timings.seconds.keys()]
            texts = [f"{timings.ratio(*r).median:.2f}" if r in known else "" for r in ratios]
            table.add_row(*map(str, point.values()), f"{1e6 * timings.time('cet').median:.1f}", *texts)
        console = Console(width=None if sys.stdout.isatty() else 150)
        console.print(table)
        console.print(verdicts(measured))
        description = {
            "benchmark": name,
            **provenance(place, name),
            "settings": {**settings, "cold": cold, "keep_freed_memory": keep_freed_memory},
            "ceilings": ceilings,
            "measures": verdicts(measured),
        }
        file = f"{name}_kept_memory" if keep_freed_memory else name
        for path in write_results(output, file, rows, description, _plot(file, measured, ratios)):
            console.print(f"wrote {path}")
        if any(row.note.startswith("not timed") for _, row in rows):
            raise click.ClickException("some points gave wrong results and were not timed; see the CSV file")

    return main


def require_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device here; use --device cpu")


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def speedup(timings: Timings[str], over: Iterable[str], of: str = "cet") -> float:
    """How many times as long the best of the others takes."""
    return min(timings.ratio(name, of).median for name in over)


def _rows(timings: Timings[str], ratios: Sequence[Ratio]) -> Iterator[Row]:
    for name in timings.seconds:
        yield Row.of(name, "s", timings.time(name), timings.num_rounds)
    for slow, fast in ratios:
        if {slow, fast} <= timings.seconds.keys():
            yield Row.of(f"{slow}/{fast}", "ratio", timings.ratio(slow, fast), timings.num_rounds)


def _plot(name: str, measured: Measured, ratios: Sequence[Ratio]) -> Figure:
    figure = Figure(figsize=(2 + 0.5 * len(measured), 5), layout="constrained")
    axes = figure.subplots()
    for slow, fast in ratios:
        found = [(i, t.ratio(slow, fast)) for i, (_, t) in enumerate(measured) if {slow, fast} <= t.seconds.keys()]
        axes.plot([i for i, _ in found], [s.median for _, s in found], "o", label=f"{slow} / {fast}")
        axes.vlines([i for i, _ in found], [s.p20 for _, s in found], [s.p80 for _, s in found], alpha=0.4)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_yscale("log")
    labels = [" ".join(map(str, point.values())) for point, _ in measured]
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("times as long")
    axes.set_title(name)
    axes.legend()
    return figure
