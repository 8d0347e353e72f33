"""OpenVINO reads the files of ONNX; run by ``make edge``, which installs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import cet
from cet.deploy.loaded import Array, LoadedModel, Thresholds
from cet.ops.definitions import ScoreName
from stages_in_one_file import check_answers

openvino = pytest.importorskip("openvino")


class InOpenVino(LoadedModel):
    def __init__(self, path: Path) -> None:
        super().__init__(cet.load_exported(path).description)
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = openvino.Core().compile_model(path, "CPU", settings)
        self._closed = -np.inf if self.description.is_low_when_sure else np.inf

    def run(self, arrays: Sequence[Array], thresholds: Thresholds) -> tuple[Array, Array, Array]:
        feeds = dict(zip((given.name for given in self.description.inputs), arrays, strict=True))
        feeds["thresholds"] = np.array([self._closed if t is None else t for t in thresholds], np.float32)
        answers = self._compiled({name: feeds[name] for name in self._given})
        logits, exit_index, score = (answers[name] for name in ("logits", "exit_index", "score"))
        return logits, exit_index, score

    @property
    def _given(self) -> list[str]:
        return [given.any_name for given in self._compiled.inputs]


FAMILIES: list[tuple[str, ScoreName]] = [
    ("skip", "entropy"),
    ("conv-lstm", "confidence"),
    ("late-fusion", "margin"),
    ("resnet", "margin"),
    ("vit", "confidence"),
    ("bert", "entropy"),
]


@pytest.mark.parametrize(("name", "score"), FAMILIES)
def test_answers_are_those_of_the_model(name: str, score: ScoreName, tmp_path: Path) -> None:
    check_answers(name, score, tmp_path / "m.onnx", (1, 2, 7, 64), load=InOpenVino)


@pytest.mark.parametrize(("name", "score"), FAMILIES)
def test_one_row_at_a_time(name: str, score: ScoreName, tmp_path: Path) -> None:
    check_answers(name, score, tmp_path / "m.onnx", (1,) * 20, batch=1, load=InOpenVino)


@pytest.mark.parametrize(("name", "score"), [("skip", "entropy"), ("vit", "confidence")])
def test_branches_one_behind_the_other(
    name: str, score: ScoreName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cet.deploy.onnx_writer._MOST_COPIED", -1)
    check_answers(name, score, tmp_path / "m.onnx", (1, 2, 7, 64), load=InOpenVino)
    check_answers(name, score, tmp_path / "row.onnx", (1,) * 20, batch=1, load=InOpenVino)
