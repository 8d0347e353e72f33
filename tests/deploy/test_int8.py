"""Static int8 quantisation: `cet.export(..., quantize=batches)`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import cet
from benchmarks.models import NETS, multi_exit, random_inputs
from cet.deploy.loaded import LoadedModel
from oracle import policy_between_scores
from thinned import slow
from waves import K, samples, trained


@pytest.fixture(scope="module")
def model() -> cet.EarlyExit:
    return trained()


@pytest.fixture(scope="module")
def held_out() -> list[tuple[Tensor, Tensor]]:
    x, y = samples(1000, 1)
    return [*zip(x.split(200), y.split(200), strict=True)]


@pytest.fixture(scope="module")
def exported(
    model: cet.EarlyExit, held_out: list[tuple[Tensor, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[cet.ExportReport, LoadedModel]:
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    report = cet.export(model, path, thresholds="input", quantize=held_out)
    return report, cet.load_exported(path, threads=1)


def test_every_exit_answers_nearly_as_in_float32(
    model: cet.EarlyExit, exported: tuple[cet.ExportReport, LoadedModel]
) -> None:
    x, _ = samples(500, 2)
    for (got, score), (expected, wanted) in zip(exported[1].exit_answers(x), model.exit_answers(x), strict=True):
        spread = expected.std()
        assert 0.001 * spread < (got - expected).abs().mean() < 0.1 * spread
        assert (got.argmax(1) == expected.argmax(1)).double().mean() > 0.96
        assert (score - wanted).abs().mean() < 0.05


def test_the_report_tells_what_int8_changes(
    model: cet.EarlyExit, held_out: list[tuple[Tensor, Tensor]], exported: tuple[cet.ExportReport, LoadedModel]
) -> None:
    report, loaded = exported
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    compared: Any = report.comparison
    assert (compared.rows, compared.labelled) == (1000, 1000)
    pairs = zip(model.exit_answers(x), loaded.exit_answers(x), compared.same, compared.accuracy, strict=True)
    for (plain, _), (small, _), same, (accuracy, in_int8) in pairs:
        assert same == pytest.approx((plain.argmax(1) == small.argmax(1)).double().mean().item())
        assert accuracy == pytest.approx((plain.argmax(1) == y).double().mean().item())
        assert in_int8 == pytest.approx((small.argmax(1) == y).double().mean().item())
    assert "final: the same class for" in str(report)


def test_weights_are_int8_but_for_the_last_layers(exported: tuple[cet.ExportReport, LoadedModel]) -> None:
    def weights(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
        inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        return [*graph.initializer, *(weight for branch in inner for weight in weights(branch))]

    found = [(tuple(w.dims), w.data_type) for w in weights(onnx.load(exported[0].path).graph) if np.prod(w.dims) > 32]
    assert sorted(found) == [
        ((3, 16), onnx.TensorProto.FLOAT),
        ((3, 16), onnx.TensorProto.FLOAT),
        ((3, 32), onnx.TensorProto.FLOAT),
        ((16, 2, 5), onnx.TensorProto.INT8),
        ((16, 16, 5), onnx.TensorProto.INT8),
        ((32, 16, 3), onnx.TensorProto.INT8),
    ]


def test_every_row_takes_the_first_exit_that_its_scores_open(exported: tuple[cet.ExportReport, LoadedModel]) -> None:
    loaded = exported[1]
    x, _ = samples(333, 3)
    every_exit = loaded.exit_answers(x)
    loaded.thresholds = [float(score.median()) for _, score in every_exit[:-1]]
    got = loaded.predict(x)
    leaves = [score <= threshold for (_, score), threshold in zip(every_exit, loaded.thresholds, strict=False)]
    expected = torch.stack([*leaves, torch.ones_like(leaves[0])]).int().argmax(0)
    assert torch.equal(got.exit_index, expected)
    assert got.exit_index.bincount().min() > 30
    logits = torch.stack([logits for logits, _ in every_exit])[expected, torch.arange(333)]
    torch.testing.assert_close(got.logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "batch"), [slow("one.onnx", 1), ("all.stages", "dynamic")])
def test_other_forms_answer_alike(
    model: cet.EarlyExit,
    held_out: list[tuple[Tensor, Tensor]],
    exported: tuple[cet.ExportReport, LoadedModel],
    tmp_path: Path,
    name: str,
    batch: Any,
) -> None:
    cet.export(model, tmp_path / name, batch=batch, thresholds="input", quantize=held_out)
    loaded = cet.load_exported(tmp_path / name, threads=1)
    x, _ = samples(40, 4)
    rows = x.split(1) if batch == 1 else [x]
    got = [torch.cat(parts) for parts in zip(*([a for a, _ in loaded.exit_answers(r)] for r in rows), strict=True)]
    for logits, (expected, _) in zip(got, exported[1].exit_answers(x), strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.15 if batch == 1 else 1e-4)


def test_thresholds_are_calibrated_on_the_file_and_baked_into_another(
    model: cet.EarlyExit,
    held_out: list[tuple[Tensor, Tensor]],
    exported: tuple[cet.ExportReport, LoadedModel],
    tmp_path: Path,
) -> None:
    report, loaded = exported
    with pytest.raises(ValueError, match="costs"):
        cet.calibrate(loaded, held_out)
    calibration = cet.calibrate(loaded, [samples(1000, 9)], 0.05, costs=report.costs, temperature=False)
    assert calibration.report.certificate.certified
    before, model.policy = model.policy, calibration.policy
    try:
        cet.export(model, tmp_path / "baked.onnx", quantize=held_out)
    finally:
        model.policy = before
    x, y = samples(2000, 5)
    baked = cet.load_exported(tmp_path / "baked.onnx", threads=1)
    got = baked.predict(x)
    final, _ = loaded.exit_answers(x)[-1]
    assert (got.exit_index < 2).double().mean() > 0.3
    dropped = (final.argmax(1) == y).double().mean() - (got.logits.argmax(1) == y).double().mean()
    assert dropped <= 0.05
    with pytest.raises(ValueError, match="thresholds='input'"):
        baked.exit_answers(x)


def test_a_row_that_is_not_finite_touches_no_other(exported: tuple[cet.ExportReport, LoadedModel]) -> None:
    x, _ = samples(5, 6)
    loaded, others = exported[1], [0, 1, 3, 4]
    expected = [logits[others] for logits, _ in loaded.exit_answers(x)]
    x[2] = float("nan")
    for (logits, _), wanted in zip(loaded.exit_answers(x), expected, strict=True):
        torch.testing.assert_close(logits[others], wanted, rtol=0, atol=1e-5)


def test_nothing_is_logged(model: cet.EarlyExit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cet.export(model, tmp_path / "a.onnx", quantize=[samples(20, 7)])
    assert not [record for record in caplog.records if record.name == "root"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "a.pt2"}, ValueError, "quantize is for .onnx, .stages, .pte, .tflite, and the format is 'aoti'"),
        ({"quantize": [samples(0, 8)]}, ValueError, "quantize yields no batches"),
        ({"quantize": []}, ValueError, "quantize yields no batches"),
        ({"quantize": [(0 * samples(4, 8)[0], samples(4, 8)[1])]}, ValueError, "one number everywhere.*like those"),
        ({"quantize": 3}, TypeError, "loader"),
        (
            {"quantize": [(torch.randn(4, 3, 40), torch.zeros(4).long())]},
            cet.ExportError,
            "fails on a batch of quantize",
        ),
        ({"quantize": [(torch.randn(4, 40), torch.zeros(4).long())]}, TypeError, r"x has shape \(4, 40\)"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    model: cet.EarlyExit, tmp_path: Path, change: dict[str, Any], error: Any, message: str
) -> None:
    given = {"path": "a.onnx", "quantize": [samples(20, 8)], **change}
    with pytest.raises(error, match=message):
        cet.export(model, tmp_path / given["path"], quantize=given["quantize"])
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_float32_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, K)).double().eval()
    policy = cet.ExitPolicy("entropy", (0.5,))
    model = cet.EarlyExit(net, ["1"], (torch.randn(4, 4).double(),), policy=policy)
    with pytest.raises(cet.ExportError, match="not of float32"):
        cet.export(model, tmp_path / "a.onnx", quantize=[(torch.randn(4, 4).double(), torch.zeros(4).long())])


@pytest.mark.parametrize("batch", ["dynamic", slow(1)])
def test_nodes_of_stages_and_exits_have_names_of_their_own(batch: Any, tmp_path: Path) -> None:
    """In this net a product of the last stage had the name of the last exit's."""
    net = NETS["sensor_cnn"]()
    x = random_inputs(net, 64)
    model = multi_exit(net, x)
    model.policy = policy_between_scores(model, {"x": x}, "entropy", [0.5] * 3)
    path = tmp_path / "net.onnx"
    cet.export(model, path, batch=batch, quantize=[(x, torch.zeros(64, dtype=torch.int64))])

    def names(graph: onnx.GraphProto) -> list[str]:
        inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        return [*(node.name for node in graph.node), *(name for branch in inner for name in names(branch))]

    found = names(onnx.load(path).graph)
    assert len(found) == len(set(found))


def test_samples_that_give_no_finite_answer_are_refused(model: cet.EarlyExit, tmp_path: Path) -> None:
    """One infinity would set the scale of all."""
    x, y = samples(64, 1)
    x[3, 0, 5] = float("inf")
    with pytest.raises(
        cet.ExportError, match="answers a batch of quantize with values that are not finite; leave such"
    ):
        cet.export(model, tmp_path / "net.onnx", quantize=[(x, y)])
    assert not [*tmp_path.iterdir()]


def test_a_file_for_one_row_is_calibrated_on_batches(
    model: cet.EarlyExit, held_out: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    costs = cet.export(model, path, batch=1, thresholds="input", quantize=held_out[:1]).costs
    loaded = cet.load_exported(path, threads=1)
    x, y = held_out[1][0][:40], held_out[1][1][:40]
    rows = [loaded.exit_answers(x[i : i + 1]) for i in range(len(x))]
    for k, (logits, scores) in enumerate(loaded.exit_answers(x)):
        assert torch.equal(logits, torch.cat([row[k][0] for row in rows]))
        assert torch.equal(scores, torch.cat([row[k][1] for row in rows]))
    for logits, scores in loaded.exit_answers(x.numpy()):
        assert isinstance(logits, np.ndarray)
        assert scores.shape == (40,)
    report = cet.calibrate(loaded, [(x, y)], 0.5, costs=costs).report
    assert report.num_samples == 40
    with pytest.raises(ValueError, match="for one row at a time; export with batch='dynamic' for more"):
        loaded.predict(x)
