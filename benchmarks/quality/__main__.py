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

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

import click
from rich.progress import track

from benchmarks.quality.conditions import LABELS, METHODS, SPLITS
from benchmarks.quality.runs import Job, finish

RESULTS = Path(__file__).parents[1] / "results" / "quality"
RUNS = Path(__file__).parents[2] / "runs" / "quality"
MAIN = ("augmentation", "consistent")
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
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="Trainings per split and method.")
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


if __name__ == "__main__":
    main()
