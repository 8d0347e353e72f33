"""Inputs of many sizes: right at each of them, at once, and `explain` tells how."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cet
from oracle import assert_answers_of_eager_backbone
from thinned import slow

R = torch.randn
K = 4
ROWS = 9
SECONDS = 1.0
"""A call may take no longer, once a few sizes were seen, or no longer than two cuts on a machine that is slow."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """Convolutions with something in between that depends on the length."""

    def __init__(self, between: Callable[[Tensor], Tensor], where: str = "late") -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.Tanh())
        self.b = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.Tanh())
        self.c = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.Tanh())
        self.top = nn.Linear(6, K)
        self.between = between
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(x) if self.where == "input" else x
        h = self.a(h)
        h = self.between(h) if self.where == "early" else h
        h = self.b(h)
        h = self.between(h) if self.where == "late" else h
        return self.top(self.c(h).mean(2))


def pool_when_long(h: Tensor) -> Tensor:
    return 2 * F.avg_pool1d(h, 2) if h.shape[2] > 30 else h


def pad_when_odd(h: Tensor) -> Tensor:
    return F.pad(h, (0, 1), value=3.0) if h.shape[2] % 2 else h


def resize(h: Tensor) -> Tensor:
    return 2 * F.interpolate(h, size=16) if h.shape[2] != 16 else h


def halve(h: Tensor) -> Tensor:
    return 2 * F.interpolate(h, scale_factor=0.5, mode="linear")


def by_ratio(h: Tensor) -> Tensor:
    return h * (h.shape[2] / 20)


def to_windows(h: Tensor) -> Tensor:
    if h.shape[2] % 8:
        h = F.pad(h, (0, 8 - h.shape[2] % 8), value=2.0)
    return h.unflatten(2, (-1, 8)).mean(3) if h.shape[2] > 24 else h


def cut_off(h: Tensor) -> Tensor:
    return h[:, :, : min(h.shape[2], 25)]


def remember_the_first(h: Tensor) -> Tensor:
    return h + (1.0 if h.shape[2] == 20 else 0.0)


def from_a_length_on(h: Tensor) -> Tensor:
    return h * 2 if h.shape[2] >= 22 else h


def table_of_lengths(h: Tensor) -> Tensor:
    return h * {20: 1.0, 21: 2.0}.get(h.shape[2], 3.0)


def loop(h: Tensor) -> Tensor:
    while h.shape[2] > 12:
        h = F.avg_pool1d(h, 2)
    return h


GUARDED: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled when long": pool_when_long,
    "padded when odd": pad_when_odd,
    "resized to a size": resize,
    "resized by a factor": halve,
    "scaled by the length": by_ratio,
    "in windows": to_windows,
    "cut off": cut_off,
    "another at the example's length": remember_the_first,
    "another from a length on": from_a_length_on,
    "looked up by the length": table_of_lengths,
    "pooled in a loop": loop,
}


@pytest.mark.parametrize("where", ["early", slow("late")])
@pytest.mark.parametrize("name", GUARDED)
def test_code_that_depends_on_the_length_is_right_at_every_length(name: str, where: str) -> None:
    model = cet.EarlyExit(Net(GUARDED[name], where).eval(), ["a", "b"], (R(4, 3, 20),)).eval()
    for length in (20, 21, 29, 32, 45, 20):
        assert_answers_of_eager_backbone(model, R(ROWS, 3, length))
    assert model.check(R(ROWS, 3, 33)) is None


@pytest.mark.parametrize("example", [20, 45])
def test_the_example_decides_nothing(example: int) -> None:
    model = cet.EarlyExit(Net(pool_when_long, "input").eval(), ["a", "b"], (R(4, 3, example),)).eval()
    for length in (45, 44, 20, 21, 31, 30):
        assert_answers_of_eager_backbone(model, R(ROWS, 3, length))


def test_code_that_depends_on_the_size_of_the_batch_is_refused() -> None:
    class ByRows(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if h.shape[0] > 5:
                h = h * 2
            return self.top(self.c(self.b(h)).mean(2))

    with pytest.raises((ValueError, RuntimeError), match=r"row"):
        cet.EarlyExit(ByRows(nn.Identity()).eval(), ["a"], (R(4, 3, 20),)).eval().predict(R(ROWS, 3, 20))


def test_two_inputs_whose_lengths_vary_apart() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.a(x)
            other = y if y.shape[2] > x.shape[2] else 2 * y
            return self.top(self.c(self.b(h)).mean(2) + other.mean((1, 2))[:, None])

    model = cet.EarlyExit(Two(nn.Identity()).eval(), ["a"], (R(4, 3, 20), R(4, 3, 30))).eval()
    for first, second in ((20, 30), (20, 10), (25, 30), (30, 30), (31, 30), (30, 31)):
        assert_answers_of_eager_backbone(model, R(ROWS, 3, first), R(ROWS, 3, second))


def test_images_whose_code_looks_at_their_sizes() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3, padding=1)
            self.b = nn.Conv2d(6, 6, 4, stride=2)
            self.top = nn.Linear(6, K)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            if h.shape[2] != h.shape[3]:
                h = F.interpolate(h, size=(h.shape[2], h.shape[2]))
            h = F.pad(h, (0, h.shape[3] % 2, 0, h.shape[2] % 2))
            return self.top(torch.tanh(self.b(h)).mean((2, 3)))

    model = cet.EarlyExit(Padded().eval(), ["a"], (R(4, 3, 8, 8),)).eval()
    for height, width in ((8, 8), (9, 9), (8, 10), (10, 8), (9, 12), (8, 8)):
        assert_answers_of_eager_backbone(model, R(ROWS, 3, height, width))


def max_pooling() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv1d(3, 6, 5), nn.ReLU()),
        nn.MaxPool1d(2),
        nn.Sequential(nn.Conv1d(6, 6, 3), nn.ReLU()),
        nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, K),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.second = kind(3, 6, batch_first=True), kind(6, 6, batch_first=True)
        self.top = nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.second(self.first(x.transpose(1, 2))[0])[0][:, -1])


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "convolutions": (lambda: Net(nn.Identity()), ["a", "b"]),
    "max-pooling": (max_pooling, ["0", "2"]),
    "GRU": (lambda: Recurrent(nn.GRU), ["first"]),
    "LSTM": (lambda: Recurrent(nn.LSTM), ["first"]),
    "RNN": (lambda: Recurrent(nn.RNN), ["first"]),
    "guards": (lambda: Net(to_windows), ["a", "b"]),
    "a loop": (lambda: Net(loop), ["a", "b"]),
}


def build(name: str) -> cet.EarlyExit:
    make, exits = NETS[name]
    return cet.EarlyExit(make().eval(), exits, (R(4, 3, 40),)).eval()


@pytest.mark.parametrize("name", NETS)
def test_a_new_length_never_costs_seconds(name: str) -> None:
    """No call costs more than a cut; one of sizes that vary takes up to three times as long as that of the example."""
    start = time.process_time()
    model = build(name)
    model.predict(R(3, 3, 40))
    cut = time.process_time() - start
    for length in (41, 43):
        model.predict(R(3, 3, length))
    slowest = 0.0
    for length in [*range(44, 92, 3), *range(120, 130)]:
        x = R(3, 3, length)
        start = time.process_time()  # of this process: the machine may be busy with others
        model.predict(x)
        slowest = max(slowest, time.process_time() - start)
    assert slowest < max(SECONDS, 5 * cut)
    for length in (44, 59, 121, 40):
        assert_answers_of_eager_backbone(model, R(ROWS, 3, length))
    assert model.check(R(ROWS, 3, 77)) is None


@pytest.mark.parametrize("name", ["max-pooling", "LSTM"])
def test_the_number_of_programs_stays_small_and_an_answer_without_savings_is_told_once(name: str) -> None:
    model = build(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in range(41, 70):
            model.predict(R(3, 3, length))
    told = [w for w in caught if issubclass(w.category, cet.UncutWarning)]
    assert len(told) <= 1
    for warning in told:
        assert warning.filename == __file__
        assert "\n" not in str(warning.message)
    assert model.explain(R(3, 3, 41)).num_programs <= 8
    if model.explain(R(3, 3, 200)).dynamic_sizes:
        assert not told, "what is cut for all lengths saves at all of them"
    else:
        assert told


def test_a_length_that_recurs_is_answered_the_same_every_time() -> None:
    model = build("LSTM")
    x = {length: R(ROWS, 3, length) for length in (41, 42, 50)}
    for _ in range(6):
        for part in x.values():
            assert_answers_of_eager_backbone(model, part)


# ---- explain --------------------------------------------------------------------------------------------------------


def test_explain_names_programs_sizes_and_stages() -> None:
    model = build("convolutions")
    told = model.explain(R(3, 3, 40))
    assert told.num_programs == 1
    assert len(told.stages) == model.num_exits == 3
    assert not told.reason
    for name in ("a", "b"):
        assert name in str(told)
    for length in (41, 50):
        model.predict(R(3, 3, length))
    told = model.explain(x=R(3, 3, 60))
    assert told.num_programs <= 2
    assert told.dynamic_sizes, "the length of a convolution may vary"
    assert len(told.stages) == 3
    assert str(told).strip()


def test_explain_changes_nothing() -> None:
    model = build("LSTM")
    x = R(3, 3, 40)
    before = model.predict(x)
    policy, programs = model.policy, model.explain(x).num_programs
    for length in (40, 41, 42):
        model.explain(R(3, 3, length))
    assert model.explain(x).num_programs == programs
    assert model.policy is policy
    assert not model.training
    assert torch.equal(model.predict(x).logits, before.logits)


def test_explain_gives_the_reason_where_the_backbone_is_not_cut() -> None:
    model = build("convolutions")
    model.backbone.c.register_forward_hook(lambda _m, _i, output: torch.from_numpy(output.detach().numpy().copy()))
    model.predict(R(3, 3, 40))
    told = model.explain(R(3, 3, 40))
    assert told.reason
    assert told.reason in str(told)


def test_explain_refuses_inputs_that_the_model_refuses() -> None:
    with pytest.raises(TypeError, match="dimensions"):
        build("convolutions").explain(R(3, 40))


# ---- what varies, in tensors that all rows share --------------------------------------------------------------------


def test_a_shared_input_whose_size_varies() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.top = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, K)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            h = torch.tanh(adjacency @ self.a(x))
            return self.top(torch.tanh(adjacency @ self.b(h)).mean(1))

    model = cet.EarlyExit(Graph().eval(), {"a": cet.HeadSpec(layout="channels_last")}, (R(4, 7, 3), R(7, 7))).eval()
    for nodes in (7, 8, 10, 9, 11):
        assert_answers_with_shared(model, R(ROWS, nodes, 3), R(nodes, nodes))


def assert_answers_with_shared(model: cet.EarlyExit, x: Tensor, shared: Tensor) -> None:
    model.policy = cet.ExitPolicy.closed(model.num_exits)
    with torch.no_grad():
        expected = torch.cat([model.backbone(row[None], shared) for row in x])
    torch.testing.assert_close(model.predict(x, shared).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 2, 33])
def test_any_number_of_rows_at_any_length(rows: int) -> None:
    model = build("max-pooling")
    for length in (40, 41, 55, 70):
        got: Any = model.predict(R(rows, 3, length))
        assert got.logits.shape == (rows, K)
    x = R(max(rows, 1), 3, 63)
    with torch.no_grad():
        expected = torch.cat([model.backbone(row[None]) for row in x])
    torch.testing.assert_close(model.predict(x).logits, expected, rtol=1e-4, atol=1e-4)
