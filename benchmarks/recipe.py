"""What do consistent exits gain on perturbed input, and what do they cost on clean input?

Trains the recipes of ``cet.training`` on several splits by person and seeds, and measures every exit on the test
persons: at severities that were and were not trained on, and under kinds of perturbation that no recipe trains on. The
rows of a finished training are kept, so that a run that was stopped goes on where it was. Writes recipe.csv (rows of
``Row``), recipe.json (where it was measured, the recipes, and rows of ``Comparison``) and recipe.md, the summary.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy import stats
from torchmetrics.functional.classification import multiclass_f1_score

from benchmarks.harness import provenance
from cet import perturb
from cet.data.smartwatch import load_windows, split_by_person
from cet.files import write_atomically
from cet.ops import exit_score
from cet.training import CONSISTENT, JOINT, perturbation, train

RESULTS = Path(__file__).parent / "results"
TRAINED = "trained kinds"

INPUTS: dict[tuple[str, float], perturb.Perturbation] = {
    **{(TRAINED, severity): perturbation(severity) for severity in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)},
    ("drift", 1.0): perturb.Drift(1.0),
    ("noise", 1.0): perturb.Noise(5.0),
    ("time shift", 1.0): perturb.TimeShift(0.3),
}
"""What is done to the test windows: the kinds of perturbation that training uses, then others."""

CLEAN, PERTURBED = (TRAINED, 0.0), (TRAINED, 1.0)

RECIPES = {
    "joint": JOINT,
    "consistent": CONSISTENT,
    "augmented": replace(JOINT, augment=True),
    "weight 2": replace(CONSISTENT, consistency_weight=2.0),
    "severity 1.5": replace(CONSISTENT, severity=1.5),
    "weight 2, severity 1.5": replace(CONSISTENT, consistency_weight=2.0, severity=1.5),
    "hard targets": replace(CONSISTENT, target="hard"),
    "confident only": replace(CONSISTENT, min_confidence=0.8),
    "final teacher": replace(CONSISTENT, teacher="final"),
    "first exit double": replace(CONSISTENT, exit_weights=(0.4, 0.2, 0.2, 0.2)),
}
"""The two recipes, joint training on perturbed input alone, and the second recipe with levers moved."""


@dataclass(frozen=True)
class Row:
    """One exit of one trained model on one input; entropy in nats, accuracy and F1 in [0, 1]."""

    split: int
    seed: int
    recipe: str
    perturbation: str
    severity: float
    exit: str
    accuracy: float
    macro_f1: float
    entropy: float

    @property
    def job(self) -> tuple[int, int, str]:
        return self.split, self.seed, self.recipe

    @property
    def input(self) -> tuple[str, float]:
        return self.perturbation, self.severity


@dataclass(frozen=True)
class Comparison:
    """Accuracy in percent of a recipe and of its baseline, and the gain: the mean of their difference.

    The seeds of a split share their test persons, so the 95 % interval, ``gain`` plus and minus ``half_width``, is
    Student's t over the means of the splits.
    """

    perturbation: str
    severity: float
    exit: str
    accuracy: float
    baseline: float
    gain: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.accuracy:.1f} / {self.baseline:.1f}: {self.gain:+.1f} ± {self.half_width:.1f}"


def measure(split_seed: int, seed: int, name: str) -> list[Row]:
    """Train one model and measure it. A seed draws the same perturbations for all recipes."""
    torch.set_num_threads(1)
    split = split_by_person(load_windows(), seed=split_seed)
    model = train(RECIPES[name], split, seed)
    rows = []
    for (kind, severity), perturb_ in INPUTS.items():
        x = perturb_(split.test.x, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits_of_exits = model.exit_logits(x)
        for exit_, logits in zip(model.exit_names, logits_of_exits, strict=True):
            labels = logits.argmax(dim=1)
            rows.append(
                Row(
                    *(split_seed, seed, name, kind, severity, exit_),
                    accuracy=(labels == split.test.y).double().mean().item(),
                    macro_f1=multiclass_f1_score(labels, split.test.y, model.num_classes, average="macro").item(),
                    entropy=exit_score(logits, "entropy").mean().item(),
                )
            )
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of earlier runs; none when there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                *(int(line["split"]), int(line["seed"]), line["recipe"]),
                *(line["perturbation"], float(line["severity"]), line["exit"]),
                *(float(line["accuracy"]), float(line["macro_f1"]), float(line["entropy"])),
            )
            for line in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write them as CSV, atomically, in the order of recipe, split and seed."""
    order = list(RECIPES)
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (order.index(row.recipe), row.split, row.seed)):
        writer.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in asdict(row).items()})
    write_atomically(path, table.getvalue().encode())


def comparison(rows: Sequence[Row], recipe: str, baseline: str = "joint") -> list[Comparison]:
    """A recipe against another, on the splits and seeds of the first; the mean of all exits counts as one more exit."""
    accuracy = {(row.recipe, row.input, row.exit, row.split, row.seed): 100 * row.accuracy for row in rows}
    runs = sorted({(row.split, row.seed) for row in rows if row.recipe == recipe})
    seeds_of = {split: [seed for other, seed in runs if other == split] for split, _ in runs}
    exits = list(dict.fromkeys(row.exit for row in rows))

    def by_split(name: str, input_: tuple[str, float]) -> NDArray[np.float64]:
        """(exits + 1, splits)"""
        of_exits = [
            [
                np.mean([accuracy[name, input_, exit_, split, seed] for seed in seeds])
                for split, seeds in seeds_of.items()
            ]
            for exit_ in exits
        ]
        return np.array([*of_exits, np.mean(of_exits, axis=0)])

    compared = []
    for input_ in INPUTS:
        both = zip(by_split(recipe, input_), by_split(baseline, input_), strict=True)
        for exit_, (ours, theirs) in zip([*exits, "mean"], both, strict=True):
            half_width = stats.t.ppf(0.975, len(ours) - 1) * stats.sem(ours - theirs)
            numbers = (ours.mean(), theirs.mean(), (ours - theirs).mean(), half_width)
            compared.append(Comparison(*input_, exit_, *map(float, numbers)))
    return compared


def tables(rows: Sequence[Row]) -> str:
    """What was found, in Markdown."""
    lines = [
        "# Consistent exits against joint training",
        "",
        "Accuracy in percent on test persons, consistent / joint, and the points gained with their 95 % interval",
        "over the splits. Every exit costs the same in both: each column is at equal compute. Weight and severity of",
        "`consistent` were chosen by looking at splits 0 to 2; splits 3 and 4 took no part in the choice.",
        "",
        *_by_input(comparison(rows, "consistent")),
        "",
        "## Against augmentation",
        "",
        "Consistent / joint training on perturbed input in the place of clean input: what the consistency term adds to",
        "having seen the perturbations.",
        "",
        *_by_input(comparison(rows, "consistent", "augmented")),
        "",
        "## Levers",
        "",
        "Points gained over `joint` on the same splits and seeds: mean of the exits and first exit, on clean input and",
        f"at severity {PERTURBED[1]:g}.",
        "",
        "| recipe | trainings | clean, mean | clean, first exit | perturbed, mean | perturbed, first exit |",
        "|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        count = len({row.job for row in rows if row.recipe == name})
        if name == "joint" or not count:
            continue
        compared = comparison(rows, name)
        found = {(c.perturbation, c.severity, c.exit): f"{c.gain:+.1f} ± {c.half_width:.1f}" for c in compared}
        cells = [found[*input_, exit_] for input_ in (CLEAN, PERTURBED) for exit_ in ("mean", compared[0].exit)]
        lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_input(compared: Sequence[Comparison]) -> list[str]:
    exits = dict.fromkeys(c.exit for c in compared)
    lines = ["| input | " + " | ".join(exits) + " |", "|---" * (len(exits) + 1) + "|"]
    for kind, severity in INPUTS:
        cells = [str(c) for c in compared if (c.perturbation, c.severity) == (kind, severity)]
        lines.append(f"| {kind}, severity {severity:g} | " + " | ".join(cells) + " |")
    return lines


@click.command(help=__doc__)
@click.option("--splits", type=click.IntRange(min=2), default=5, show_default=True, help="5 test everyone once.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=2, show_default=True, help="Trainings per split and recipe."
)
@click.option("--variants", default="", help=f"Train these too, split by semicolons: {'; '.join(list(RECIPES)[3:])}.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of one thread.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False, exists=True), default=RESULTS)
def main(splits: int, seeds: int, variants: str, workers: int, output: Path) -> None:
    names = ["joint", "consistent", "augmented", *filter(None, variants.split(";"))]
    if unknown := set(names) - RECIPES.keys():
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint="--variants")
    rows = read_rows(output / "recipe.csv")
    done = {row.job for row in rows}
    jobs = [job for job in product(range(splits), range(seeds), names) if job not in done]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(measure, *job) for job in jobs]
        for finished in track(as_completed(running), "Trainings", total=len(running)):
            rows += finished.result()
            write_rows(output / "recipe.csv", rows)
    present = [name for name in RECIPES if any(row.recipe == name for row in rows)]
    summary = {
        **provenance(torch.device("cpu"), "recipe"),
        "threads": 1,
        "workers": workers,
        "numpy": np.__version__,
        "recipes": {name: asdict(RECIPES[name]) for name in present},
        "runs": {name: sorted({row.job[:2] for row in rows if row.recipe == name}) for name in present},
        "against_joint": {name: [asdict(c) for c in comparison(rows, name)] for name in present[1:]},
    }
    write_atomically(output / "recipe.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_atomically(output / "recipe.md", tables(rows).encode())


if __name__ == "__main__":
    main()
