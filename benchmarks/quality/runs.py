"""One training and the logits of its test persons, kept in a file from which all figures are made."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import cet
from benchmarks.quality.conditions import INPUTS, KINDS, METHODS, with_labels
from benchmarks.quality.ways import WAYS
from cet.data.smartwatch import Split, Windows, load_windows, split_by_person
from cet.files import write_atomically

MAX_DROP = 0.01


@dataclass(frozen=True, order=True)
class Job:
    """One training."""

    labels: str
    method: str
    split: int
    seed: int

    def path(self, folder: Path) -> Path:
        name = f"{self.labels} {self.method} {self.split} {self.seed}"
        return folder / ("".join(c if c.isalnum() else "-" for c in name) + ".npz")


@dataclass(frozen=True)
class Result:
    """What a training left.

    Attributes:
        logits: ``(inputs, E, n, K)`` float16, of the test windows, in the order of INPUTS.
        y: ``(n,)``.
        person: ``(n,)``.
        calibration: ``(E, m, K)`` float16, of the clean calibration windows.
        facts: the policy calibrated on them, and what exits cost.
    """

    logits: NDArray[np.float16]
    y: NDArray[np.int64]
    person: NDArray[np.int64]
    calibration: NDArray[np.float16]
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Result:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            return cls(file["logits"], file["y"], file["person"], file["calibration"], facts)

    def write(self, path: Path) -> None:
        content = io.BytesIO()
        arrays = {"logits": self.logits, "y": self.y, "person": self.person, "calibration": self.calibration}
        np.savez_compressed(content, facts=np.array(json.dumps(self.facts)), **arrays)
        write_atomically(path, content.getvalue())


@cache
def split_of(split: int, every: int = 1) -> Split:
    """Windows at 25 Hz, 2.56 s long, of which training uses each ``every``-th."""
    windows = load_windows()
    parts = split_by_person(replace(windows, x=F.avg_pool1d(windows.x, 2)), seed=split)
    return replace(parts, train=_thinned(parts.train, every), test=_thinned(parts.test, every))


def _thinned(windows: Windows, every: int) -> Windows:
    return windows.rows(torch.arange(0, len(windows), every))


def run(job: Job, every: int = 1, epochs: int | None = None) -> Result:
    """Train and calibrate a model, and evaluate it on the test persons. A seed draws the same perturbations for all."""
    torch.set_num_threads(1)
    split = split_of(job.split, every)
    method = METHODS[job.method](job.labels)
    labelled = replace(split, train=with_labels(split.train, job.labels, job.split, job.seed))
    trained = WAYS[method.way](method.recipe, labelled, job.seed, epochs or method.recipe.epochs, method.widths)
    model = trained[0][0]
    costs = cet.exit_costs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        calibration = cet.calibrate(model, [(split.calibration.x, split.calibration.y)], MAX_DROP, costs=costs)
    is_open = [threshold is not None for threshold in calibration.policy.thresholds]
    inputs = [perturbed(split.test, i, job.seed) for i in range(len(INPUTS))]
    logits = np.stack([_logits(model, x) for x in inputs])
    for other, rows in trained[1:]:
        logits[:, :, rows.numpy()] = np.stack([_logits(other, x[rows]) for x in inputs])
    return Result(
        logits=logits,
        y=split.test.y.numpy(),
        person=split.test.person.numpy(),
        calibration=_logits(model, split.calibration.x),
        # Of models that share the test windows, those of the first.
        facts={
            "thresholds": calibration.policy.thresholds,
            "temperatures": calibration.policy.temperatures,
            "policy_cost": costs.cumulative(is_open).tolist(),
            "open_cost": costs.cumulative([True] * len(is_open)).tolist(),
            "full_cost": costs.full,
        },
    )


def finish(job: Job, folder: Path, **size: int) -> None:
    """Run, and keep what it left."""
    run(job, **size).write(job.path(folder))


def perturbed(test: Windows, index: int, seed: int) -> torch.Tensor:
    """The test windows under one of INPUTS."""
    kind, severity = INPUTS[index]
    x: torch.Tensor = KINDS[kind](severity)(test.x, generator=torch.Generator().manual_seed(seed))
    return x


@torch.no_grad()
def _logits(model: cet.EarlyExit, x: torch.Tensor) -> NDArray[np.float16]:
    parts: Sequence[torch.Tensor] = model.exit_logits(x)
    return torch.stack(list(parts)).half().numpy()
