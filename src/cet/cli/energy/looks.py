"""Shows what `cet energy watch` sees."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cet.cli.energy.tables import UNKNOWN, columns
from cet.cli.streams import reader_left
from cet.energy.domains import with_domain
from cet.energy.watch import Look

BAR = 24
"""Characters for all samples."""


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
