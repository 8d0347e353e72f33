"""How many labels that were made wrong does `cet.audit_labels` find?

Trains as `benchmarks.quality` does, with 20 % of the training recordings mislabelled. The recordings are divided into
folds, and each fold is audited by a model that was trained on the others; with one fold, the very samples that the
model was trained on. A quarter of the recordings is looked at, the most suspicious first. Writes label_audit.csv and
label_audit.json.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import track

import cet
from benchmarks.harness import provenance
from benchmarks.quality.conditions import METHODS, SPLITS, with_labels
from benchmarks.quality.runs import split_of
from cet.files import write_atomically
from cet.training import train

RESULTS = Path(__file__).parent / "results"
LABELS = "20 % wrong recordings"
LOOKED_AT = 0.25


@dataclass(frozen=True)
class Row:
    """One audit: of the wrong recordings, the shares that were looked at, and for which the true class is suggested."""

    split: int
    seed: int
    method: str
    folds: int
    recordings: int
    wrong: int
    found: float
    suggested_right: float


def measure(split_seed: int, seed: int, method: str, folds: int, every: int = 1, epochs: int | None = None) -> Row:
    """Train and audit."""
    torch.set_num_threads(1)
    split = split_of(split_seed, every)
    windows = with_labels(split.train, LABELS, split_seed, seed)
    assert windows.recording is not None
    recordings, of_window = windows.recording.unique(return_inverse=True)
    draw = torch.Generator().manual_seed(seed)
    fold = (torch.randperm(len(recordings), generator=draw) % folds)[of_window]
    chosen = METHODS[method](LABELS)
    audits = []
    for k in range(folds):
        trained_on = windows if folds == 1 else windows.rows(fold != k)
        model = train(chosen.recipe, replace(split, train=trained_on), seed, epochs=epochs, widths=chosen.widths)
        audited = windows.rows(fold == k)
        loader = zip(audited.x.split(512), audited.y.split(512), strict=True)
        audits.append(cet.audit_labels(model, loader, group=audited.recording))
    suspects = cet.LabelAudit.joined(audits).groups()
    true = dict(zip(windows.recording.tolist(), split.train.y.tolist(), strict=True))
    wrong = {suspect.group for suspect in suspects if suspect.label != true[suspect.group]}
    looked_at = [suspect.group for suspect in suspects[: round(LOOKED_AT * len(suspects))]]
    right = [suspect.suggested == true[suspect.group] for suspect in suspects if suspect.group in wrong]
    found = len(wrong.intersection(looked_at)) / len(wrong)
    return Row(split_seed, seed, method, folds, len(suspects), len(wrong), found, float(np.mean(right)))


@click.command(help=__doc__)
@click.option("--splits", type=click.IntRange(1, len(SPLITS)), default=len(SPLITS), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--folds", type=click.IntRange(1), default=4, show_default=True)
@click.option("--smoke", is_flag=True, help="One epoch on few windows: its figures mean nothing.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False, exists=True), default=RESULTS)
def main(splits: int, seeds: int, folds: int, smoke: bool, output: Path) -> None:
    size = {"every": 8, "epochs": 1} if smoke else {}
    jobs = [(s, n, "consistent", f) for n in range(seeds) for s in SPLITS[:splits] for f in sorted({1, folds})]
    rows = [measure(*job, **size) for job in track(jobs, "Trainings")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    found = {f"{f} folds": [row.found for row in rows if row.folds == f] for f in sorted({1, folds})}
    summary = {
        **provenance(torch.device("cpu"), "label_audit"),
        "smoke": smoke,
        "looked_at": LOOKED_AT,
        "mean_share_found": {name: float(np.mean(shares)) for name, shares in found.items()},
        "least_share_found": {name: min(shares) for name, shares in found.items()},
    }
    write_atomically(output / "label_audit.csv", text.getvalue().encode())
    write_atomically(output / "label_audit.json", (json.dumps(summary, indent=1) + "\n").encode())
    click.echo(text.getvalue())
    click.echo(json.dumps({key: summary[key] for key in ("mean_share_found", "least_share_found")}))


if __name__ == "__main__":
    main()
