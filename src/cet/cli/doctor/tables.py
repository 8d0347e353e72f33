"""What `cet doctor` found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cet.cli.doctor.finding import Finding
from cet.energy import Unavailable
from cet.energy.examination import Examination, Measurable


def print_findings(title: str, findings: Iterable[Finding]) -> None:
    """A table with a row for each finding."""
    rows = []
    for finding in findings:
        detail = Text(finding.detail)
        if finding.fix:
            detail.append(f"\nfix: {finding.fix}", "dim")
        rows.append((finding.name, Text("yes", "green") if finding.available else Text("no", "yellow"), detail))
    _print(title, rows)


def print_energy(energy: Examination) -> None:
    """A table of the domains that can be measured, and one of those that cannot."""
    measurable = [(found.domain.name, escape("\n".join(_lines(found)))) for found in energy.measurable]
    unavailable = [(row.domain, escape(_why(row))) for row in energy.unavailable]
    _print("Energy that can be measured", measurable)
    _print("Energy that cannot be measured", unavailable)


def _print(title: str, rows: Sequence[tuple[str | Text, ...]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in rows[0][:-1]:
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print()
    console.print(table)


def _lines(found: Measurable) -> Iterator[str]:
    """A domain in words."""
    domain, state, facts = found.domain, found.state, found.facts
    yield domain.device
    known = ["energy counter" if found.source == "counter" else "integral of power", f"scope: {domain.scope}"]
    if found.update_period is not None:
        known.append(f"update period {round(1e3 * found.update_period, 1):g} ms")
    if state.watts is not None:
        known.append(f"{state.watts:.0f} W now")
    if state.temperature is not None:
        known.append(f"{state.temperature:.0f} °C")
    if facts and facts.power_limit is not None:
        known.append(f"limit {facts.power_limit:.0f} W")
    yield ", ".join(known)
    if not domain.in_total:
        yield "part of another domain, so it does not add to the total"
    if found.reason:
        yield found.reason.removeprefix(f"{domain.name}: ")
    if found.source == "counter" and found.update_period is None:
        yield "! its update period could not be measured"
    if state.throttle:
        yield f"! clocks are lowered: {', '.join(state.throttle)}"
    if facts and facts.persistence is False:
        yield "! persistence mode is off, so that idle power jumps; fix: sudo nvidia-smi -pm 1"
    if facts and facts.others:
        yield f"! other processes compute on it: {', '.join(map(str, facts.others))}; fix: wait for them, or end them"


def _why(missing: Unavailable) -> str:
    reason = missing.reason.removeprefix(f"{missing.domain}: ")
    return f"{reason}\nfix: {missing.fix}" if missing.fix else reason
