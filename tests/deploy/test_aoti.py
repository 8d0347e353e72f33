"""Packages of machine code, and the loop over their stages, answer as the model does; from Python and from C++."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import cet
from cet.deploy import aoti_writer
from cet.deploy.aoti import NestedModel
from cet.deploy.host_loop import MethodsModel
from cet.deploy.nested import NestedStages
from cet.ops.definitions import SCORE_NAMES, ScoreName
from families import FAMILIES
from stages_in_one_file import check_answers, check_bad_files, check_scores, check_small_file, small_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
ROWS = (1, 2, 7, 64, 333, aoti_writer.MOST_ROWS + 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "m.pt2"
    report = cet.export(small_model(), path, class_labels=["a", "b", "c"])
    assert report.num_bytes == path.stat().st_size
    return path


def test_calls(file: Path) -> None:
    check_small_file(file, small_model())


def test_any_number_of_rows(file: Path) -> None:
    model, loaded = small_model(), cet.load_exported(file)
    for rows in ROWS:
        x = torch.randn(rows, 4)
        expected, got = model.predict(x), loaded.predict(x)
        assert torch.equal(got.exit_index, expected.exit_index)
        torch.testing.assert_close(got.logits, expected.logits)
        torch.testing.assert_close(got.score, expected.score)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_every_family(name: str, tmp_path: Path) -> None:
    check_answers(name, "entropy", tmp_path / "m.pt2", ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_every_family_row_by_row(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the exits of this model have no form as branches")
        check_answers(name, "entropy", tmp_path / "m.pt2", (1,) * 50, batch=1)


@pytest.fixture(scope="module")
def row_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "row.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cet.export(small_model(), path, batch=1, thresholds="input", class_labels=["a", "b", "c"])
    return path


def test_one_row_at_a_time_in_one_model(row_file: Path) -> None:
    """No loop on the host: the model branches by itself."""
    model, loaded = small_model(), cet.load_exported(row_file)
    assert isinstance(loaded, NestedModel)
    assert loaded.class_labels == ("a", "b", "c")
    x = torch.randn(40, 4)
    x[5] = torch.nan
    for thresholds in ((0.45, None), (0.4, 0.5), (None, None), (math.inf, 0.4), (-math.inf, -math.inf)):
        loaded.thresholds = thresholds
        model.policy = cet.ExitPolicy("confidence", thresholds)
        expected = model.predict(x)
        for i, row in enumerate(x.split(1)):
            got = loaded.predict(row)
            assert got.exit_index == expected.exit_index[i]
            torch.testing.assert_close(got.logits, expected.logits[i : i + 1], equal_nan=True)
            torch.testing.assert_close(got.score, expected.score[i : i + 1], equal_nan=True)
    with pytest.raises(ValueError, match=r"for one row at a time; export with batch='dynamic' for more"):
        loaded.predict(x)


def test_one_row_from_many_threads(row_file: Path) -> None:
    loaded, x = cet.load_exported(row_file), torch.randn(200, 4)
    expected = [loaded.predict(row).logits for row in x.split(1)]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(lambda row: loaded.predict(row).logits, x.split(1)), expected, strict=True):
            assert torch.equal(got, wanted)


def no_branches(*_: object) -> None:
    raise RuntimeError("no branches today")


NO_BRANCHES = r"no form as branches \(no branches today\); the file has a model per stage"


def test_where_branches_cannot_be_compiled_each_stage_is_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def package(models: Mapping[str, object], _described: str | None) -> bytes:
        compiled.append(len(models))
        raise RuntimeError("seen")

    monkeypatch.setattr(NestedStages, "traced", no_branches)
    monkeypatch.setattr(aoti_writer, "_package", package)
    with pytest.warns(UserWarning, match=NO_BRANCHES), pytest.raises(cet.ExportError, match="seen"):
        cet.export(small_model(), tmp_path / "m.pt2", batch=1)
    assert compiled[0] == 2  # one exit is closed


@pytest.mark.slow
def test_branches_that_cannot_be_compiled_become_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NestedStages, "traced", no_branches)
    with pytest.warns(UserWarning, match=NO_BRANCHES):
        cet.export(small_model(), tmp_path / "m.pt2", batch=1)
    loaded, x = cet.load_exported(tmp_path / "m.pt2"), torch.randn(1, 4)
    assert isinstance(loaded, MethodsModel)
    torch.testing.assert_close(loaded.predict(x).logits, small_model().predict(x).logits)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_scores(score: ScoreName, tmp_path: Path) -> None:
    check_scores(score, tmp_path / "m.pt2")


def test_pytorch_alone_reads_them(file: Path, row_file: Path) -> None:
    """As the page tells, in a process without ``cet``."""
    code = f"""
import json, sys, zipfile, torch
from torch._inductor.package import load_package
path = {str(file)!r}
manifest = json.loads(zipfile.ZipFile(path).read("archive/extra/cet"))
first = manifest["stages"][0]
torch.manual_seed(5)
given = {{"input": torch.randn(3, 4)}}
logits, score, *_ = load_package(path, first["file"])(*[given[name] for name in first["inputs"]])
print(json.dumps([logits.tolist(), score.tolist()]))
path = {str(row_file)!r}
thresholds = json.loads(zipfile.ZipFile(path).read("archive/extra/cet"))["thresholds"]
assert thresholds == [0.45, None]
torch.manual_seed(5)
answer = load_package(path, "one_row")(torch.randn(1, 4), torch.tensor([0.45, torch.inf]))
print(json.dumps([value.tolist() for value in answer]))
assert "cet" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_the_stage, of_the_row = (map(torch.tensor, json.loads(line)) for line in done.stdout.splitlines())
    model = small_model()
    torch.manual_seed(5)
    torch.testing.assert_close(tuple(of_the_stage), model.exit_answers(torch.randn(3, 4))[0])
    torch.manual_seed(5)
    expected = model.predict(torch.randn(1, 4))
    torch.testing.assert_close(tuple(of_the_row), (expected.logits, expected.exit_index, expected.score))


def test_a_program_in_cpp_answers_as_the_model_does(file: Path, row_file: Path, tmp_path: Path) -> None:
    """examples/cpp, built against the PyTorch that is installed."""
    cmake = Path(sys.executable).with_name("cmake")
    spec = importlib.util.find_spec("nlohmann_json")
    assert spec is not None
    assert spec.origin is not None
    headers = Path(spec.origin).parent / "include"
    paths = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", f"-DJSON_INCLUDE_DIR={headers}"
    for command in ([cmake, "-S", EXAMPLE, "-B", tmp_path, *paths], [cmake, "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    x = torch.randn(50, 4)
    x.numpy().tofile(tmp_path / "rows.f32")
    out = small_model().predict(x)
    for each in (file, row_file):
        command = [tmp_path / "early_exit", each, tmp_path / "rows.f32"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert [int(line.split()[0]) for line in lines] == out.exit_index.tolist()
        assert [int(line.split()[1]) for line in lines] == out.labels.tolist()
    assert set(out.exit_index.tolist()) == {0, 2}


def test_bad_files(file: Path, tmp_path: Path) -> None:
    foreign = io.BytesIO()
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(2),)), foreign)
    check_bad_files(file, foreign.getvalue(), tmp_path, "PyTorch")


def test_without_a_compiler_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(cet.ExportError, match="there is no g"):
        cet.export(small_model(), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_cannot_be_compiled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr("torch._inductor.aot_compile", fail)
    with pytest.raises(cet.ExportError, match=r"exit '1' has no form in AOTInductor \(no such operator\)"):
        cet.export(small_model(), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []
