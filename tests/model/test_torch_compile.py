"""`torch.compile` of a model: one graph in either mode, one compilation for all numbers of rows, and right answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import cet
from families import FAMILIES, Inputs
from oracle import answer_each_row_alone, assert_same_answers, policy_between_scores

R = torch.randn
SIZES = (7, 64, 33, 2, 1, 0, 5)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting(backend: str = "aot_eager") -> Any:
    return torch._dynamo.testing.CompileCounterWithBackend(backend)


class Net(nn.Module):
    """With what behaves otherwise in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.b = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.top = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.top(self.b(self.a(x)) * scale)


def model_of(net: nn.Module | None = None) -> tuple[cet.EarlyExit, Inputs]:
    """With about half of 40 rows leaving at each exit."""
    model = cet.EarlyExit(net or Net(), ["a", "b"], (R(4, 6),)).eval()
    inputs = {"x": R(40, 6)}
    model.policy = policy_between_scores(model, inputs, "confidence", [0.5, 0.5])
    return model, inputs


@pytest.mark.parametrize("name", ["late-fusion", "skip"])
def test_one_graph_and_one_compilation_for_all_numbers_of_rows(name: str) -> None:
    family = FAMILIES[name]
    model = cet.EarlyExit(family.build(), family.exits, family.inputs(2)).eval()
    inputs = family.inputs(40)
    model.policy = policy_between_scores(model, inputs, "entropy", [0.5] * (model.num_exits - 1))
    expected = answer_each_row_alone(model, inputs, model.policy)
    assert len(expected.exit_index.unique()) == model.num_exits
    backend = counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for rows in SIZES:
            given = {key: value[:rows] for key, value in inputs.items()}
            torch.testing.assert_close(compiled(**given), expected.logits[:rows], rtol=1e-4, atol=1e-4)
    assert backend.frame_count == 1


def test_inductor_and_a_model_within_a_larger_graph() -> None:
    model, inputs = model_of()
    expected = answer_each_row_alone(model, inputs, model.policy)

    def probabilities(x: Tensor) -> tuple[Tensor, cet.ExitOutput]:
        return model(x).softmax(1), model.predict(x)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(inputs["x"]), model(inputs["x"]))
        got, out = torch.compile(probabilities, backend="aot_eager", fullgraph=True)(inputs["x"])
    torch.testing.assert_close(got, expected.logits.softmax(1), rtol=1e-4, atol=1e-4)
    assert_same_answers(out, expected)


def test_what_changes_is_seen() -> None:
    """Weights, policy, backbone, mode, and which of two models it is."""
    model, inputs = model_of()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = inputs["x"]

    def check() -> None:
        with torch.no_grad():
            expected = answer_each_row_alone(model, inputs, model.policy).logits
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)

    check()
    before = compiled(x)
    with torch.no_grad():
        model.backbone.top.weight.mul_(3)
        check()
        model.backbone.b = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
        check()
    model.policy = cet.ExitPolicy("entropy", (None, 0.5))
    check()
    model.train()
    assert len(compiled(x)) == model.num_exits
    model.eval()
    check()
    torch.testing.assert_close(torch.compile(other, backend="eager", fullgraph=True)(x), before)
    weight = model.backbone.top.weight

    def doubled(x: Tensor) -> Tensor:
        with torch.no_grad():
            weight.mul_(2)
        return model(x)

    in_one_graph = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"other weights than the model, as it changes them itself .*another graph"):
        in_one_graph(x)


def test_inputs_by_name_constants_labels_and_autocast() -> None:
    model, inputs = model_of()
    x = inputs["x"]
    y = torch.randint(4, (40,))
    functions: list[Any] = [
        lambda x: model(x=x),
        lambda x: model(x, 1.0),
        lambda x: model(x, labels=y).loss,
        lambda x: model.predict(x).score,
    ]
    for function in functions:
        torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(x), function(x))
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got = torch.compile(model, backend=backend, fullgraph=True)(x)
            expected = model(x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
    with pytest.raises(TypeError, match=r"x has shape \(2, 3, 6\) but had shape"):
        torch.compile(model, backend="eager", fullgraph=True)(R(2, 3, 6))


def test_gradients_in_eval_mode() -> None:
    model, inputs = model_of()
    x = inputs["x"].requires_grad_()
    gradients = []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (x, *model.parameters())])
        x.grad = None
    assert any(bool(gradient.any()) for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


def test_training_with_the_loss_is_one_graph() -> None:
    """With the statistics of batches and dropout; hooks that a user has stay."""
    model, inputs = model_of()
    model.train()
    seen: list[int] = []
    handle = model.backbone.a.register_forward_hook(lambda *_: seen.append(1))
    x, y = inputs["x"], torch.randint(4, (40,)).index_fill(0, torch.tensor([3]), -100)
    loss = cet.ConsistentExitLoss(lambda x: 0.9 * x)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return loss(model, x, y)[0]

    gradients = []
    state = copy.deepcopy(model.state_dict())
    backend = counting()
    for run in (torch.compile(step, backend=backend, fullgraph=True), step):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)
        value = run(x, y)
        value.backward()
        gradients.append([value, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*gradients)
    assert backend.frame_count == 1
    assert seen
    handle.remove()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.manual_seed(3)
    got = compiled(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, model(x))
    assert model.eval().explain(x).reason is None  # what the recording left behind is no obstacle
    out = model.predict(x)
    torch.testing.assert_close(out.logits, copy.deepcopy(model).predict(x).logits)
