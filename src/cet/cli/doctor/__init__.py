"""`cet doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

import cet
from cet.cli.errors import debug_option

if TYPE_CHECKING:
    from cet.cli.doctor.findings import Finding

SCHEMA_VERSION = 1

TITLES = {
    "backends": "Backends",
    "runners": "Runners",
    "counters": "Energy counters (more: cet energy doctor)",
    "extras": "Extras",
}


@click.command("doctor")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@debug_option
@click.pass_context
def command(context: click.Context, form: str) -> None:
    """What this machine can run and measure; for the rest, why not and what would mend it.

    Exits with 0 when the core works: a small net leaves early on the reference backend.

    \b
    Examples:
      cet doctor
      cet doctor --format json
    """
    from cet.cli.doctor import findings
    from cet.measure.host import host_facts

    sections = {
        "backends": findings.backends(),
        "runners": findings.runners(),
        "counters": findings.counters(),
        "extras": findings.extras(),
    }
    works = sections["backends"][0].available
    host = host_facts()
    if form == "json":
        document = {
            "schema_version": SCHEMA_VERSION,
            "cet": cet.__version__,
            "works": works,
            "host": host,
            **{section: [asdict(finding) for finding in found] for section, found in sections.items()},
        }
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(f"cet {cet.__version__} on {host['processor']}, {host['cores']} cores, {host['platform']}")
        for section, found in sections.items():
            _print_table(section, found)
    context.exit(0 if works else 1)


def _print_table(section: str, findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=TITLES[section], title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        status = Text("yes", "green") if finding.available else Text("no", "yellow")
        detail = Text(finding.detail)
        if finding.mend:
            detail.append(f"\nmend: {finding.mend}", "dim")
        table.add_row(finding.name, status, detail)
    console = Console(highlight=False)
    console.print()
    console.print(table)
