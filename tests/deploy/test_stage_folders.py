"""A folder of stages and the loop over them answer as the model does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cet
from cet.deploy.check import NEAR
from cet.deploy.stages import MANIFEST
from cet.files import OutputError, write_folder_atomically
from cet.ops.definitions import SCORES
from families import FAMILIES
from oracle import policy_between_scores
from thinned import slow


@pytest.mark.parametrize("name", ["late-fusion", slow("bert")])
def test_answers_are_those_of_the_model_at_any_number_of_rows(name: str, tmp_path: Path) -> None:
    """Rows along another dimension, inputs that are used late, a mask, lengths that vary."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    inputs = family.inputs(141)
    model = cet.EarlyExit(family.build().eval(), family.exits, {k: v[:4] for k, v in inputs.items()})
    fractions = [0.5] * (model.num_exits - 1)
    few = {key: value[:64] for key, value in inputs.items()}
    model.policy = policy_between_scores(model, few, "entropy", fractions, (1.5,) * model.num_exits)
    report = cet.export(model, tmp_path / "m.stages", {k: v[:4] for k, v in inputs.items()}, thresholds="input")
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "m.stages").iterdir())
    loaded = cet.load_exported(tmp_path / "m.stages", threads=1)
    with torch.no_grad():
        near = torch.zeros(141, dtype=torch.bool)
        for (_, scores), threshold in zip(model.exit_answers(**inputs), model.policy.thresholds, strict=False):
            near |= (scores - threshold).abs() <= NEAR
    assert near.float().mean() < 0.05
    start = 0
    for rows in (1, 2, 7, 64, 67):
        part = {key: value[start : start + rows] for key, value in inputs.items()}
        sure = ~near[start : start + rows].numpy()
        expected, got = model.predict(**part), loaded.predict(**{key: value.numpy() for key, value in part.items()})
        np.testing.assert_array_equal(got.exit_index[sure], expected.exit_index.numpy()[sure])
        np.testing.assert_allclose(got.logits[sure], expected.logits.numpy()[sure], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.score[sure], expected.score.numpy()[sure], rtol=1e-3, atol=1e-5)
        assert (got.exit_index.dtype, got.score.dtype) == (np.int64, np.float32)
        assert rows < 64 or set(got.exit_index) == set(range(model.num_exits))
        start += rows
    loaded.thresholds = (None,) * (model.num_exits - 1)
    assert set(loaded.predict(**{k: v.numpy() for k, v in few.items()}).exit_index) == {model.num_exits - 1}
    if name == "bert":
        shorter = {key: value[:5, :7] for key, value in inputs.items()}
        loaded.thresholds = model.policy.thresholds
        torch.testing.assert_close(loaded.predict(**shorter).logits, model.predict(**shorter).logits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row at a time, with a second exit that is closed; the first passes on what makes a NaN."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
    model = cet.EarlyExit(nn.Sequential(*layers), ["0", "1"], (torch.randn(8, 4),)).eval()
    model.policy = cet.ExitPolicy("confidence", (0.5, None))
    path = tmp_path_factory.mktemp("stages") / "m.stages"
    cet.export(model, path, batch=1, class_labels=["a", "b", "c"])
    x = torch.randn(60, 4)
    x[7, 0] = torch.nan
    expected, loaded = model.predict(x), cet.load_exported(path, threads=1)
    got = [loaded.predict(row) for row in x.split(1)]
    assert torch.equal(torch.cat([out.exit_index for out in got]), expected.exit_index)
    assert set(expected.exit_index.tolist()) == {0, 2}
    assert expected.exit_index[7] == 2
    torch.testing.assert_close(torch.cat([out.logits for out in got]), expected.logits, equal_nan=True)
    assert loaded.class_labels == ("a", "b", "c")
    with pytest.raises(ValueError, match="thresholds are part of this file"):
        loaded.thresholds = (0.5, 0.5)
    return path


def test_a_host_reads_from_the_folder_all_that_its_loop_needs(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["leaves"] == "at or above"
    assert manifest["model"]["thresholds"] == [0.5, None]
    assert [(stage["file"], stage["exit_index"]) for stage in manifest["stages"]] == [("0.onnx", 0), ("2.onnx", 2)]
    made: set[str] = {"input"}
    for stage in manifest["stages"]:
        model = onnx.load(str(folder / stage["file"]))
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.input] == [*stage["inputs"]]
        assert [value.name for value in model.graph.output] == ["logits", "score", *stage["outputs"]]
        assert made >= stage["inputs"].keys()
        made |= {*stage["outputs"]}
        assert "If" not in {node.op_type for node in model.graph.node}


def test_what_is_low_when_sure_is_the_same_without_torch(folder: Path) -> None:
    from dataclasses import replace

    description = cet.load_exported(folder).description
    for name, score in SCORES.items():
        assert replace(description, score=name).is_low_when_sure == score.is_low_when_sure


def test_folders_that_are_not_whole_are_refused(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.stages"
    newer = (folder / MANIFEST).read_text().replace('"version": 1', '"version": 2')
    for name, content, message in (
        ("0.onnx", None, r"bad.stages lacks 0.onnx, which its manifest names; copy the folder whole"),
        ("2.onnx", (folder / "0.onnx").read_bytes(), "2.onnx is not the file of its manifest"),
        (MANIFEST, b"{", "manifest.json is damaged .*; export the model again"),
        (MANIFEST, b'{"model": {"format": "other"}, "stages": []}', "manifest.json has a damaged description"),
        (MANIFEST, newer.encode(), "has format 2, and this cet reads up to 1; update cet"),
        (MANIFEST, newer.replace("0.onnx", "../0.onnx").replace('"version": 2', '"version": 1').encode(), "lacks"),
    ):
        shutil.copytree(folder, bad)
        (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
        with pytest.raises(cet.ExportError, match=message):
            cet.load_exported(bad)
        shutil.rmtree(bad)
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json; give the folder that cet.export wrote"):
        cet.load_exported(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stages: stages.pop(), r"end at the exits \[0\], not in order and up to the last"),
        (lambda stages: stages.clear(), r"end at the exits \[\]"),
        (lambda stages: stages.reverse(), r"end at the exits \[2, 0\]"),
        (lambda stages: stages[0].update(exit_index=9), r"end at the exits \[9, 2\]"),
        (lambda stages: stages[1].update(inputs={"zz": 0}), "stage 2.onnx takes what no stage before it makes"),
        (lambda stages: stages[0].update(file=3), "stage 3 takes what"),
    ],
)
def test_a_manifest_that_would_leave_rows_without_their_answer_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    bad = tmp_path / "bad.stages"
    shutil.copytree(folder, bad)
    manifest = json.loads((bad / MANIFEST).read_text())
    change(manifest["stages"])
    (bad / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(cet.ExportError, match=f"manifest.json is damaged .*{message}.*; export the model again"):
        cet.load_exported(bad)


def test_a_single_stage_is_no_model(folder: Path) -> None:
    with pytest.raises(cet.ExportError, match=r"0.onnx is one stage of a model; give the folder that it is in"):
        cet.load_exported(folder / "0.onnx")


def test_no_folder_of_others_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cet.EarlyExit(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), ["0"], (torch.randn(2, 4),)).eval()
    model.policy = cet.ExitPolicy("entropy", (0.5,))
    target = tmp_path / "m.stages"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"m.stages cannot be written \(it is there, and no folder with a manifest"):
        cet.export(model, target)
    assert (target / "notes.txt").read_text() == "mine"
    (target / "manifest.json").write_text('{"name": "an app of the web"}')
    with pytest.raises(
        OutputError, match=r"m.stages cannot be written \(it holds manifest.json, which no export wrote"
    ):
        cet.export(model, target)
    ours = tmp_path / "mine" / "ours.stages"
    ours.parent.mkdir()
    cet.export(model, ours)
    cet.export(model, ours)
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"ours.stages cannot be written \(it holds notes.txt, which no export wrote"):
        cet.export(model, ours)
    assert (ours / "notes.txt").read_text() == "mine"

    write_folder_atomically(tmp_path / "f", {"a": b"1", "b": b"2"})
    monkeypatch.setattr("cet.files.os.replace", lambda source, to: (_ for _ in ()).throw(OSError(28, "no room")))
    with pytest.raises(OutputError, match=r"f cannot be written \(no room\)"):
        write_folder_atomically(tmp_path / "f", {"a": b"3"})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == {"a": b"1", "b": b"2"}
    write_folder_atomically(tmp_path / "f", {"a": b"3"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == {"a": b"3"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "m.stages", "mine"]
