"""Train and evaluate the recipes on smartwatch recordings, with labels that are complete, few or wrong.

Trains the half-size net at 25 Hz on several splits by person and seeds. What a training leaves, the logits of its test
persons, goes to --runs, so that a run that was stopped goes on where it was; the figures, made from the logits, to
--output.

Fixed before any of these runs was looked at: the recipes and all that is in conditions.py; the splits, a partition of
the ten people that took no part in choosing the recipe; the one primary figure per kind of labels, the accuracy of
"consistent" less that of "augmentation" on perturbed input (the kinds trained on, severity 1), mean of the four exits;
its 95 % interval, Student's t over the ten people, each the mean of its seeds, and the same corrected for four
comparisons (Bonferroni). All other figures are secondary and not corrected.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path

import click
import torch
from rich.progress import track

from benchmarks.harness import provenance
from benchmarks.quality import report
from benchmarks.quality.conditions import LABELS, METHODS, SPLITS, WIDTHS
from benchmarks.quality.figures import figures_of
from benchmarks.quality.runs import Job, Result, finish
from cet.files import write_atomically

RESULTS = Path(__file__).parents[1] / "results" / "quality"
RUNS = Path(__file__).parents[2] / "runs" / "quality"
MAIN = ("augmentation", "consistent")
MOST_SEEDS = 10
SMOKE = {"every": 16, "epochs": 1}


def chosen(names: str, known: Sequence[str], option: str) -> list[str]:
    listed = names.split(";")
    if unknown := [name for name in listed if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {'; '.join(known)}", param_hint=option)
    return listed


@click.command(help=__doc__)
@click.option("--labels", default=";".join(LABELS), show_default=True, help="Kinds of labels, split by semicolons.")
@click.option("--methods", default=";".join(MAIN), show_default=True, help=f"Of {'; '.join(METHODS)}.")
@click.option("--splits", type=click.IntRange(1, len(SPLITS)), default=len(SPLITS), show_default=True)
@click.option(
    "--seeds", type=click.IntRange(1, MOST_SEEDS), default=2, show_default=True, help="Trainings per split and method."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes of one thread.")
@click.option("--smoke", is_flag=True, help="One epoch on few windows: its figures mean nothing.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=RUNS, help="Where logits are kept.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Where figures go.")
def main(
    labels: str, methods: str, splits: int, seeds: int, workers: int, smoke: bool, runs: Path, output: Path
) -> None:
    kinds, names = chosen(labels, list(LABELS), "--labels"), chosen(methods, list(METHODS), "--methods")
    runs.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    # Split by split and seed, so that a run that was stopped has pairs.
    jobs = [
        Job(kind, name, split, seed) for seed, split, kind, name in product(range(seeds), SPLITS[:splits], kinds, names)
    ]
    todo = [job for job in jobs if not job.path(runs).is_file()]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(finish, job, runs, **(SMOKE if smoke else {})) for job in todo]
        for finished in track(as_completed(running), "Trainings", total=len(running)):
            finished.result()
    write(runs, output, smoke)


def write(runs: Path, output: Path, smoke: bool) -> None:
    """The figures of all trainings that there are, also of earlier calls."""
    every = [Job(*one) for one in product(LABELS, METHODS, SPLITS, range(MOST_SEEDS))]
    kept = {job: Result.read(job.path(runs)) for job in every if job.path(runs).is_file()}
    full = max(result.facts["full_cost"] for result in kept.values())
    figures = [one for job, result in kept.items() for one in figures_of(job, result, full)]
    table = report.Table(figures)
    picture = io.BytesIO()
    report.plot(table).savefig(picture, format="png", dpi=120)
    summary = {
        **provenance(torch.device("cpu"), "quality"),
        "smoke": smoke,
        "widths": WIDTHS,
        "recipes": {f"{labels}: {method}": asdict(METHODS[method](labels)) for labels, method in table.present()},
        "differences": report.differences(table),
    }
    contents = {
        "quality.csv": report.as_csv(figures),
        "quality.json": (json.dumps(summary, indent=1) + "\n").encode(),
        "quality.png": picture.getvalue(),
        "quality.md": report.tables(table).encode(),
    }
    for name, content in contents.items():
        write_atomically(output / name, content)


if __name__ == "__main__":
    main()
