"""`cet energy doctor`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cet.cli.energy.options import NO_RAPL, REQUIRE_GPU, check_gpu, options
from cet.cli.errors import debug_option

if TYPE_CHECKING:
    from cet.energy import EnergyMeter, Unavailable


@click.command("doctor")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@options(REQUIRE_GPU, NO_RAPL, debug_option)
def command(form: str, require_gpu: bool, no_rapl: bool) -> None:
    """What this machine can measure, and why not.

    Each counter of energy is looked for and tried, and power where a counter stands still; for what is missing there is
    the reason and what would mend it. Exits with 0 whatever it finds, and with --require-gpu with 11 unless the joules
    of a GPU can be measured.

    \b
    Examples:
      cet energy doctor
      cet energy doctor --require-gpu --format json
    """
    from cet.energy import EnergyMeter, report

    with EnergyMeter(rapl=not no_rapl).opened() as meter:
        measured, unavailable = _tried(meter)
        document = {
            "schema": report.SCHEMA,
            "schema_version": report.SCHEMA_VERSION,
            "kind": "doctor",
            "domains": measured,
            "unavailable": [asdict(missing) for missing in unavailable],
        }
        if form == "json":
            click.echo(report.to_json(document), nl=False)
        else:
            _show(document)
        if require_gpu:
            check_gpu([found["name"] for found in measured], unavailable)


def _tried(meter: EnergyMeter) -> tuple[list[dict[str, Any]], list[Unavailable]]:
    """The domains whose joules come out of a window in which ticks are measured, and what has none, with the reason.

    It takes a window to tell: a counter can answer and yet stand still, in whose place there may be power.
    """
    from cet.energy import Unavailable

    meter.start(integral=True)
    ticks = {domain.name: meter.measure_tick(domain.name) for domain in meter.domains}
    reading = meter.stop()
    measured, unavailable = [], list(meter.unavailable)
    for domain in meter.domains:
        energy = reading[domain.name]
        if energy.joules is None:
            unavailable.append(Unavailable(domain.name, energy.reason or ""))
            continue
        facts = meter.facts(domain.name)
        measured.append(
            {
                **asdict(domain),
                "source": energy.source,
                "reason": energy.reason,
                "tick": ticks[domain.name],
                "state": asdict(meter.state(domain.name)),
                "facts": None if facts is None else asdict(facts),
            }
        )
    return measured, unavailable


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for title, rows in (
        ("Measured here", {found["name"]: "\n".join(_lines(found)) for found in document["domains"]}),
        ("Not measured here", {row["domain"]: _why(row) for row in document["unavailable"]}),
    ):
        if not rows:
            continue
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, escape(text))
        console.print(table)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """A domain in words."""
    yield found["device"]
    how = "energy counter" if found["source"] == "counter" else "integral of power"
    known = [f"{how}, scope: {found['scope']}"]
    if found["tick"] is not None:
        known.append(f"tick {round(1e3 * found['tick'], 1):g} ms")
    state, facts = found["state"], found["facts"]
    if state["watts"] is not None:
        known.append(f"{state['watts']:.0f} W now")
    if state["temperature"] is not None:
        known.append(f"{state['temperature']:.0f} °C")
    if facts and facts["power_limit"] is not None:
        known.append(f"limit {facts['power_limit']:.0f} W")
    yield ", ".join(known)
    if not found["in_total"]:
        yield "part of another domain, so it does not add to the total"
    if found["reason"]:
        yield found["reason"].removeprefix(f"{found['name']}: ")
    if found["source"] == "counter" and found["tick"] is None:
        yield "! its tick could not be measured"
    if state["throttle"]:
        yield f"! clocks are lowered: {', '.join(state['throttle'])}"
    if facts and facts["persistence"] is False:
        yield "! persistence mode is off, so that idle power jumps; mend: sudo nvidia-smi -pm 1"
    others = sorted(set((facts or {}).get("processes") or ()) - {os.getpid()})
    if others:
        yield f"! other processes compute on it: {', '.join(map(str, others))}; mend: wait for them, or end them"


def _why(missing: dict[str, Any]) -> str:
    reason = missing["reason"].removeprefix(f"{missing['domain']}: ")
    return f"{reason}\nmend: {missing['mend']}" if missing["mend"] else reason
