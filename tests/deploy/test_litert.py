"""LiteRT files answer as the model does; run by ``make edge``, which installs what they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cet
from cet.deploy import litert_int8
from cet.ops.definitions import SCORE_NAMES, ScoreName
from int8_files import (
    WIDTH,
    check_a_failing_stage_is_named,
    check_int8,
    check_int8_family,
    check_one_row_with_baked_thresholds,
    check_refusals,
)
from stages_in_one_file import (
    Svd,
    check_answers,
    check_bad_files,
    check_scores,
    check_small_file,
    small_model,
)

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


@pytest.mark.parametrize(("name", "score"), [("skip", "entropy"), ("bert", "confidence"), ("resnet", "margin")])
def test_answers_are_those_of_the_model(name: str, score: ScoreName, tmp_path: Path) -> None:
    check_answers(name, score, tmp_path / "m.tflite", (1, 2, 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "vit", "bert", "conv-lstm"])
def test_answers_of_many_rows(name: str, tmp_path: Path) -> None:
    check_answers(name, "entropy", tmp_path / "m.tflite", (64, 333))


def test_one_row_at_a_time(tmp_path: Path) -> None:
    check_answers("late-fusion", "entropy", tmp_path / "m.tflite", (1,) * 20, batch=1)


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_scores(score: ScoreName, tmp_path: Path) -> None:
    check_scores(score, tmp_path / "m.tflite")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "m.tflite"
    report = cet.export(small_model(), path, class_labels=["a", "b", "c"])
    assert "without exits" in str(report)
    return path


def test_calls(file: Path) -> None:
    check_small_file(file, small_model())


def test_a_host_reads_from_the_file_all_that_its_loop_needs(file: Path) -> None:
    """In a process without torch."""
    code = """
import json, sys
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.schema_py_generated import Model

content = open(sys.argv[1], "rb").read()
assert Interpreter(model_content=content).get_signature_list().keys() == {"stage_0", "stage_2"}
model = Model.GetRootAs(content)
names = [model.Metadata(index).Name() for index in range(model.MetadataLength())]
manifest = json.loads(model.Buffers(model.Metadata(names.index(b"cet")).Buffer()).DataAsNumpy().tobytes())
assert (manifest["leaves"], manifest["most_rows"]) == ("at or above", 1)
assert [stage["inputs"] for stage in manifest["stages"]] == [{"input": 0}, {"1/0": 0}]

import numpy as np
import cet

assert cet.load_exported(sys.argv[1]).predict(np.zeros((2, 4), np.float32)).logits.shape == (2, 3)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, file], check=True, timeout=120)


def test_inputs_of_64_bits(file: Path, tmp_path: Path) -> None:
    model = small_model().double()
    with pytest.raises(cet.ExportError, match="the stage that ends in exit '1' takes float64, which LiteRT lacks; exp"):
        cet.export(model, tmp_path / "m.tflite", (torch.randn(8, 4).double(),))
    assert not list(tmp_path.iterdir())
    with pytest.raises(cet.ExportError, match="the stage that ends in exit '1' takes float16, which LiteRT lacks; exp"):
        cet.export(small_model().half(), tmp_path / "m.tflite", (torch.randn(8, 4).half(),))


def test_bad_files(file: Path, tmp_path: Path) -> None:
    import litert_torch

    foreign = litert_torch.convert(nn.ReLU().eval(), (torch.zeros(2),)).model_content()
    check_bad_files(file, foreign, tmp_path, "LiteRT")


def test_what_has_no_form_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = cet.EarlyExit(nn.Sequential(nn.Linear(4, 4), Svd(), nn.Linear(4, 3)), ["0"], (torch.randn(8, 4),)).eval()
    model.policy = cet.ExitPolicy("entropy", (0.5,))
    with pytest.raises(cet.ExportError, match=REFUSED):
        cet.export(model, tmp_path / "m.tflite", batch=1)
    assert not list(tmp_path.iterdir())


REFUSED = "the stage that ends in exit 'final' has no form in LiteRT .*; compute it with operators"


def test_int8(tmp_path: Path) -> None:
    check_int8(tmp_path / "m.tflite")
    assert _layers(tmp_path / "m.tflite") == {
        ((WIDTH, 1, 5, 2), "INT8"),
        ((WIDTH, 1, 5, WIDTH), "INT8"),
        ((2 * WIDTH, 1, 3, WIDTH), "INT8"),
        ((3, WIDTH), "FLOAT32"),
        ((3, 2 * WIDTH), "FLOAT32"),
    }


def _layers(path: Path) -> set[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the weights of all layers."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    weights = [
        graph.tensors[op.inputs[1]]
        for graph in model.subgraphs
        for op in graph.operators
        if flatbuffer_utils.opcode_to_name(model, op.opcodeIndex) in ("CONV_2D", "FULLY_CONNECTED")
    ]
    return {(tuple(map(int, weight.shape)), flatbuffer_utils.type_to_name(weight.type)) for weight in weights}


def test_int8_one_row_at_a_time(tmp_path: Path) -> None:
    check_one_row_with_baked_thresholds(tmp_path / "m.tflite")


@pytest.mark.parametrize("name", ["resnet", "bert", pytest.param("late-fusion", marks=pytest.mark.slow)])
def test_int8_of_other_nets(name: str, tmp_path: Path) -> None:
    check_int8_family(name, tmp_path / "m.tflite")


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    check_refusals(tmp_path, ".tflite")


def test_a_stage_that_the_quantiser_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = litert_int8._written

    def fails_on_the_second(content: bytes, chosen: list[tuple[str, str]], scales: object) -> bytes:
        if any(name.startswith("1/") for _, name in chosen):
            raise RuntimeError("no such scale")
        return written(content, chosen, scales)

    monkeypatch.setattr(litert_int8, "_written", fails_on_the_second)
    check_a_failing_stage_is_named(tmp_path, ".tflite")
