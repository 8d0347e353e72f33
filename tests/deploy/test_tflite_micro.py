"""Folders for TFLite Micro answer as the model does, in Python and in C; run by ``make edge``."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cet
from benchmarks.micro import NETS, needed
from cet.deploy.arena import arena_of
from cet.deploy.c_source import c_number, placed
from cet.deploy.check import NEAR
from cet.deploy.manifest import StageEntry
from cet.deploy.stages import MANIFEST
from cet.deploy.tflite_micro import MicroModel
from cet.files import OutputError
from cet.ops.definitions import SCORE_NAMES, ScoreName
from families import FAMILIES
from oracle import policy_between_scores, spread_logits
from stages_in_one_file import Svd, check_answers, check_scores, check_small_file, small_model

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")
pytest.importorskip("tflite_micro")

EXAMPLE = Path(__file__).parents[2] / "examples/microcontroller"
ROWS = 1000

spec = importlib.util.spec_from_file_location("host", EXAMPLE / "host.py")
assert spec is not None
assert spec.loader is not None
host: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)


def multi_exit(name: str, score: ScoreName) -> tuple[cet.EarlyExit, Tensor]:
    """A net in which about half of the rows that come leave at each exit, and rows for it."""
    torch.manual_seed(0)
    net = NETS[name]()
    model = cet.EarlyExit(net.backbone.eval(), net.exits, (torch.randn(2, *net.sample_shape),)).eval()
    [parameter] = signature(net.backbone.forward).parameters
    rows = {parameter: torch.randn(64, *net.sample_shape)}
    spread_logits(model, rows)
    model.policy = policy_between_scores(model, rows, score, [0.5] * (model.num_exits - 1), (1.5,) * model.num_exits)
    return model, torch.randn(ROWS, *net.sample_shape)


@pytest.mark.parametrize(("name", "score"), [("mlp", "margin"), ("sensor_cnn", "entropy"), ("conv_2d", "confidence")])
def test_answers_in_python_and_in_c_are_those_of_the_model(name: str, score: ScoreName, tmp_path: Path) -> None:
    """In C each stage runs in the arena that the header names."""
    (model, x), folder = multi_exit(name, score), tmp_path / "m.tflm"
    report = cet.export(model, folder, batch=1)
    loaded, firmware = cet.load_exported(folder), host.Firmware(folder, tmp_path / "m.so")
    assert isinstance(loaded, MicroModel)
    assert [stage.arena_bytes for stage in firmware.stages] == [*loaded.arena_bytes]
    assert all(stage.file % 16 == 0 for stage in firmware.stages)
    assert report.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    expected, near = model.predict(x), torch.zeros(ROWS, dtype=torch.bool)
    for (_, scores), threshold in zip(model.exit_answers(x), model.policy.thresholds, strict=False):
        near |= (scores - threshold).abs() <= NEAR
    assert near.sum() < 0.02 * ROWS
    assert set(expected.exit_index.tolist()) == set(range(model.num_exits))
    wanted = [expected.labels, expected.exit_index, expected.score, expected.logits]
    in_python = [loaded.predict(row[None]) for row in x.numpy()]
    in_c = [firmware.predict(row) for row in x.numpy()]
    for answers in (
        [(out.labels[0], out.exit_index[0], out.score[0], out.logits[0]) for out in in_python],
        [(out.label, out.exit_index, out.score, [*out.logits]) for out in in_c],
    ):
        labels, exits, scores, logits = (np.array(part)[~near] for part in zip(*answers, strict=True))
        np.testing.assert_array_equal(labels, wanted[0][~near])
        np.testing.assert_array_equal(exits, wanted[1][~near])
        np.testing.assert_allclose(scores, wanted[2][~near], rtol=1e-3, atol=1e-5)
        rounding = 1e-5 * float(wanted[3].abs().max())  # of sums of terms so large
        np.testing.assert_allclose(logits, wanted[3][~near], rtol=1e-4, atol=rounding)
    print(f"{name}: {int(near.sum())} of {ROWS} rows near a threshold left out")


def test_what_the_benchmark_measures() -> None:
    found = needed("mlp")
    assert len(found.files) == len(found.arenas) == 3
    assert max(found.files) < found.full_file < sum(found.files)
    assert 0 < found.full_arena < sum(found.arenas)


def test_a_late_input_and_a_batch(tmp_path: Path) -> None:
    folder = tmp_path / "m.tflm"
    check_answers("late-fusion", "entropy", folder, (1, 2, 7, 20))
    loaded, firmware = cet.load_exported(folder), host.Firmware(folder, tmp_path / "m.so")
    inputs = {name: value.numpy() for name, value in FAMILIES["late-fusion"].inputs(40).items()}
    wanted = loaded.predict(**inputs).exit_index.tolist()
    assert set(wanted) == {0, 1}
    rows = zip(*(inputs[given.name] for given in loaded.description.inputs), strict=True)
    assert [firmware.predict(*row).exit_index for row in rows] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "resnet"])
def test_other_nets(name: str, tmp_path: Path) -> None:
    check_answers(name, "entropy", tmp_path / "m.tflm", (64,))


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_scores(score: ScoreName, tmp_path: Path) -> None:
    check_scores(score, tmp_path / "m.tflm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "m.tflm"
    assert "without exits" in str(cet.export(small_model(), path, class_labels=["a", "b", "c"]))
    return path


def test_calls(folder: Path) -> None:
    check_small_file(folder, small_model())


def test_the_loop_in_c_takes_thresholds_and_stops_where_a_stage_fails(tmp_path: Path) -> None:
    model, folder = small_model(), tmp_path / "m.tflm"
    cet.export(model, folder, thresholds="input")
    firmware, x = host.Firmware(folder, tmp_path / "m.so"), torch.randn(30, 4)
    x[3, 1] = torch.nan
    for thresholds in ((0.45, None), (None, 0.5), (0.0, 0.0), (-np.inf, None), (None, np.inf), (None, None)):
        model.policy = cet.ExitPolicy("confidence", thresholds)
        given = np.array([np.nan if threshold is None else threshold for threshold in thresholds], np.float32)
        expected, got = model.predict(x), [firmware.predict(row, thresholds=given) for row in x.numpy()]
        assert [answer.exit_index for answer in got] == expected.exit_index.tolist()
        assert [answer.label for answer in got] == expected.labels.tolist()
        assert got[3].exit_index == 2
        assert np.isnan(got[3].score)
    firmware.run = host.RUN(lambda context, index, inputs, outputs: 7 * index)
    with pytest.raises(RuntimeError, match="a stage failed with 7"):
        firmware.predict(x[0].numpy(), thresholds=np.full(2, np.nan, np.float32))


@pytest.mark.slow
def test_a_stream_is_answered_by_the_loop_in_c(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", EXAMPLE / "stream.py"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    accuracy, exits = out.removeprefix("accuracy ").split("%, exits ")
    assert float(accuracy) > 65  # chance is 33
    assert sum(json.loads(exits)[:-1]) > 0


def test_the_header_is_cpp_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.cpp").write_text('#include "early_exit.h"\nint main() { return cet_stages[0].threshold > 1.0f; }\n')
    compile_c = [*host.C99, "-c", "-I", EXAMPLE, "-I", folder]
    subprocess.run([*compile_c, folder / "model.c", "-o", tmp_path / "model.o"], check=True)
    subprocess.run([*compile_c, EXAMPLE / "early_exit.c", "-o", tmp_path / "loop.o"], check=True)
    command = ["g++", "-I", EXAMPLE, "-I", folder, "m.cpp", "model.o", "loop.o", "-o", "m"]
    subprocess.run(command, check=True, cwd=tmp_path)
    subprocess.run([tmp_path / "m"], check=True)
    fast = subprocess.run([*compile_c, "-ffast-math", EXAMPLE / "early_exit.c"], capture_output=True, text=True)
    assert "a NaN must not leave early" in fast.stderr


def test_a_host_reads_from_the_folder_all_that_its_loop_needs(folder: Path) -> None:
    """In a process without torch."""
    code = """
import json, pathlib, sys
from tflite_micro import runtime

folder = pathlib.Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
assert (manifest["leaves"], manifest["most_rows"]) == ("at or above", 1)
assert [stage["file"] for stage in manifest["stages"]] == ["stage_0.tflite", "stage_2.tflite"]
assert [stage["inputs"] for stage in manifest["stages"]] == [{"input": 0}, {"1/0": 0}]
for stage in manifest["stages"]:
    content = (folder / stage["file"]).read_bytes()
    runtime.Interpreter.from_bytes(content, arena_size=stage["arena_bytes"]).invoke()

import numpy as np
import cet

loaded = cet.load_exported(folder)
assert loaded.predict(np.zeros((2, 4), np.float32)).logits.shape == (2, 3)
assert loaded.arena_bytes == tuple(stage["arena_bytes"] for stage in manifest["stages"])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=120)


def test_constants_are_aligned_and_tensors_have_no_names(folder: Path) -> None:
    from ai_edge_litert.schema_py_generated import Model

    for path in folder.glob("*.tflite"):
        content = path.read_bytes()
        model = Model.GetRootAs(content)
        assert model.SubgraphsLength() == 1
        graph = model.Subgraphs(0)
        assert not any(graph.Tensors(index).Name() for index in range(graph.TensorsLength()))
        base = np.frombuffer(content, np.uint8).ctypes.data
        held = [model.Buffers(index).DataAsNumpy() for index in range(model.BuffersLength())]
        places = [(data.ctypes.data - base) % 16 for data in held if isinstance(data, np.ndarray)]
        assert places
        assert not any(places)


def refused(layer: nn.Module, path: Path, width: int = 4) -> str:
    layers = [nn.Linear(4, width), layer, nn.Linear(width, 3)]
    model = cet.EarlyExit(nn.Sequential(*layers), ["0"], (torch.randn(8, 4),)).eval()
    model.policy = cet.ExitPolicy("entropy", (0.5,))
    with pytest.raises(cet.ExportError) as error:
        cet.export(model, path, batch=1)
    assert not list(path.parent.iterdir())
    return str(error.value)


def test_what_has_no_form_is_refused_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.tflm"
    stage = "the stage that ends in exit 'final'"
    assert f"{stage} has no form in LiteRT" in refused(Svd(), path)
    assert refused(nn.GELU(), path) == (
        f"{stage} needs the operator GELU, which TFLite Micro lacks; compute it with others"
    )
    assert refused(Counting(), path).startswith(f"{stage} fails in the operator ")
    with pytest.raises(cet.ExportError, match=r"exit '1' takes float64, which LiteRT lacks; export model.float"):
        cet.export(small_model().double(), path, (torch.randn(8, 4).double(),))
    with pytest.raises(ValueError, match=r"quantize is for .*, and the format is 'tflite-micro'; leave it out"):
        cet.export(small_model(), path, quantize=[(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))])
    monkeypatch.setattr("cet.deploy.tflite_micro_writer.MOST_ARENA", 3200)
    with pytest.raises(cet.ExportError, match="exit '1' does not fit into an arena of 3200 bytes; export a smaller"):
        cet.export(small_model(), path)
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    """Has a kernel in TFLite Micro, for other types."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x > 0).int().cumsum(1).float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv-lstm", r"exit 'lstm1' fails in the operator CONCATENATION of TFLite Micro \(.*num_inputs <="),
        ("vit", "exit 'vit.layers.0' needs the operator GELU, which"),
        ("bert", "exit 'bert.encoder.layer.0' needs the operator GELU, which"),
    ],
)
def test_nets_that_it_cannot_run(name: str, message: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = cet.EarlyExit(family.build().eval(), family.exits, family.inputs(4)).eval()
    with pytest.raises(cet.ExportError, match=message):
        cet.export(model, tmp_path / "m.tflm", thresholds="input")
    assert not list(tmp_path.iterdir())


def test_a_model_of_which_it_dies_is_refused(folder: Path) -> None:
    content = (folder / "stage_0.tflite").read_bytes()
    with pytest.raises(cet.ExportError, match=r"TFLite Micro dies of stage 0 \(signal 11\); export it as .tflite"):
        arena_of(content, "stage 0", 64)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tflm"
    onnx = tmp_path / "m.stages"
    cet.export(small_model(), onnx)
    manifest = json.loads((folder / MANIFEST).read_text())
    no_model = (onnx / "0.onnx").read_bytes()
    manifest["stages"][0]["sha256"] = sha256(no_model).hexdigest()
    for source, name, content, message in (
        (folder, "stage_0.tflite", None, r"lacks stage_0.tflite, which its manifest names; copy the folder whole"),
        (folder, "stage_2.tflite", b"TFL3", r"stage_2.tflite is not the file of its manifest; copy the folder whole"),
        (folder, MANIFEST, b"{", r"manifest.json is damaged .*; export the model again"),
        (folder, MANIFEST, b'{"model": {"format": "other"}, "stages": []}', "manifest.json has a damaged description"),
        (onnx, "0.onnx", no_model, r"is not for TFLite Micro; give a folder that cet.export wrote as 'tflite-micro'"),
    ):
        shutil.copytree(source, bad)
        (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
        with pytest.raises(cet.ExportError, match=message):
            cet.load_exported(bad)
        shutil.rmtree(bad)
    shutil.copytree(folder, bad)
    (bad / "stage_0.tflite").write_bytes(no_model)
    (bad / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(cet.ExportError, match=r"bad.tflm/stage_0.tflite is no .tflite file; export the model again"):
        cet.load_exported(bad)
    shutil.rmtree(bad)
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json; give the folder that cet.export wrote"):
        cet.load_exported(bad)
    bad.mkdir()
    (bad / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"bad.tflm cannot be written \(it is there, and no folder with a manifest"):
        cet.export(small_model(), bad)


def test_a_package_that_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cet.measure.host.installed_version", lambda package: None)
    missing = r"tflite-micro; pip install 'cet\[tflite-micro\]'"
    with pytest.raises(ModuleNotFoundError, match=f"needs litert-torch and ai-edge-litert and {missing}"):
        cet.export(small_model(), tmp_path / "m.tflm")
    with pytest.raises(ModuleNotFoundError, match=f"a folder for TFLite Micro needs {missing}"):
        cet.load_exported(folder)


def test_memory_is_shared_by_tensors_that_are_not_needed_at_once() -> None:
    stages = [
        StageEntry("0", 0, {"x": 0}, ("a", "b", "c")),  # nobody takes c
        StageEntry("1", 1, {"a": 0}, ("d",)),
        StageEntry("2", 2, {"b": 0, "d": 0}, ("e",)),
        StageEntry("3", 3, {"e": 0, "b": 0}, ()),
    ]
    offsets, total = placed(stages, {"a": 20, "b": 16, "c": 5, "d": 60, "e": 3})
    assert offsets == {"a": 0, "b": 32, "c": 48, "d": 48, "e": 0}
    assert total == 108


def test_numbers_of_c() -> None:
    numbers = [1.0, 0.25, 1e-9, 3e30, -2.0, 0.1, np.inf, -np.inf, None]
    assert [c_number(number) for number in numbers] == [
        *("1.0f", "0.25f", "9.99999972e-10f", "2.99999989e+30f", "-2.0f", "0.100000001f"),
        *("INFINITY", "-INFINITY", "NAN"),
    ]
