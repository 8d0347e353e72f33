"""What does int8 cost in accuracy, and what does it save in bytes and milliseconds, with early exit and without?

The demo's net on the smartwatch recordings, trained with the consistent recipe on six persons (once; it is kept in
--runs). Each file is for one window. Windows of the training persons set the scales; the thresholds are calibrated on
the file itself, float32 or int8, on two persons, for at most one point less accuracy, fitted to them without a promise
about others; accuracy is that on two more persons. Milliseconds are those that `cet.export` measures for one window
that leaves at each exit, weighted by how many test windows leave there.

Measured are the formats whose packages are installed: ONNX here, ``build/edge/bin/python -m benchmarks.int8`` the
others. Rows of other formats stay in the table of --output.
"""

from __future__ import annotations

import csv
import io
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import cet
from cet.deploy.report import FULL
from cet.files import make_folder, write_atomically
from cet.measure.host import installed_version, versions
from cet.training.sensor_net import SensorNet

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parents[1] / "runs" / "int8"
MAX_DROP = 0.01
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


def measured(model: cet.EarlyExit, windows: dict[str, NDArray[Any]], suffix: str, *, int8: bool) -> Row:
    def batches(part: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.from_numpy(windows[f"{part}_x"]), torch.from_numpy(windows[f"{part}_y"]))]

    with TemporaryDirectory() as folder:
        path = Path(folder, f"model.{suffix}")
        quantize = batches("train") if int8 else None
        report = cet.export(model, path, batch=1, thresholds="input", quantize=quantize)
        loaded = cet.load_exported(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # which tells of classes that lose more
        found = cet.calibrate(
            loaded, batches("calibration"), MAX_DROP, guarantee=None, costs=report.costs, temperature=False
        )
    [(x, y)] = batches("test")
    answers = loaded.exit_answers(x)
    by_exit = torch.stack([logits.argmax(1) for logits, _ in answers])
    always = np.inf if loaded.description.is_low_when_sure else -np.inf
    never = -always
    limits = [never if threshold is None else threshold for threshold in found.policy.thresholds]
    scores = [score for _, score in answers]
    leaves = [s <= t if always > 0 else s >= t for s, t in zip(scores, [*limits, always], strict=True)]
    leaves_at = torch.stack(leaves).int().argmax(0)
    early = by_exit[leaves_at, torch.arange(len(y))]
    times = [report.timings.time(name).median * 1e3 for name in report.timings.seconds if name != FULL]
    packages = ", ".join(f"{name} {number}" for name, number in versions(FORMATS[suffix]).items())
    return Row(
        format=f".{suffix}",
        numbers="int8" if int8 else "float32",
        bytes=report.num_bytes,
        accuracy_full=round(100 * float((by_exit[-1] == y).double().mean()), 2),
        accuracy_early=round(100 * float((early == y).double().mean()), 2),
        ms_full=round(report.timings.time(FULL).median * 1e3, 4),
        ms_early=round(float(np.mean(np.array(times)[leaves_at])), 4),
        with_versions=packages,
    )


@click.command(help=__doc__)
@click.option("--smoke", is_flag=True, help="One epoch: its figures mean nothing.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=RUNS, help="Where the net is kept.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False, exists=True), default=RESULTS)
def main(smoke: bool, runs: Path, output: Path) -> None:
    model, windows = trained(runs, 1 if smoke else None)
    suffixes = [suffix for suffix, packages in FORMATS.items() if all(map(installed_version, packages))]
    rows = [measured(model, windows, suffix, int8=int8) for suffix in suffixes for int8 in (False, True)]
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
