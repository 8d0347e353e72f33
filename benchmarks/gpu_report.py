"""Writes what `make gpu` measured into the tables of docs/gpu.md, next to the measures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.consistent_exit_loss import EXITS, ROWS

ROOT = Path(__file__).parents[1]
NOT_MEASURED = "not measured"

Figures = list[dict[str, str]]


class Results:
    """The files of one run, as far as they are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def description(self, name: str) -> dict[str, Any]:
        path = self._folder / f"{name}.json"
        if not path.is_file():
            return {}
        try:
            described: dict[str, Any] = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise click.ClickException(f"{path} is no JSON ({error}); measure again") from error
        if not described.get("ceilings"):  # which only a GPU has measured
            raise click.ClickException(f"{path} was measured on {described.get('device')}, no GPU; give --results")
        return described

    def figures(self, name: str, quantity: str) -> Figures:
        path = self._folder / f"{name}.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["quantity"] == quantity and row["median"]]


def _bandwidth_of_step(results: Results) -> float | None:
    measures = results.description("exit_gate").get("measures", {})
    least: float | None = measures.get("fraction_of_copy_bandwidth_least")
    return least


def _step_over_eager(results: Results) -> float | None:
    return min((float(row["median"]) for row in results.figures("exit_gate", "eager/graphed")), default=None)


def _bandwidth_of_loss(results: Results) -> float | None:
    ceiling = results.description("consistent_exit_loss").get("ceilings", {}).get("copy_bytes_per_s")
    fractions = []
    for row in results.figures("consistent_exit_loss", "cet"):
        if int(row["classes"]) >= 1000:
            size = 4 if row["dtype"] == "float32" else 2
            logits_and_gradients = 2 * 2 * EXITS * ROWS * int(row["classes"]) * size
            fractions.append(logits_and_gradients / float(row["median"]) / ceiling)
    return min(fractions, default=None)


def _loss_over_eager(results: Results) -> float | None:
    rows = results.figures("consistent_exit_loss", "eager/cet")
    return min((float(row["median"]) for row in rows if row["classes"] == "7"), default=None)


def _worst(baseline: str, limit: float) -> Callable[[Results], float | None]:
    def worst(results: Results) -> float | None:
        for verdict in results.description("end_to_end").get("measures", []):
            if verdict["measure"] == f"predict_device/{baseline} <= {limit}":
                found: float | None = verdict["worst"]
                return found
        return None

    return worst


MEASURES: Sequence[tuple[str, str, Callable[[Results], float | None]]] = (
    ("Exit step, of the copy's bandwidth, from 64 MB of features up", "at least 0.85", _bandwidth_of_step),
    ("Exit step, times faster than eager, all sizes", "at least 4 at small sizes, never below 1", _step_over_eager),
    ("Loss, of the copy's bandwidth, 1000 classes and more", "at least 0.8", _bandwidth_of_loss),
    ("Loss, times faster than eager, 7 classes, 4 exits", "at least 5", _loss_over_eager),
    ("End to end over the ideal, batch 64 and up", "at most 1.10", _worst("ideal", 1.1)),
    ("All exits closed over the graphed full model", "at most 1.03", _worst("graphed", 1.03)),
    ("Batch 1, left at the first exit, over the graphed full model", "at most 1.00", _worst("graphed", 1.0)),
)


def measures_table(results: Results) -> str:
    lines = ["| measure | wanted | worst point |", "|---|---|---|"]
    for name, wanted, read in MEASURES:
        value = read(results)
        lines.append(f"| {name} | {wanted} | {NOT_MEASURED if value is None else f'{value:.3g}'} |")
    return "\n".join(lines)


def times_table(results: Results) -> str:
    """Milliseconds of each provider at each point, and joules per sample of the device runner."""
    providers = ("predict_device", "predict_graphs", "predict", "graphed", "backbone", "boolean_mask", "ideal")
    points: dict[tuple[str, int, str], dict[str, str]] = {}
    for provider in providers:
        for row in results.figures("end_to_end", provider):
            point = points.setdefault((row["net"], int(row["batch"]), row["scenario"]), {})
            if row["unit"] == "s":
                point[provider] = f"{1e3 * float(row['median']):.3g}"
            elif provider == "predict_device":
                point["joules"] = row["median"]
    if not points:
        return NOT_MEASURED
    lines = [
        f"| net | batch | scenario | {' | '.join(providers)} | J/sample |",
        "|---|" + "---|" * (len(providers) + 3),
    ]
    for (net, batch, scenario), point in points.items():
        cells = [net, str(batch), scenario, *(point.get(name, "") for name in (*providers, "joules"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def origin(results: Results) -> str:
    description = results.description("end_to_end")
    if not description:
        return NOT_MEASURED
    gpu = ", ".join(f"{name} {value}" for name, value in description["gpu"].items())
    ceilings = ", ".join(f"{name} {value:.3g}" for name, value in description["ceilings"].items())
    return (
        f"{description['device']} ({gpu}); torch {description['torch']}, commit {description['commit']}, "
        f"{description['date']}; {ceilings}"
    )


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="What make gpu wrote.  [default: benchmarks/results/gpu]",
)
@click.option("--document", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=ROOT / "docs/gpu.md")
def main(results: Path | None, document: Path) -> None:
    """Fill the tables of the document from results; where nothing was measured they say so."""
    folder = results or ROOT / "benchmarks/results/gpu"
    if results and not any(results.glob("*.json")):
        raise click.ClickException(f"{results} has no results; give the folder 'results' that make gpu wrote")
    found = Results(folder)
    text = document.read_text()
    for name, content in (
        ("origin", origin(found)),
        ("measures", measures_table(found)),
        ("times", times_table(found)),
    ):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, replaced = pattern.subn(lambda match, content=content: match[1] + content + match[2], text)
        if replaced != 1:
            raise click.ClickException(f"{document} has no place for {name}: '<!-- {name} -->' up to '<!-- end -->'")
    document.write_text(text)
    click.echo(f"{document} now says what {folder} does" if folder.is_dir() else f"{folder} is not there: not measured")


if __name__ == "__main__":
    main()
