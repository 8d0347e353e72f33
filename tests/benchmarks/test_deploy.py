"""`benchmarks.deploy` on a net that exports quickly, and the choice of points."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import cet
from benchmarks import deploy
from benchmarks.harness import WrongResultError
from benchmarks.models import Net


def small() -> Net:
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return Net(nn.Sequential(*layers), dict.fromkeys(("1", "3", "5"), cet.HeadSpec()), (4,), ())


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(deploy, "NETS", {"sensor_cnn": small})
    monkeypatch.setattr(deploy, "OTHER_RUNTIMES", {})  # which take a minute to write their files
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    for made in (deploy.built, deploy.written):
        made.cache_clear()
    with torch.no_grad():
        yield
    for made in (deploy.built, deploy.written):
        made.cache_clear()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_small")
def test_a_quick_run_measures_every_scenario(tmp_path: Path) -> None:
    options = "--quick --only net=sensor_cnn --only batch=1 --only batch=32 --only threads=1"
    run = CliRunner().invoke(deploy.main, [*options.split(), "--output", str(tmp_path)])
    assert run.exit_code == 0, run.output
    rows = list(csv.DictReader((tmp_path / "deploy.csv").open(newline="")))
    measured = {(row["batch"], row["scenario"]) for row in rows if row["quantity"] == "full/cet"}
    assert measured == {*(("1", name) for name in deploy.ONE_ROW), *(("32", name) for name in deploy.MANY_ROWS)}
    assert {row["threads"] for row in rows} == {"1"}
    results = json.loads((tmp_path / "deploy.json").read_text())
    assert len(results["measures"]) == 5
    assert results["settings"]["onnxruntime"]

    case = deploy.set_up(deploy.POINTS[0])
    right = {name: call() for name, call in case.providers.items()}
    case.check(right)
    logits, exit_index, score = right["cet"]
    for wrong, message in (
        ([logits + 1, exit_index, score], "cet differs"),
        ([logits, exit_index + 1, score], "sends"),
    ):
        with pytest.raises(WrongResultError, match=message):
            case.check({**right, "cet": wrong})


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("--only size=1", "size is none of net, batch"),
        ("--only batch=3", "no point has"),
        ("--cpu-time", "is for one thread; add --only threads=1"),
    ],
)
def test_points_that_are_not_there_or_cannot_be_timed_are_refused(only: str, message: str) -> None:
    run: Any = CliRunner().invoke(deploy.main, ["--quick", *only.split()])
    assert run.exit_code == 2
    assert message in " ".join(run.output.replace("│", " ").split())
