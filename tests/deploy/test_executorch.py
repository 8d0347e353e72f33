"""ExecuTorch files answer as the model does; run by ``make edge``, which installs what they need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import cet
from cet.deploy import executorch_int8
from cet.ops.definitions import SCORE_NAMES, ScoreName
from int8_files import (
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

pytest.importorskip("executorch")


@pytest.mark.parametrize(("name", "score"), [("skip", "entropy"), ("bert", "confidence"), ("resnet", "margin")])
def test_answers_are_those_of_the_model(name: str, score: ScoreName, tmp_path: Path) -> None:
    check_answers(name, score, tmp_path / "m.pte", (1, 2, 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "vit", "bert", "conv-lstm"])
def test_answers_of_more_rows_than_a_program_takes_at_once(name: str, tmp_path: Path) -> None:
    check_answers(name, "entropy", tmp_path / "m.pte", (64, 333))


def test_one_row_at_a_time(tmp_path: Path) -> None:
    """Where the lowering fixes the size of the batch, one row is what there is, and the error says so."""
    with pytest.raises(cet.ExportError, match=r"ExecuTorch fails in stage_1 \(.*\).* export with batch=1"):
        check_answers("late-fusion", "entropy", tmp_path / "m.pte", (1,))
    assert not list(tmp_path.iterdir())
    check_answers("late-fusion", "entropy", tmp_path / "m.pte", (1,) * 20, batch=1)


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_scores(score: ScoreName, tmp_path: Path) -> None:
    check_scores(score, tmp_path / "m.pte")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "m.pte"
    report = cet.export(small_model(), path, class_labels=["a", "b", "c"])
    assert "without exits" in str(report)
    return path


def test_calls(file: Path) -> None:
    check_small_file(file, small_model())


def test_a_host_reads_from_the_file_all_that_its_loop_needs(file: Path) -> None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    assert program.method_names == {"cet", "stage_0", "stage_2"}
    manifest = json.loads(program.load_method("cet").execute([])[0])
    assert (manifest["leaves"], manifest["most_rows"]) == ("at or above", 64)
    assert [(stage["file"], stage["inputs"]) for stage in manifest["stages"]] == [
        ("stage_0", {"input": 0}),
        ("stage_2", {"1/0": 0}),
    ]


def test_bad_files(file: Path, tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    check_bad_files(file, to_edge_transform_and_lower(program).to_executorch().buffer, tmp_path, "ExecuTorch")


def test_what_has_no_form_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = cet.EarlyExit(nn.Sequential(nn.Linear(4, 4), Svd(), nn.Linear(4, 3)), ["0"], (torch.randn(8, 4),)).eval()
    model.policy = cet.ExitPolicy("entropy", (0.5,))
    with pytest.raises(cet.ExportError, match=REFUSED):
        cet.export(model, tmp_path / "m.pte", batch=1)
    assert not list(tmp_path.iterdir())


REFUSED = "the stage that ends in exit 'final' has no form in ExecuTorch .*; compute it with operators"


def test_int8(tmp_path: Path) -> None:
    check_int8(tmp_path / "m.pte")


def test_int8_one_row_at_a_time(tmp_path: Path) -> None:
    check_one_row_with_baked_thresholds(tmp_path / "m.pte")


@pytest.mark.parametrize("name", ["resnet", pytest.param("bert", marks=pytest.mark.slow)])
def test_int8_of_other_nets(name: str, tmp_path: Path) -> None:
    check_int8_family(name, tmp_path / "m.pte")


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    check_refusals(tmp_path, ".pte")


def test_a_stage_that_the_quantiser_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, calls = executorch_int8._quantizer, []

    def fails_on_the_second() -> object:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no such scale")
        return made()

    monkeypatch.setattr(executorch_int8, "_quantizer", fails_on_the_second)
    check_a_failing_stage_is_named(tmp_path, ".pte")
