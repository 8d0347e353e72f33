"""Compiled backbones: they work or are refused when they are given, and files have clean names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cet
from oracle import answers_of, policy_that_parts

R = torch.randn
K = 4
ROWS = 9
EXITS = ["a", "b"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@torch.no_grad()
def every_exit(net: Net, heads: Any, x: Tensor) -> list[Tensor]:
    """By hand, from the weights alone."""
    linear = nn.functional.linear
    a = linear(x, net.a.weight, net.a.bias)
    b = linear(torch.tanh(a), net.b.weight, net.b.bias)
    return [heads[0](a), heads[1](b), linear(torch.tanh(b), net.top.weight, net.top.bias)]


def assert_right(model: cet.EarlyExit, net: Net) -> None:
    model.eval()
    x = R(ROWS, 6)
    expected = every_exit(net, model.heads, x)
    for got, wanted in zip(model.exit_logits(x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    model.policy = policy_that_parts(expected)
    answers = answers_of(expected, model.policy)
    got_answers = model.predict(x)
    assert torch.equal(got_answers.exit_index, answers.exit_index)
    torch.testing.assert_close(got_answers.logits, answers.logits, rtol=1e-4, atol=1e-4)
    logits = model.train()(x)
    for got, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    sum(part.sum() for part in logits).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()


BACKENDS = ["eager", "aot_eager"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_backbone_works_or_is_refused_in_one_sentence(backend: str) -> None:
    net = Net().eval()
    try:
        model = cet.EarlyExit(torch.compile(net, backend=backend), EXITS, (R(4, 6),))
    except (TypeError, ValueError) as error:
        assert_names_the_way(error)
        return
    assert model.exit_names == ("a", "b", "final")
    assert_right(model, net)


def assert_names_the_way(error: Exception) -> None:
    message = str(error)
    if "compile" not in message or "\n" in message:
        raise error


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_backbone_that_is_assigned_works_or_is_refused_at_once(backend: str) -> None:
    net = Net().eval()
    model = cet.EarlyExit(net, EXITS, (R(4, 6),))
    model.predict(R(ROWS, 6))
    try:
        model.backbone = torch.compile(net, backend=backend)
    except (TypeError, ValueError) as error:
        assert_names_the_way(error)
    assert_right(model, net)


def compiled(net: Net) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def compiled_in_place(net: Net) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_submodule(net: Net) -> nn.Module:
    net.top = torch.compile(net.top, backend="eager")  # type: ignore[assignment]
    return net


def submodule_compiled_in_place(net: Net) -> nn.Module:
    net.top.compile(backend="eager")
    return net


IN_PLACE = [compiled_in_place, compiled_submodule, submodule_compiled_in_place]


@pytest.mark.parametrize("how", IN_PLACE)
@pytest.mark.parametrize("after", [False, True])
def test_what_is_compiled_in_place_works_or_is_refused_in_one_sentence(
    how: Callable[[Net], nn.Module], after: bool
) -> None:
    net = Net().eval()
    try:
        if not after:
            how(net)
        model = cet.EarlyExit(net, EXITS, (R(4, 6),))
        if after:
            model.predict(R(ROWS, 6))
            how(net)
        assert_right(model, net)
        net.a.weight.data.mul_(3)
        assert_right(model, net)
    except (TypeError, ValueError) as error:
        assert_names_the_way(error)


@pytest.mark.parametrize("how", [compiled, *IN_PLACE])
def test_a_file_of_a_compiled_model_has_clean_names_and_loads_into_a_plain_one(
    how: Callable[[Net], nn.Module], tmp_path: Any
) -> None:
    net = Net().eval()
    try:
        model = cet.EarlyExit(how(net), EXITS, (R(4, 6),)).eval()
    except (TypeError, ValueError) as error:
        assert_names_the_way(error)
        return
    model.policy = cet.ExitPolicy("confidence", (0.3, None))
    model.save(tmp_path / "m")
    assert not [name for name in load_file(tmp_path / "m") if "_orig_mod" in name]
    assert "_orig_mod" not in (tmp_path / "m").read_bytes().decode(errors="replace")
    loaded = cet.load(tmp_path / "m", Net())
    x = R(ROWS, 6)
    torch.testing.assert_close(loaded.predict(x).logits, model.predict(x).logits)
    assert loaded.exit_names == ("a", "b", "final")


def test_a_compiled_model_gives_the_same_answers() -> None:
    """The wrapper itself compiled, as examples of the framework do."""
    net = Net().eval()
    model = cet.EarlyExit(net, EXITS, (R(4, 6),)).eval()
    x = R(ROWS, 6)
    expected = every_exit(net, model.heads, x)
    model.policy = policy_that_parts(expected)
    answers = answers_of(expected, model.policy)
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(got, answers.logits, rtol=1e-4, atol=1e-4)
