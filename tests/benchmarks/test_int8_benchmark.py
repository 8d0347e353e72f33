"""benchmarks.int8: a row for each kind of numbers, beside those of formats that were measured elsewhere."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.int8 import main

pytestmark = pytest.mark.slow

HEADER = "format,numbers,bytes,accuracy_full,accuracy_early,ms_full,ms_early,with_versions\n"


def test_a_smoke_run_replaces_its_own_rows(tmp_path: Path) -> None:
    table = tmp_path / "int8.csv"
    table.write_text(HEADER + ".tflite,int8,7,1,2,3,4,elsewhere\n.onnx,int8,7,1,2,3,4,before\n")
    done = CliRunner().invoke(main, ["--smoke", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    with table.open(newline="") as file:
        full, small, other = csv.DictReader(file)
    assert [(row["format"], row["numbers"]) for row in (full, small)] == [(".onnx", "float32"), (".onnx", "int8")]
    assert other["with_versions"] == "elsewhere"
    assert int(small["bytes"]) < 0.4 * int(full["bytes"])
    for row in (full, small):
        assert 100 / 7 < float(row["accuracy_full"]) <= 100  # of seven classes
        assert 0 < float(row["ms_early"]) < 10
