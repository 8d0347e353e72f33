"""`cet doctor`."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict

import click

import cet
from cet.cli.doctor.finding import Finding
from cet.cli.errors import debug_option, one_sentence

SCHEMA_VERSION = 2


@click.command("doctor")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--require-gpu", is_flag=True, help="Fail where no GPU's joules can be measured.")
@click.option("--no-rapl", is_flag=True, help="Leave the energy counters of the CPU out.")
@debug_option
@click.pass_context
def command(context: click.Context, form: str, require_gpu: bool, no_rapl: bool) -> None:
    """What this machine can run and measure; for the rest, why not and how to fix it.

    Each energy counter is looked for and tried, and power where a counter stands still. Exits with 0 when the core
    works: a small net leaves early on the reference backend. With --require-gpu it exits with 11 unless the joules of a
    GPU can be measured.

    \b
    Examples:
      cet doctor
      cet doctor --format json
      cet doctor --require-gpu
    """
    from cet.energy.examination import examine

    host, sections = _looked()
    energy = examine(rapl=not no_rapl)
    works = sections["backends"][0].available
    if form == "json":
        document = {
            "schema_version": SCHEMA_VERSION,
            "cet": cet.__version__,
            "works": works,
            "host": host,
            **{section: [asdict(finding) for finding in found] for section, found in sections.items()},
            "energy": asdict(energy),
        }
        click.echo(json.dumps(document, indent=2))
    else:
        from cet.cli.doctor.tables import print_energy, print_findings

        click.echo(f"cet {cet.__version__} on {host['processor']}, {host['cores']} cores, {host['platform']}")
        for section, found in sections.items():
            print_findings(section.capitalize(), found)
        print_energy(energy)
    if require_gpu:
        energy.require_gpu()
    context.exit(0 if works else 1)


def _looked() -> tuple[dict[str, str | int], dict[str, list[Finding]]]:
    """Facts about the host, and what each section found: an answer must come out, whatever is wrong here."""
    try:
        from cet.cli.doctor import findings
        from cet.measure.host import host_facts
    except Exception as error:  # torch may fail to load, and must not be loaded a second time then
        host: dict[str, str | int] = {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count() or 1,
        }
        return host, {"backends": [Finding("reference", False, one_sentence(error))], "runners": [], "extras": []}
    sections = {}
    for name, look in (("backends", findings.backends), ("runners", findings.runners), ("extras", findings.extras)):
        try:
            sections[name] = look()
        except Exception as error:
            sections[name] = [Finding(name, False, one_sentence(error))]
    return host_facts(), sections
