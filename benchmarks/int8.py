"""What does int8 cost in accuracy, and what does it save in bytes and milliseconds, with early exit and without?

The demo's net on the smartwatch recordings, trained with the consistent recipe on six persons (once; it is kept in
--runs). Each file is for one window. Windows of the training persons set the scales; the thresholds are calibrated on
the file itself, float32 or int8, on two persons, for at most one point less accuracy, fitted to them without a promise
about others; accuracy is that on two more persons. Milliseconds are of one window in one thread, measured at each exit
and weighted by how many test windows leave there; float32 and int8, with exits and without, take turns.

Measured are the formats whose packages are installed: ONNX here, ``build/edge/bin/python -m benchmarks.int8`` the
others. Rows of other formats stay in the table of --output.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import cet
from cet.deploy.export import describe, in_runtime
from cet.deploy.loaded import LoadedModel
from cet.deploy.loading import format_of
from cet.deploy.onnx import OnnxModel, session_of
from cet.deploy.onnx_writer import OnnxWriter
from cet.deploy.segments import export_segments
from cet.files import make_folder, write_atomically
from cet.measure.host import installed_version, versions
from cet.measure.rounds import time_calls
from cet.measure.timers import wall_clock
from cet.training.sensor_net import SensorNet

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parents[1] / "runs" / "int8"
Batches = list[tuple[torch.Tensor, torch.Tensor]]

MAX_DROP = 0.01
ALWAYS = np.inf
"""A threshold of entropy at which every window leaves."""
SECONDS = 5.0
"""Of timing, for each format."""
SAMPLES = 512
"""Windows that set the scales."""
FORMATS = {"onnx": ("onnxruntime",), "pte": ("executorch",), "tflite": ("litert-torch", "ai-edge-litert")}
"""By suffix, and the packages that write and run them."""


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        accuracy_full, accuracy_early: of the last exit, and by the policy, in percent.
        ms_full, ms_early: of one window.
        with_versions: of the packages.
    """

    format: str
    numbers: str
    bytes: int
    accuracy_full: float
    accuracy_early: float
    ms_full: float
    ms_early: float
    with_versions: str


def trained(runs: Path, epochs: int | None) -> tuple[cet.EarlyExit, dict[str, NDArray[Any]]]:
    """The net, and the windows of the three groups of persons; trained where that was not done before."""
    path, windows = runs / "model.safetensors", runs / "windows.npz"
    if not path.is_file():
        from cet.data.smartwatch import load_windows, split_by_person
        from cet.training.recipes import CONSISTENT, train

        split = split_by_person(load_windows(), seed=0)
        make_folder(runs)
        chosen = split.train.rows(torch.linspace(0, len(split.train) - 1, SAMPLES).long())
        parts = {"train": chosen, "calibration": split.calibration, "test": split.test}
        content = io.BytesIO()
        np.savez(content, **{f"{n}_{a}": getattr(part, a).numpy() for n, part in parts.items() for a in ("x", "y")})
        write_atomically(windows, content.getvalue())
        train(CONSISTENT, split, seed=0, epochs=epochs).save(path)
    with np.load(windows, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return cet.load(path, SensorNet(int(arrays["train_y"].max()) + 1)), arrays


class File(NamedTuple):
    """A file for one window, whose thresholds can be set, and the net without exits, both in one thread."""

    num_bytes: int
    loaded: LoadedModel
    full: Callable[[], object]


def written(model: cet.EarlyExit, suffix: str, samples: Batches | None) -> File:
    """The model in a format; in int8 where there are samples."""
    opened = (0.0,) * (model.num_exits - 1)
    stages = export_segments(model, model.example_inputs, opened, 1, sizes_vary=False)
    description = describe(stages, 1, True, None)
    row = model.example_inputs[0][0][:1].numpy()
    if suffix != "onnx":
        content, loaded, whole = in_runtime(format_of(f"m.{suffix}"), stages, description, 1, samples)
        return File(len(content), loaded, partial(whole, [row]))
    writer = OnnxWriter(stages)
    if samples is not None:
        writer.quantize([x for x, _ in samples], 1)
    content = writer.with_exits(description)
    session = session_of(writer.without_exits(description), 1)
    feeds = {description.inputs[0].name: row}
    return File(len(content), OnnxModel(session_of(content, 1), "the file"), partial(session.run, None, feeds))


def measured(model: cet.EarlyExit, windows: dict[str, NDArray[Any]], suffix: str) -> list[Row]:
    """Of float32 and int8, timed in turns."""
    torch.set_num_threads(1)
    train, calibration, test = (
        [(torch.from_numpy(windows[f"{part}_x"]), torch.from_numpy(windows[f"{part}_y"]))]
        for part in ("train", "calibration", "test")
    )
    files = {"float32": written(model, suffix, None), "int8": written(model, suffix, train)}
    row = [model.example_inputs[0][0][:1].numpy()]
    calls: dict[tuple[str, int | None], Callable[[], object]] = {}
    for numbers, file in files.items():
        calls[numbers, None] = file.full
        for k in range(model.num_exits):
            forced = tuple(ALWAYS if index == k else None for index in range(model.num_exits - 1))
            calls[numbers, k] = partial(file.loaded.run, row, forced)
    timings = time_calls(calls, wall_clock, seconds=SECONDS)
    ms = {name: 1e3 * timings.time(name).median for name in calls}
    [(x, y)] = test
    rows = []
    for numbers, file in files.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # which tells of classes that lose more
            found = cet.calibrate(
                file.loaded, calibration, MAX_DROP, guarantee=None, costs=cet.exit_costs(model), temperature=False
            )
        answers = file.loaded.exit_answers(x)
        by_exit = torch.stack([logits.argmax(1) for logits, _ in answers])
        limits = [*(-ALWAYS if threshold is None else threshold for threshold in found.policy.thresholds), ALWAYS]
        leaves = [score <= limit for (_, score), limit in zip(answers, limits, strict=True)]
        leaves_at = torch.stack(leaves).int().argmax(0)
        early = by_exit[leaves_at, torch.arange(len(y))]
        rows.append(
            Row(
                format=f".{suffix}",
                numbers=numbers,
                bytes=file.num_bytes,
                accuracy_full=round(100 * float((by_exit[-1] == y).double().mean()), 2),
                accuracy_early=round(100 * float((early == y).double().mean()), 2),
                ms_full=round(ms[numbers, None], 4),
                ms_early=round(float(np.mean([ms[numbers, k] for k in leaves_at.tolist()])), 4),
                with_versions=", ".join(f"{name} {n}" for name, n in versions(FORMATS[suffix]).items()),
            )
        )
    return rows


@click.command(help=__doc__)
@click.option("--smoke", is_flag=True, help="One epoch: its figures mean nothing.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=RUNS, help="Where the net is kept.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False, exists=True), default=RESULTS)
def main(smoke: bool, runs: Path, output: Path) -> None:
    model, windows = trained(runs, 1 if smoke else None)
    suffixes = [suffix for suffix, packages in FORMATS.items() if all(map(installed_version, packages))]
    rows = [row for suffix in suffixes for row in measured(model, windows, suffix)]
    table = output / "int8.csv"
    names = [field.name for field in fields(Row)]
    kept = list(csv.DictReader(table.open(newline=""))) if table.is_file() else []
    kept = [row for row in kept if row["format"].removeprefix(".") not in suffixes]
    lines = sorted([*kept, *map(asdict, rows)], key=lambda row: [*FORMATS].index(row["format"].removeprefix(".")))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(table, text.getvalue().encode())
    shown = Table(*names)
    for line in lines:
        shown.add_row(*(str(line[name]) for name in names))
    Console(width=160).print(shown)


if __name__ == "__main__":
    main()
