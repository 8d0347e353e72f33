"""Looks at the power of this machine, again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from typing import TYPE_CHECKING

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cet.cli.energy.tables import UNKNOWN, columns
from cet.cli.streams import reader_left
from cet.energy import EnergyMeter, EnergyReading
from cet.energy.domains import with_domain

if TYPE_CHECKING:
    from cet.cli.energy.loading import Batch
    from cet.model.early_exit import EarlyExit

BAR = 24
"""Characters for all samples."""


@dataclass(frozen=True)
class Look:
    """What is seen at one moment.

    Attributes:
        time: of day, ISO 8601.
        seconds: since the look before.
        watts: by domain; ``None`` if unknown.
        reasons: why, by domain.
        samples_per_second: that the model ran since then; ``None`` without one.
        exit_rates: the fraction of them that left at each exit.
    """

    time: str
    seconds: float
    watts: Mapping[str, float | None]
    reasons: Mapping[str, str]
    samples_per_second: float | None
    exit_rates: Mapping[str, float] | None


class Traffic:
    """A model at work on its data, again and again."""

    def __init__(self, model: EarlyExit, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = cycle(batches)

    def run(self, until: float) -> dict[str, int]:
        """Run at least one batch, and on until a time of the monotonic clock; how many samples left at each exit."""
        from cet.data.batches import call

        counts = dict.fromkeys(self._model.exit_names, 0)
        while True:
            x, _ = next(self._batches)
            for index in call(self._model.predict, x).exit_index.tolist():
                counts[self._model.exit_names[index]] += 1
            if time.monotonic() >= until:
                return counts


def looks(
    gpus: EnergyMeter, cpus: EnergyMeter, traffic: Traffic | None, *, interval: float, duration: float | None
) -> Iterator[Look]:
    """A look at the end of every interval.

    Args:
        gpus: an open meter of GPUs, whose power is asked for; their energy counters are left alone.
        cpus: an open meter of the CPU, whose energy counters are read.
        traffic: what runs meanwhile.
        interval: s between two looks.
        duration: s until the last one; ``None`` goes on for ever.

    Raises:
        DeviceLostError: when a GPU is lost.
    """
    began = last = time.monotonic()
    while duration is None or last - began < duration:
        cpus.start()
        counts = None
        if traffic:
            counts = traffic.run(last + interval)
        else:
            time.sleep(max(0.0, last + interval - time.monotonic()))
        reading = cpus.stop()
        seconds, last = time.monotonic() - last, time.monotonic()
        yield _look(gpus, reading, counts, seconds)


def _look(gpus: EnergyMeter, cpus: EnergyReading, counts: Mapping[str, int] | None, seconds: float) -> Look:
    watts = {domain.name: gpus.state(domain.name).watts for domain in gpus.domains}
    reasons = {name: "the GPU does not tell its power" for name, value in watts.items() if value is None}
    reasons |= {missing.domain: missing.reason for missing in gpus.unavailable}
    for part in cpus.domains:
        watts[part.domain] = None if part.joules is None else part.joules / cpus.seconds
    reasons |= cpus.reasons
    total = sum(counts.values()) if counts else 0
    return Look(
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        seconds=seconds,
        watts=watts | dict.fromkeys(reasons.keys() - watts.keys()),
        reasons=reasons,
        samples_per_second=total / seconds if counts else None,
        exit_rates={name: count / total for name, count in counts.items()} if counts else None,
    )


def show(looks: Iterable[Look], form: str) -> None:
    """As JSON, one object per line; or as text, in place in a terminal and one line per look anywhere else."""
    console = Console(highlight=False)
    if form == "json":
        _print(json.dumps(asdict(look)) for look in looks)
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for look in looks:
                live.update(_screen(look), refresh=True)
    else:
        _print(map(_line, looks))


def _print(lines: Iterable[str]) -> None:
    """Print until nobody reads."""
    for line in lines:
        click.echo(line)
        if reader_left():
            break


def _screen(look: Look) -> Group:
    parts: list[Table | Text] = [columns({"domain": list(look.watts), "power": list(map(_watts, look.watts.values()))})]
    if look.exit_rates is not None:
        rates = look.exit_rates.values()
        bars = [("█" * round(BAR * rate)).ljust(BAR, "░") for rate in rates]
        parts.append(columns({"exit": list(look.exit_rates), "samples": [f"{rate:.1%}" for rate in rates], "": bars}))
        parts.append(Text(f"{look.samples_per_second:.0f} samples/s"))
    notes = [f"{UNKNOWN} {with_domain(name, reason)}" for name, reason in look.reasons.items()]
    return Group(*parts, Text("\n".join([*notes, f"{look.time}; Ctrl-C ends"]), "dim"))


def _line(look: Look) -> str:
    words = [look.time, *(f"{name} {_watts(watts)}" for name, watts in look.watts.items())]
    if look.exit_rates is not None:
        words.append(f"{look.samples_per_second:.0f} samples/s")
        words += [f"{name} {rate:.1%}" for name, rate in look.exit_rates.items()]
    return "  ".join(words)


def _watts(watts: float | None) -> str:
    return UNKNOWN if watts is None else f"{watts:.1f} W"
