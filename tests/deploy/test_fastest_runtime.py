"""`cet.compile`: the answers of the model, from whatever runtime is fastest, and never from stale weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet
from cet.deploy.check import NEAR
from cet.measure.rounds import Timings
from oracle import answer_each_row_alone, policy_between_scores


class Net(nn.Module):
    """Two inputs of a length that varies, a mask of one, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.mix = nn.LSTM(8, 8, batch_first=True)
        self.top = nn.Linear(12, 4)

    def forward(self, x: Tensor, padding_mask: Tensor, context: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x)).masked_fill(padding_mask[..., None], 0.0)
        return self.top(torch.cat([self.mix(h)[0][:, -1], context], dim=1))


def inputs_of(rows: int, length: int = 9) -> dict[str, Tensor]:
    mask = torch.arange(length) >= torch.randint(2, length + 1, (rows, 1))
    return {"x": torch.randn(rows, length, 3), "padding_mask": mask, "context": torch.randn(rows, 4)}


def model_of() -> cet.EarlyExit:
    torch.manual_seed(0)
    model = cet.EarlyExit(Net(), ["embed"], inputs_of(4)).eval()
    inputs = inputs_of(50)
    with torch.no_grad():
        model.heads[0].linear.weight.mul_(9)
    model.policy = policy_between_scores(model, inputs, "entropy", [0.5])
    return model


@pytest.fixture(autouse=True)
def _onnx_runtime_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are no measurements, so that the choice is the same on each machine."""
    monkeypatch.setattr(
        "cet.deploy.compiled.time_calls",
        lambda calls, *_, **__: Timings.of([{name: 2.0 if name == "pytorch" else 1.0 for name in calls}]),
    )


@pytest.fixture(scope="module")
def compiled() -> cet.CompiledModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cet.deploy.compiled.time_calls",
            lambda calls, *_, **__: Timings.of([{name: 2.0 if name == "pytorch" else 1.0 for name in calls}]),
        )
        return cet.compile(model_of(), inputs_of(5))


def test_answers_are_those_of_every_row_alone(compiled: cet.CompiledModel) -> None:
    assert (compiled.runtime, compiled.num_rows) == ("onnxruntime", None)
    assert re.search(r"onnxruntime answers.*\n +onnxruntime: 1000.000 ms\n +pytorch: 2000.000 ms", str(compiled))
    model = compiled.model
    for rows, length in ((1, 9), (2, 9), (7, 5), (64, 9), (64, 9), (333, 12)):
        inputs = inputs_of(rows, length)
        expected = answer_each_row_alone(model, inputs, model.policy)
        got = compiled.predict(**inputs)
        at_exit = model.exit_answers(**inputs)[0][1]
        sure = (at_exit - model.policy.thresholds[0]).abs() > NEAR
        assert sure.float().mean() > 0.97
        assert torch.equal(got.exit_index[sure], expected.exit_index[sure])
        torch.testing.assert_close(got.logits[sure], expected.logits[sure], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.score[sure], expected.score.float()[sure], rtol=1e-3, atol=1e-4)
    assert compiled(*inputs_of(0).values()).shape == (0, 4)
    with pytest.raises(ValueError, match="context has 3 rows where other inputs have 5"):
        compiled.predict(**{**inputs_of(5), "context": torch.randn(3, 4)})
    with pytest.raises(TypeError, match="x is float64 but the file takes float32"):
        compiled.predict(**{**inputs_of(5), "x": torch.randn(5, 9, 3).double()})


@torch.no_grad()
def a_weight(model: cet.EarlyExit) -> None:
    model.backbone.top.weight.add_(1)


def another_parameter(model: cet.EarlyExit) -> None:
    model.backbone.top.bias = nn.Parameter(torch.ones(4))


def another_submodule(model: cet.EarlyExit) -> None:
    model.backbone.top = nn.Linear(12, 4).eval()


def another_backbone(model: cet.EarlyExit) -> None:
    model.backbone = Net().eval()


def a_head(model: cet.EarlyExit) -> None:
    model.heads[0] = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).eval()


def a_parameter_of_a_head(model: cet.EarlyExit) -> None:
    model.heads[0].linear.bias = nn.Parameter(torch.ones(4))


def the_policy(model: cet.EarlyExit) -> None:
    model.policy = cet.ExitPolicy("entropy", (0.1,))


def a_hook(model: cet.EarlyExit) -> None:
    model.backbone.mix.register_forward_hook(lambda *_: None)


def the_mode(model: cet.EarlyExit) -> None:
    model.train()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (a_weight, "the weights of the model changed since cet.compile; call cet.compile again"),
        (another_parameter, "changed since cet.compile"),
        (another_submodule, "the backbone changed since"),
        (another_backbone, "the backbone changed since"),
        (a_head, "the heads of the model changed since"),
        (a_parameter_of_a_head, "the weights of the model changed since"),
        (the_policy, "the policy of the model changed since"),
        (a_hook, "the backbone changed since"),
        (the_mode, r"model is in train mode; call model.eval\(\) before predict"),
    ],
)
def test_what_has_changed_is_not_answered(change: Callable[[cet.EarlyExit], None], what: str) -> None:
    from cet.deploy.compiled import Seal

    model = model_of()
    seal = Seal(model)
    model.predict(**inputs_of(3))
    seal.check()
    change(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=what):
            seal.check()


class Shifted(nn.Module):
    """With an optional input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.top(h if shift is None else h + shift)


def test_an_optional_input_more_is_answered_by_the_model() -> None:
    model = cet.EarlyExit(Shifted(), ["a"], (torch.randn(4, 4),), policy=cet.ExitPolicy("confidence", (0.4,))).eval()
    compiled = cet.compile(model)
    assert compiled.runtime == "onnxruntime"
    x, shift = torch.randn(6, 4), torch.randn(6, 8)
    for kwargs in ({}, {"shift": shift}, {}):
        torch.testing.assert_close(compiled(x, **kwargs), model(x, **kwargs))


def test_one_row_and_what_has_no_form_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    model = cet.EarlyExit(net, ["1"], (torch.randn(4, 4),), policy=cet.ExitPolicy("confidence", (0.4,)))
    one = cet.compile(model, (torch.randn(1, 4),))
    x = torch.randn(6, 4)
    for given in (x[:1], x[1:2], x):  # the last by the model itself
        assert torch.equal(one.predict(given).exit_index, model.predict(given).exit_index)
    assert one.num_rows == 1
    one.predict(x[:1])
    with torch.no_grad():
        model.backbone[2].weight.add_(1)
    for given in (x[:1], x):  # of the kind that was answered before, and of another
        with pytest.raises(RuntimeError, match=r"the weights of the model changed since cet.compile"):
            one.predict(given)
    with pytest.raises(RuntimeError, match=r"train mode; call model.eval\(\) before cet.compile"):
        cet.compile(model.train())
    with pytest.raises(TypeError, match=r"model is Sequential; give a cet.EarlyExit"):
        cet.compile(net)  # type: ignore[arg-type]
    monkeypatch.setattr("cet.deploy.compiled.installed_version", lambda package: None)
    alone: Any = cet.compile(model.eval())
    assert alone.runtime == "pytorch"
    assert "onnxruntime: onnx and onnxscript and onnxruntime is not installed; pip install 'cet[onnx]'" in str(alone)
    assert torch.equal(alone(x), model(x))
