"""How many labels that were made wrong does `cet.audit_labels` find, and how many does cleanlab?

Trains as `benchmarks.quality` does, with 20 % of the training recordings mislabelled. The recordings are divided into
folds, and each fold is audited by a model that was trained on the others; with one fold, the very samples that the
model was trained on. A quarter of the recordings is looked at, the most suspicious first. With cleanlab installed (pip
install cleanlab), its scores rank the same recordings from the same probabilities, the mean over the exits. What an
audit leaves goes to --runs; label_audit.csv, label_audit.json and a plot of the first audit's suspects to --output.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import rankdata

import cet
from benchmarks.harness import provenance
from benchmarks.quality.conditions import METHODS, SPLITS, with_labels
from benchmarks.quality.runs import split_of
from cet.files import write_atomically
from cet.plotting import png
from cet.training import train

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parents[1] / "runs" / "label_audit"
LABELS = "20 % wrong recordings"
METHOD = "consistent"
LOOKED_AT = 0.25
CLEANLAB = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


@dataclass(frozen=True)
class Row:
    """One way to rank the recordings of one split.

    Attributes:
        found: of the wrong recordings, the share that is looked at.
        auroc: how often a wrong recording is ranked before a right one.
        suggested_right: of the wrong recordings, the share for which `cet.audit_labels` suggests the true class.
    """

    split: int
    seed: int
    folds: int
    ranking: str
    recordings: int
    wrong: int
    found: float
    auroc: float
    suggested_right: float


@dataclass(frozen=True)
class Audited:
    """An audit, with what cleanlab takes and the truth."""

    audit: cet.LabelAudit
    probability: NDArray[np.float32]  # (N, K), the mean over the exits
    true: NDArray[np.int64]

    def write(self, path: Path) -> None:
        content = io.BytesIO()
        of_audit = {name: np.asarray(value) for name, value in vars(self.audit).items()}
        np.savez_compressed(content, probability=self.probability, true=self.true, **of_audit)
        write_atomically(path, content.getvalue())

    @classmethod
    def read(cls, path: Path) -> Audited:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        probability, true, group = (columns.pop(name) for name in ("probability", "true", "group"))
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return cls(cet.LabelAudit(**tensors, group=tuple(group.tolist())), probability, true)


def measure(split_seed: int, seed: int, folds: int, every: int = 1, epochs: int | None = None) -> Audited:
    """Train and audit."""
    torch.set_num_threads(1)
    split = split_of(split_seed, every)
    windows = with_labels(split.train, LABELS, split_seed, seed)
    assert windows.recording is not None
    recordings, of_window = windows.recording.unique(return_inverse=True)
    draw = torch.Generator().manual_seed(seed)
    fold = (torch.randperm(len(recordings), generator=draw) % folds)[of_window]
    chosen = METHODS[METHOD](LABELS)
    audits, probabilities, true = [], [], []
    for k in range(folds):
        trained_on = windows if folds == 1 else windows.rows(fold != k)
        model = train(chosen.recipe, replace(split, train=trained_on), seed, epochs=epochs, widths=chosen.widths)
        audited = windows.rows(fold == k)
        loader = zip(audited.x.split(512), audited.y.split(512), strict=True)
        audits.append(cet.audit_labels(model, loader, group=audited.recording))
        with torch.no_grad():
            exits = torch.stack([logits.softmax(1) for logits in model.exit_logits(audited.x)])
        probabilities.append(exits.mean(0).numpy())
        true.append(split.train.y[fold == k].numpy())
    return Audited(cet.LabelAudit.joined(audits), np.concatenate(probabilities), np.concatenate(true))


def rankings(audited: Audited) -> dict[str, dict[int, float]]:
    """By name, how suspicious each recording is."""
    found = {"cet": {suspect.group: suspect.doubt for suspect in audited.audit.groups()}}
    if importlib.util.find_spec("cleanlab") is None:
        return found
    from cleanlab.rank import get_label_quality_scores

    group = np.array(audited.audit.group)
    for method in CLEANLAB:
        for adjusted in (False, True)[: 1 if method == "confidence_weighted_entropy" else 2]:
            quality = get_label_quality_scores(
                audited.audit.label.numpy(), audited.probability, method=method, adjust_pred_probs=adjusted
            )
            name = f"cleanlab {method}{' adjusted' if adjusted else ''}"
            found[name] = {int(g): float(-quality[group == g].mean()) for g in np.unique(group)}
    return found


def rows_of(split: int, seed: int, folds: int, audited: Audited) -> list[Row]:
    true = dict(zip(audited.audit.group, audited.true.tolist(), strict=True))
    suspects = audited.audit.groups()
    wrong = {suspect.group for suspect in suspects if suspect.label != true[suspect.group]}
    suggested = float(np.mean([s.suggested == true[s.group] for s in suspects if s.group in wrong]))
    rows = []
    for name, scores in rankings(audited).items():
        order = sorted(scores, key=lambda recording: -scores[recording])
        found = len(wrong.intersection(order[: round(LOOKED_AT * len(order))])) / len(wrong)
        ranks = rankdata([scores[recording] for recording in order])
        of_wrong = [rank for rank, recording in zip(ranks, order, strict=True) if recording in wrong]
        pairs = len(wrong) * (len(order) - len(wrong))
        auroc = (sum(of_wrong) - len(wrong) * (len(wrong) + 1) / 2) / pairs
        rows.append(Row(split, seed, folds, name, len(order), len(wrong), found, float(auroc), suggested))
    return rows


@click.command(help=__doc__)
@click.option("--splits", type=click.IntRange(1, len(SPLITS)), default=len(SPLITS), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--folds", type=click.IntRange(1), default=4, show_default=True)
@click.option("--smoke", is_flag=True, help="One epoch on few windows: its figures mean nothing.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=RUNS, help="Where audits are kept.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False, exists=True), default=RESULTS)
def main(splits: int, seeds: int, folds: int, smoke: bool, runs: Path, output: Path) -> None:
    size = {"every": 8, "epochs": 1} if smoke else {}
    runs.mkdir(parents=True, exist_ok=True)
    jobs = [(s, n, f) for n in range(seeds) for s in SPLITS[:splits] for f in sorted({1, folds})]
    rows = []
    for job in track(jobs, "Audits"):
        path = runs / ("-".join(map(str, job)) + ("-smoke" if smoke else "") + ".npz")
        if not path.is_file():
            measure(*job, **size).write(path)
        rows += rows_of(*job, Audited.read(path))
        if job == jobs[-1]:
            write_atomically(output / "label_audit.png", png(Audited.read(path).audit.plot(limit=25)))
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    summaries = [
        {
            "ranking": ranking,
            "folds": f,
            "mean_share_found": float(np.mean([row.found for row in ours])),
            "least_share_found": min(row.found for row in ours),
            "mean_auroc": float(np.mean([row.auroc for row in ours])),
        }
        for f in sorted({1, folds})
        for ranking in dict.fromkeys(row.ranking for row in rows)
        if (ours := [row for row in rows if (row.folds, row.ranking) == (f, ranking)])
    ]
    summary = {
        **provenance(torch.device("cpu"), "label_audit"),
        "smoke": smoke,
        "looked_at": LOOKED_AT,
        "rankings": summaries,
    }
    write_atomically(output / "label_audit.csv", text.getvalue().encode())
    write_atomically(output / "label_audit.json", (json.dumps(summary, indent=1) + "\n").encode())
    click.echo(json.dumps(summaries, indent=1))


if __name__ == "__main__":
    main()
