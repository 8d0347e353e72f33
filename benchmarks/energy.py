"""Does a batch with early exits take no more joules than the work that its samples need?

The question of `end_to_end.py`, and its cases and checks, by the protocol of `cet.energy`. Where this machine has no
energy counter, times are measured the same way and the joules are null, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

import cet
from benchmarks.end_to_end import SCENARIOS, CommaSeparated, Reference, set_up
from benchmarks.harness import Case, provenance, results_folder
from benchmarks.models import NETS, multi_exit, random_inputs
from benchmarks.session import require_device
from cet.cli.energy.progress import Windows
from cet.cli.energy.tables import columns, interval, one
from cet.energy import EnergyMeter, report
from cet.energy.figures import Figure, Figures
from cet.energy.measurement import Measurement, Quantity, Settings
from cet.energy.protocol import Workload, measure
from cet.files import write_atomically

PROVIDERS = ("predict", "ideal", "backbone")
BASELINES = ("ideal", "backbone")
QUANTITIES: tuple[Quantity, ...] = ("seconds", "joules", "net_joules")


def measure_case(case: Case, batch: int, meter: EnergyMeter, settings: Settings, progress: Windows) -> Measurement:
    """Check the results of all providers, and measure :data:`PROVIDERS` against each other.

    Raises:
        WrongResultError: when the check of the case fails; nothing is measured then.
    """
    case.check({name: provider(*case.inputs) for name, provider in case.providers.items()})
    workloads = [Workload(name, partial(case.providers[name], *case.inputs), batch) for name in PROVIDERS]
    return measure(workloads, meter, settings, progress=progress)


def figures(measurement: Measurement, net: str, batch: int) -> Iterator[Figure]:
    """Time and energy per row of each provider, and ratios of `predict`; ``workload`` holds net and provider."""
    for quantity in QUANTITIES:
        for name in PROVIDERS:
            estimate = measurement.estimate(name, quantity)
            yield Figure.of(quantity, estimate, per="sample", batch=batch, workload=f"{net}:{name}")
        for baseline in BASELINES:
            ratio = measurement.ratio("predict", baseline, quantity)
            yield Figure.of(quantity, ratio, part="ratio", batch=batch, workload=f"{net}:predict/{baseline}")


@click.command()
@click.option("--models", type=CommaSeparated(click.Choice([*NETS])), default=",".join(NETS), show_default=True)
@click.option("--batches", type=CommaSeparated(click.IntRange(min=1)), default="1,32", show_default=True)
@click.option("--scenario", type=click.Choice([*SCENARIOS]), default="half_at_each", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--window", type=click.FloatRange(min=0, min_open=True), help="Least seconds of a window. [default: 5]")
@click.option("--warm-up", type=click.FloatRange(min=0, min_open=True), default=3.0, show_default=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="benchmarks/results",
    show_default=True,
    help="Folder for energy.json and energy.csv.",
)
def main(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    scenario: str,
    device: str,
    rounds: int,
    window: float | None,
    warm_up: float,
    output: Path,
) -> None:
    """Joules of predict against the backbone and its stages on the rows that need them (the ideal)."""
    require_device(device)
    results_folder(output)
    settings = Settings(rounds=rounds, window=window, warmup=warm_up)
    found: list[Figure] = []
    measurements, flags = [], []
    with torch.no_grad(), EnergyMeter([device]).opened() as meter:
        for name in models:
            torch.manual_seed(0)
            with torch.device(device):
                net = NETS[name]()
                model: cet.EarlyExit = multi_exit(net, random_inputs(net, 32))
            for batch in batches:
                with torch.device(device):
                    x = random_inputs(net, batch)
                case, _ = set_up(net, model, x, Reference.of(model, x), SCENARIOS[scenario], None)
                with Windows(f"{name}, batch {batch}") as progress:
                    measurement = measure_case(case, batch, meter, settings, progress)
                found += figures(measurement, name, batch)
                flags += measurement.flags
                measurements.append(report.plain_measurement(measurement, net=name, batch=batch))
    about: dict[str, Any] = {
        **provenance(torch.device(device), "energy"),
        "scenario": scenario,
        "settings": report.plain(settings),
    }
    document = report.document("benchmark", found, measurements, flags=dict.fromkeys(flags), about=about)
    write_atomically(output / "energy.json", report.to_json(document).encode())
    write_atomically(output / "energy.csv", report.to_csv(document).encode())
    _print(document, scenario)


def _print(document: report.Document, scenario: str) -> None:
    found = Figures(document)
    console = Console(highlight=False)
    console.print(f"{scenario}, per row")
    for quantity in QUANTITIES:
        rows = [
            (f"{workload}, batch {batch}", found(quantity, workload=workload, batch=batch, part=part))
            for workload in found.values("workload")
            for batch in found.values("batch")
            for part in ["ratio" if "/" in workload else None]
        ]
        text = [interval(figure, 3) if figure["part"] else one(figure) for _, figure in rows]
        console.print(columns({quantity: [name for name, _ in rows], "value": text}))
    for missing in document["measurements"][0]["unavailable"]:
        console.print(f"{missing['domain']}: {missing['reason']}", markup=False)


if __name__ == "__main__":
    main()
