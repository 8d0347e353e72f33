"""`python -m benchmarks.energy` on the smallest net."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.energy import main
from cet.energy import MonotonicClock
from powercap import Powercap


def test_ratios_and_raw_windows_replace_those_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    powercap = Powercap(tmp_path / "powercap")
    powercap.zone("intel-rapl:0", "package-0")
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(powercap.root))
    stop = powercap.follow(MonotonicClock(), "intel-rapl:0", 25)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/energy.csv").write_text("name,unit,value\njoules,J,1\n")
    (tmp_path / "out/energy.json").write_text("{}")
    short = ("--rounds", "3", "--window", "0.3", "--warm-up", "0.05", "--output", str(tmp_path / "out"))
    done = CliRunner().invoke(main, ["--models", "sensor_cnn", "--batches", "4", *short])
    stop()
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "out/energy.json").read_text())
    assert document["scenario"] == "half_at_each"
    assert len(document["measurements"][0]["blocks"]) >= 2 + 3 * 4
    rows = {(row["name"], row["workload"]): row for row in csv.DictReader((tmp_path / "out/energy.csv").open())}
    joules = {name: float(rows["joules", f"sensor_cnn:{name}"]["value"]) for name in ("predict", "backbone", "ideal")}
    assert all(value > 0 for value in joules.values())
    ratio = rows["joules", "sensor_cnn:predict/backbone"]
    assert float(ratio["low"]) <= float(ratio["value"]) <= float(ratio["high"])
    assert ratio["source"] == "counter"
    assert "sensor_cnn:predict/ideal, batch 4" in done.output
