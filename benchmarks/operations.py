"""What the benchmarks of single operations share: their command line, and the loop over their points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.harness import NO_TIME, Case, Row, failure
from benchmarks.session import Session, session_options
from cet.measure.host import installed_version
from cet.measure.rounds import Timings
from cet.measure.timers import keep_freed_memory as keep_all_freed_memory

Point = Mapping[str, Any]
Measured = list[tuple[Point, Timings[str]]]
Ratio = tuple[str, str]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of one operation.

    Attributes:
        name: of its module.
        points: what is timed, with the same keys for all.
        set_up: makes the case of a point, on the default device.
        ratios: ``(slow, fast)`` tells how many times as long ``slow`` takes, at the points that have both.
        verdicts: takes what was measured, and returns the measures.
        packages: whose versions go into the results beside those of all benchmarks.
    """

    name: str
    points: Sequence[Point]
    set_up: Callable[[Point], Case]
    ratios: Sequence[Ratio]
    verdicts: Callable[[Measured], dict[str, Any]]
    packages: Sequence[str] = ()

    def command(self) -> click.Command:
        """The command line: time every point, print and write times, ratios and verdicts."""

        @click.command()
        @click.option("--skip", multiple=True, help="Leave out this provider.")
        @click.option("--only", multiple=True, metavar="KEY=VALUE", help="Measure these points alone, as batch=1.")
        @click.option(
            "--keep-freed-memory",
            is_flag=True,
            help="Have glibc keep all freed memory, so that no provider pays for fresh pages: NAME_kept_memory.",
        )
        @session_options
        def main(skip: Sequence[str], only: Sequence[str], keep_freed_memory: bool, **options: Any) -> None:
            points = self._chosen(only)
            if options["cpu_time"] and any(point.get("threads", 1) > 1 for point in points):
                raise click.BadParameter("is for one thread; add --only threads=1", param_hint="--cpu-time")
            if keep_freed_memory and not keep_all_freed_memory():
                raise click.ClickException("--keep-freed-memory needs glibc's allocator")
            file = f"{self.name}_kept_memory" if keep_freed_memory else self.name
            about = {
                "keep_freed_memory": keep_freed_memory,
                **{name: installed_version(name) for name in self.packages},
            }
            session = Session(self.name, file, about, **options)
            self._run(session, points, skip, file)

        return main

    def _chosen(self, only: Sequence[str]) -> Sequence[Point]:
        """The points at which each of the keys has one of the values that are given for it."""
        wanted: dict[str, set[str]] = {}
        for entry in only:
            key, _, value = entry.partition("=")
            wanted.setdefault(key, set()).add(value)
        if unknown := wanted.keys() - self.points[0].keys():
            raise click.BadParameter(
                f"{', '.join(unknown)} is none of {', '.join(self.points[0])}", param_hint="--only"
            )
        chosen = [p for p in self.points if all(str(p[key]) in values for key, values in wanted.items())]
        if not chosen:
            raise click.BadParameter("no point has these values", param_hint="--only")
        return chosen

    def _run(self, session: Session, points: Sequence[Point], skip: Sequence[str], title: str) -> None:
        measured: Measured = []
        rows: list[tuple[Point, Row]] = []
        for point in points:
            try:
                if measured and time.perf_counter() > session.end:
                    rows.append((point, Row("cet", "s", note=NO_TIME)))
                    continue
                timings = self._time(point, session, skip)
            except click.ClickException:
                raise
            except Exception as error:  # whatever it is, what was measured before and what comes after counts
                rows.append((point, Row("cet", "s", note=failure(error))))
            else:
                measured.append((point, timings))
                rows += [(point, row) for row in _rows(timings, self.ratios)]
            session.save(rows, self.verdicts(measured))
        session.console.print(self._table(measured))
        session.console.print(self.verdicts(measured))
        session.save(rows, self.verdicts(measured), _plot(title, measured, self.ratios))

    def _time(self, point: Point, session: Session, skip: Sequence[str]) -> Timings[str]:
        torch.compiler.reset()
        torch.manual_seed(0)
        with session.device:
            case = self.set_up(point)
        if unknown := set(skip) - case.providers.keys():
            names = ", ".join(case.providers)
            raise click.BadParameter(f"{', '.join(unknown)} is none of {names}", param_hint="--skip")
        return session.time(case.without(skip))

    def _table(self, measured: Measured) -> Table:
        table = Table(*self.points[0], "us", *(f"{slow}/{fast}" for slow, fast in self.ratios), title=self.name)
        for point, timings in measured:
            known = timings.seconds.keys()
            ratios = [f"{timings.ratio(*r).median:.2f}" if set(r) <= known else "" for r in self.ratios]
            time = f"{1e6 * timings.time('cet').median:.1f}" if "cet" in known else ""
            table.add_row(*map(str, point.values()), time, *ratios)
        return table


def geometric_mean(values: Sequence[float]) -> float | None:
    """``None`` for no values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def speedups(measured: Measured, over: Iterable[str], of: str = "cet") -> list[float]:
    """At each point that has them, how many times as long as ``of`` the best of the others takes."""
    known = [(timings, {*over} & timings.seconds.keys()) for _, timings in measured if of in timings.seconds]
    return [min(timings.ratio(name, of).median for name in others) for timings, others in known if others]


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
