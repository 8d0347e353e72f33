"""What `cet.export` and `cet.load_exported` take and refuse, on a net that exports quickly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import cet
from cet.deploy.description import KEY, Description
from cet.deploy.onnx import session_of
from cet.model.check import AnswerMismatchError

CLOSED: tuple[float | None, ...] = (None, None)


def net() -> cet.EarlyExit:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return cet.EarlyExit(nn.Sequential(*layers), ["1", "3"], (torch.randn(8, 4),)).eval()


def opened() -> cet.EarlyExit:
    """With a second exit that is closed, and a first that about half of the rows take."""
    model = net()
    with torch.no_grad():
        scores = cet.ops.exit_score(model.exit_logits(torch.randn(200, 4))[0], "confidence")
    model.policy = cet.ExitPolicy("confidence", (float(scores.median()), None), (1.0, 2.0, 0.5))
    return model


def hooked() -> cet.EarlyExit:
    model = opened()
    model.register_forward_hook(lambda _module, _args, logits: 2 * logits)
    return model


@pytest.fixture(scope="module")
def model() -> cet.EarlyExit:
    return opened()


@pytest.fixture(scope="module")
def file(model: cet.EarlyExit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "one.onnx"
    report = cet.export(model, path, batch=1, class_labels=["a", "b", "c"])
    assert report.num_bytes == path.stat().st_size
    assert report.comparison.rows > 0
    assert "without exits" in str(report)
    return path


def test_one_row_at_a_time(model: cet.EarlyExit, file: Path) -> None:
    """The closed exit is not in the file; labels of classes and exits are."""
    loaded = cet.load_exported(file, threads=1)
    x = torch.randn(300, 4)
    expected = model.predict(x)
    got = [loaded.predict(x[row : row + 1]) for row in range(300)]
    near = (model.exit_answers(x)[0][1] - model.policy.thresholds[0]).abs() <= 1e-4
    exits = torch.cat([out.exit_index for out in got])
    assert torch.equal(exits[~near], expected.exit_index[~near])
    assert {0, 2} == set(exits.tolist())
    torch.testing.assert_close(torch.cat([out.logits for out in got])[~near], expected.logits[~near])
    torch.testing.assert_close(torch.cat([out.score for out in got])[~near], expected.score[~near])
    assert (loaded.exit_names, loaded.class_labels) == (("1", "3", "final"), ("a", "b", "c"))
    assert sum(node.op_type == "If" for node in onnx.load(str(file)).graph.node) == 1
    assert "Gather" not in {node.op_type for node in onnx.load(str(file)).graph.node}  # no index in a batch of one


class RulesOut(nn.Module):
    """Leaves two of three classes."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.where(torch.tensor([True, True, False]), logits, -torch.inf)


def test_one_row_by_entropy_a_class_that_is_ruled_out_and_a_nan(tmp_path: Path) -> None:
    """The entropy of one row has nodes of its own; of NaN no exit is sure. Relu of ONNX Runtime would hide a NaN."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), RulesOut())
    x = torch.randn(64, 4) * 3
    model = cet.EarlyExit(backbone, ["0", "1"], (x,), policy=cet.ExitPolicy("entropy", (0.8, 0.9))).eval()
    x[7, 2] = torch.nan
    cet.export(model, tmp_path / "m.onnx", (x[:4],), batch=1)
    loaded = cet.load_exported(tmp_path / "m.onnx", threads=1)
    got, expected = [loaded.predict(row) for row in x.split(1)], model.predict(x)
    exits = torch.cat([out.exit_index for out in got])
    assert torch.equal(exits, expected.exit_index)
    assert exits.unique().tolist() == [0, 1, 2]
    assert exits[7] == 2
    for name in ("logits", "score"):
        answers = torch.cat([getattr(out, name) for out in got])
        torch.testing.assert_close(answers, getattr(expected, name), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.zeros((2, 4), np.float32),), r"input has shape \(2, 4\) but the file takes \(1, 4\).*batch='dynamic'"),
        ((np.zeros((1, 5), np.float32),), r"shape \(1, 5\) but the file takes \(1, 4\); reshape it"),
        ((np.zeros(4, np.float32),), r"shape \(4,\) but the file takes \(1, 4\)"),
        ((np.zeros((1, 4)),), "input is float64 but the file takes float32; convert it"),
        ((torch.zeros(1, 4, dtype=torch.float16),), "input is float16 but the file takes float32"),
        (([[0.0] * 4],), r"input is list; give a NumPy array or a tensor"),
        ((torch.zeros(1, 4, device="meta"),), "input is on the meta device; give a dense tensor that holds"),
        ((torch.zeros(1, 4).to_sparse(),), "input is nested or sparse_coo; give a dense tensor that holds numbers"),
        ((np.ma.masked_array(np.zeros((1, 4), np.float32)),), "input is a masked array, whose mask would be lost"),
        (({"input": np.zeros((1, 4), np.float32)},), r"input is dict; give .* by name, as in predict\(\*\*batch\)"),
        ((), "input is missing"),
        ((np.zeros((1, 4), np.float32), 1), "2 inputs are given by position; the model takes input"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else value[:20],
)
def test_wrong_inputs_are_refused(file: Path, inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cet.load_exported(file, threads=1).predict(*inputs)


def test_wrong_names_are_refused(file: Path) -> None:
    loaded = cet.load_exported(file, threads=1)
    row = np.zeros((1, 4), np.float32)
    assert loaded.predict(input=row).exit_index.shape == (1,)
    with pytest.raises(TypeError, match="x is no input of this file, which takes input"):
        loaded.predict(input=row, x=row)
    with pytest.raises(TypeError, match="input is given twice"):
        loaded.predict(row, input=row)
    with pytest.raises(ValueError, match=r"thresholds are part of this file; .* thresholds='input'"):
        loaded.thresholds = (0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 2}, ValueError, "batch is 2; give 'dynamic' or 1"),
        ({"thresholds": "fixed"}, ValueError, "thresholds is 'fixed'"),
        ({"format": "tflite"}, ValueError, "format 'tflite' is unknown; choose of 'onnx'"),
        ({"path": "m.bin"}, ValueError, r"m.bin ends in '.bin', which is no known format"),
        ({"path": "m.pte", "format": "onnx"}, ValueError, r"m.pte ends in '.pte', which is not 'onnx'; choose of"),
        ({"path": None}, TypeError, "path is None; give the name of a file"),
        ({"path": b"m.onnx"}, TypeError, "path is b'm.onnx'; give the name of a file"),
        ({"path": "m\0.onnx"}, TypeError, "give the name of a file"),
        ({"quantize": True}, TypeError, "quantize: loader is True; give an iterable of batches"),
        ({"example_inputs": torch.full((2, 4), torch.nan)}, ValueError, "no answer to the example is finite"),
        ({"model": hooked()}, cet.ExportError, "a hook stands on the EarlyExit itself, which no file would run"),
        ({"path": "nowhere/m.onnx"}, OSError, "m.onnx cannot be written"),
        ({"class_labels": ["a"]}, ValueError, "class_labels has 1 entries for 3 classes"),
        ({"class_labels": "abc"}, TypeError, "class_labels is 'abc'; give a list of one string for each class"),
        ({"class_labels": [0, 1, 2]}, TypeError, r"class_labels is \[0, 1, 2\]; give a list of one string"),
        (
            {"class_labels": ["a", "b", "a"]},
            ValueError,
            "class_labels has 'a' twice; give each class a name of its own",
        ),
        ({"example_inputs": torch.randn(0, 4)}, ValueError, "example_inputs has 0 rows; give at least 1"),
        ({"model": nn.Linear(4, 3)}, TypeError, "model is Linear; give a cet.EarlyExit"),
        ({"model": net()}, ValueError, "every exit of model.policy is closed.*set a policy"),
        ({"model": opened().train()}, RuntimeError, "model is in train mode"),
        ({"example_inputs": (torch.zeros(2, 5),)}, cet.ExportError, "the backbone fails on example_inputs"),
        ({"example_inputs": {"y": torch.zeros(2, 4)}}, TypeError, "do not fit the backbone's forward"),
        ({"model": opened().bfloat16()}, cet.ExportError, r"bfloat16, which NumPy lacks; export model.float\(\)"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused_and_nothing_written(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"model": opened(), "path": "m.onnx"} | change
    with pytest.raises(error, match=message):
        cet.export(**arguments)
    assert not list(tmp_path.iterdir())


def test_within_autocast_nothing_is_exported(tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="leave it before export"):
        cet.export(opened(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", ["2", 0, -1, True])
def test_what_is_no_number_of_threads_is_refused(file: Path, threads: Any) -> None:
    with pytest.raises(ValueError, match=r"threads is .*; give a whole number from 1 on, or None"):
        cet.load_exported(file, threads=threads)


class Branches(nn.Module):
    """Takes another way by a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_branches_on_values_are_named(tmp_path: Path) -> None:
    stages = cet.Stages(stem=nn.Linear(4, 8), branch=Branches(), tail=nn.Linear(8, 3))
    model = cet.EarlyExit(stages, ["stem"], (torch.ones(3, 4),), policy=cet.ExitPolicy("entropy", (1.0,))).eval()
    with pytest.raises(cet.ExportError, match=r"cannot trace the stage that ends in exit 'final'.*without branches"):
        cet.export(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_explicit_stages_and_what_changes_in_place(tmp_path: Path) -> None:
    """Values that a later stage changes in place are another tensor there; the tail reads what the stem made."""

    class Body(nn.Module):
        def forward(self, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
            h.add_(1).relu_()
            return h, skip

    class Stem(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x

    class Tail(nn.Module):
        def forward(self, h: Tensor, skip: Tensor) -> Tensor:
            return torch.cat([h, skip], dim=1)

    x = torch.randn(6, 4)
    model = cet.EarlyExit(cet.Stages(stem=Stem(), body=Body(), tail=Tail()), ["stem", "body"], (x,)).eval()
    model.policy = cet.ExitPolicy("confidence", (0.3, 0.2))
    cet.export(model, tmp_path / "m.onnx", (x,), thresholds="input")
    loaded = cet.load_exported(tmp_path / "m.onnx", threads=1)
    for thresholds in ((0.2, 0.2), (None, 0.0), (None, None)):
        loaded.thresholds = thresholds
        model.policy = cet.ExitPolicy("confidence", thresholds)
        expected, got = model.predict(x), loaded.predict(x)
        assert torch.equal(got.exit_index, expected.exit_index)
        torch.testing.assert_close(got.logits, expected.logits)
    with pytest.raises(ValueError, match="1 thresholds were given but the model has 2 early exits"):
        loaded.thresholds = (0.5,)
    for thresholds, error, message in (
        ((0.5, np.nan), ValueError, r"thresholds\[1\] is NaN"),
        ((0.5, 40), ValueError, r"thresholds\[1\] is 40.0, but confidence is at most 1; give a fraction, 0.4 for 40 %"),
        ((0.5, "a"), TypeError, r"thresholds\[1\] is 'a'; give a number"),
        (0.5, TypeError, r"thresholds is 0.5; give a sequence of numbers"),
        (None, TypeError, r"thresholds is None; give a sequence of numbers"),
    ):
        with pytest.raises(error, match=message):
            loaded.thresholds = thresholds  # type: ignore[assignment]


def test_a_file_that_would_answer_otherwise_is_not_written(
    model: cet.EarlyExit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "m.onnx"
    before.write_text("an older file")
    monkeypatch.setattr("cet.deploy.onnx_writer.negated", lambda name, one_row: True)  # sure rows stay, and scores turn
    with pytest.raises(AnswerMismatchError, match="answers otherwise than the model at exit '1'; nothing was written"):
        cet.export(model, before)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older file"]


def test_an_export_leaves_the_model_as_it_was(model: cet.EarlyExit, tmp_path: Path) -> None:
    x = torch.randn(20, 4)
    before, weights = model.predict(x), copy.deepcopy(model.state_dict())
    cet.export(model, tmp_path / "m.onnx")
    assert torch.equal(model.predict(x).logits, before.logits)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def with_description(file: Path, text: str | None) -> bytes:
    written = onnx.load(str(file))
    del written.metadata_props[:]
    if text is not None:
        onnx.helper.set_model_props(written, {KEY: text})
    return written.SerializeToString()


def test_foreign_damaged_and_newer_files_are_refused(file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    own = session_of(str(file), 1).get_modelmeta().custom_metadata_map[KEY]
    assert Description.from_json(own, "file").exits == ("1", "3", "final")
    for content, message in (
        (b"", "cannot read .*bad.onnx"),
        (b"no model", "cannot read .*bad.onnx"),
        (file.read_bytes()[:-500], "cannot read .*bad.onnx|damaged"),
        (with_description(file, None), "bad.onnx was not written by cet.export"),
        (with_description(file, "{"), "bad.onnx has a damaged description"),
        (with_description(file, "[]"), "bad.onnx has a damaged description"),
        (with_description(file, own.replace('"version": 1', '"version": 2')), "has format 2, .* reads up to 1; update"),
        (with_description(file, own.replace('"exits"', '"way_out"')), "damaged description"),
    ):
        bad.write_bytes(content)
        with pytest.raises(cet.ExportError, match=message):
            cet.load_exported(bad)
    with pytest.raises(FileNotFoundError, match=r"missing.onnx is no file; give the path that cet.export wrote"):
        cet.load_exported(tmp_path / "missing.onnx")


def test_any_flipped_bit_is_noticed(file: Path, tmp_path: Path) -> None:
    whole, bad = file.read_bytes(), tmp_path / "bad.onnx"
    for place in torch.linspace(0, len(whole) - 100, 60).long().tolist():  # behind stands the seal itself
        flipped = bytearray(whole)
        flipped[place] ^= 1
        bad.write_bytes(flipped)
        with pytest.raises(cet.ExportError, match=r"bad.onnx is damaged: .*export it again, or remove .*'cet.sha256'"):
            cet.load_exported(bad)


def test_a_file_that_another_tool_has_written_again_is_read(file: Path, tmp_path: Path) -> None:
    whole = onnx.load(str(file))
    again = tmp_path / "again.onnx"
    for edit in (
        lambda: None,
        lambda: onnx.helper.set_model_props(whole, {p.key: p.value for p in whole.metadata_props} | {"site": "here"}),
        lambda: setattr(whole, "doc_string", "edited"),
        lambda: next(p for p in whole.metadata_props if p.key == "site").Clear(),
    ):
        edit()
        onnx.save(whole, str(again))
        assert cet.load_exported(again).exit_names == ("1", "3", "final")


@pytest.mark.parametrize(
    ("suffix", "extra"), [("pte", r"needs executorch; pip install 'cet\[executorch\]'"), ("tflite", r"'cet\[litert\]'")]
)
def test_a_runtime_of_stages_that_is_missing_is_named(
    suffix: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cet.measure.host.installed_version", lambda package: None)
    path = tmp_path / f"m.{suffix}"
    with pytest.raises(ModuleNotFoundError, match=extra):
        cet.export(opened(), path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=extra):
        cet.load_exported(path)


def test_a_runtime_that_is_missing_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cet.measure.host.installed_version", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxruntime; pip install 'cet\[onnx\]'"):
        cet.load_exported(file)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx and .*; pip install 'cet\[onnx\]'"):
        cet.export(opened(), file.with_name("other.onnx"))
