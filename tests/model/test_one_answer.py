"""One model, one answer: whatever changes the backbone or a head after the first call shows in all calls alike."""

from __future__ import annotations

import copy
import enum
import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import cet
from adapters import LoraLinear
from oracle import assert_answers_of_eager_backbone, exit_logits_of_eager_backbone
from thinned import kept, sampled

R = torch.randn
K = 4
WIDTH = 8
ROWS = 9


class Kind(enum.Enum):
    PLAIN = 1
    SQUARED = 2


class Block(nn.Module):
    """A layer whose answer depends on attributes of every common kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.more = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.named = nn.ModuleDict({"one": nn.Linear(WIDTH, WIDTH)})
        self.sequence = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.slot: nn.Module | None = None
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(1.0)
        self.register_buffer("offset", torch.linspace(-1, 1, WIDTH))
        self.gain = 1.5
        self.power = 1
        self.flip = False
        self.maybe: float | None = None
        self.kind = "tanh"
        self.choice = Kind.PLAIN
        self.pair = (1.0, 0.5)
        self.gains = [1.0, 0.5]
        self.table = {"gain": 0.5}
        self.config = types.SimpleNamespace(gain=0.5)
        self.shift = torch.linspace(0, 1, WIDTH)
        self.array = np.ones(1)
        self.function: Callable[[Tensor], Tensor] = torch.sin

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x) * self.gain + self.shift + self.offset
        for layer in self.more:
            h = h + layer(h)
        for layer in self.named.values():
            h = h + layer(h)
        h = h + self.sequence(h)
        if self.slot is not None:
            h = self.slot(h)
        h = h.flip(1) if self.flip else h
        h = h**self.power
        h = h + (0.0 if self.maybe is None else self.maybe)
        h = torch.tanh(h) if self.kind == "tanh" else torch.sigmoid(h)
        h = h * h if self.choice is Kind.SQUARED else h
        h = h * self.pair[0] + self.pair[1] + sum(self.gains) * self.table["gain"] * self.config.gain
        return self.norm(h + self.function(h) * float(self.array[0])) + self.scaled(h)

    def scaled(self, h: Tensor) -> Tensor:
        return 0.1 * h


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Sines(Block):
    def scaled(self, h: Tensor) -> Tensor:
        return torch.sin(3 * h)


class Convolutions(nn.Module):
    """Features that heads pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv1d(3, WIDTH, 3, padding=1), nn.Tanh())
        self.b = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Tanh())
        self.c = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Tanh())
        self.top = nn.Linear(WIDTH, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.c(self.b(self.a(x))).mean(2))


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(), nn.Linear(WIDTH, WIDTH), Block()
        self.top = nn.Linear(WIDTH, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.c(self.b(self.a(x))))


def build(backbone: nn.Module | None = None, **options: Any) -> cet.EarlyExit:
    return cet.EarlyExit((backbone or Net()).eval(), ["a", "b"], (R(4, WIDTH),), **options).eval()


def twice(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def halved_input(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] / 2,)


def hook_of_keywords(_module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
    return output + 1


def replaced_forward(block: Block) -> None:
    original = block.layer.forward
    block.layer.forward = lambda x: torch.relu(original(x))  # type: ignore[method-assign]


def replaced_method(block: Block) -> None:
    block.scaled = lambda h: torch.cos(h)  # type: ignore[method-assign]


def replaced_bound_method(block: Block) -> None:
    block.forward = types.MethodType(lambda self, x: torch.relu(self.layer(x)), block)  # type: ignore[method-assign]


def other_class(block: Block) -> None:
    block.__class__ = Sines


def in_place(block: Block) -> None:
    block.shift.mul_(3)


def under_inference_mode(block: Block) -> None:
    with torch.inference_mode():
        block.shift.mul_(3)


def data_in_place(block: Block) -> None:
    block.shift.data.mul_(3)


def parametrized(block: Block) -> None:
    parametrize.register_parametrization(block.layer, "weight", Doubled())


def parametrized_twice(block: Block) -> None:
    parametrized(block)
    parametrized(block)


def normed_weights(block: Block) -> None:
    parametrizations.weight_norm(block.layer)
    block.layer.parametrizations.weight.original0.data.mul_(3)


CHANGES: dict[str, Callable[[Block], Any]] = {
    "a forward hook": lambda b: b.layer.register_forward_hook(twice),
    "a forward hook on the whole block": lambda b: b.register_forward_hook(twice),
    "a forward hook with keywords": lambda b: b.norm.register_forward_hook(hook_of_keywords, with_kwargs=True),
    "a forward pre-hook": lambda b: b.layer.register_forward_pre_hook(halved_input),
    "a forward pre-hook on the whole block": lambda b: b.register_forward_pre_hook(halved_input),
    "a replaced forward of a layer": replaced_forward,
    "a replaced forward of the block": replaced_bound_method,
    "a replaced method": replaced_method,
    "another class": other_class,
    "a float": lambda b: setattr(b, "gain", 0.5),
    "a float of a library's layer": lambda b: setattr(b.norm, "eps", 1.0),
    "an int": lambda b: setattr(b, "power", 2),
    "a bool": lambda b: setattr(b, "flip", True),
    "True for 1": lambda b: setattr(b, "maybe", True),
    "None for a float": lambda b: setattr(b, "maybe", 0.7),
    "a string": lambda b: setattr(b, "kind", "sigmoid"),
    "an enum": lambda b: setattr(b, "choice", Kind.SQUARED),
    "a tuple": lambda b: setattr(b, "pair", (2.0, 0.1)),
    "another list": lambda b: setattr(b, "gains", [3.0]),
    "an entry of a list": lambda b: b.gains.append(2.0),
    "an entry of a dict": lambda b: b.table.update(gain=2.0),
    "an attribute of a config object": lambda b: setattr(b.config, "gain", 2.0),
    "a tensor": lambda b: setattr(b, "shift", torch.linspace(2, -2, WIDTH)),
    "a tensor in place": in_place,
    "a tensor in place in inference mode": under_inference_mode,
    "a tensor's data in place": data_in_place,
    "a NumPy array": lambda b: setattr(b, "array", np.full(1, 3.0)),
    "an entry of a NumPy array": lambda b: b.array.fill(3.0),
    "a function": lambda b: setattr(b, "function", torch.cos),
    "a buffer": lambda b: setattr(b, "offset", torch.linspace(2, -2, WIDTH)),
    "a buffer in place": lambda b: b.offset.mul_(3),
    "a buffer that becomes an attribute": lambda b: (delattr(b, "offset"), setattr(b, "offset", torch.ones(WIDTH))),
    "a parameter for a buffer": lambda b: (
        delattr(b, "offset"),
        b.register_parameter("offset", nn.Parameter(torch.ones(WIDTH))),
    ),
    "no bias": lambda b: setattr(b.layer, "bias", None),
    "a submodule appended to a ModuleList": lambda b: b.more.append(nn.Linear(WIDTH, WIDTH)),
    "a submodule removed from a ModuleList": lambda b: b.more.pop(0),
    "a submodule added to a ModuleDict": lambda b: b.named.update({"two": nn.Linear(WIDTH, WIDTH)}),
    "a submodule appended to a Sequential": lambda b: b.sequence.append(nn.Tanh()),
    "a submodule for None": lambda b: setattr(b, "slot", nn.Linear(WIDTH, WIDTH)),
    "another submodule": lambda b: setattr(b, "layer", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())),
    "two submodules exchanged": lambda b: b._modules.update(layer=b.sequence[0], sequence=nn.Sequential(b.layer)),
    "a parametrization": parametrized,
    "two parametrizations": parametrized_twice,
    "weight norm": normed_weights,
    "spectral norm": lambda b: parametrizations.spectral_norm(b.layer),
    "weight norm by hooks": lambda b: torch.nn.utils.weight_norm(b.layer).weight_g.data.mul_(3),
    "pruning": lambda b: prune.l1_unstructured(b.layer, "weight", 0.5),
    "dropout of a submodule that trains": lambda b: (b.sequence.append(b.drop), b.drop.train()),
}
# One of each kind: hooks, code, attributes, tensors, submodules, weights, modes.
ALWAYS = [
    "a forward hook",
    "a replaced forward of a layer",
    "another class",
    "a float",
    "an entry of a dict",
    "a tensor in place",
    "an entry of a NumPy array",
    "a buffer",
    "no bias",
    "a submodule appended to a ModuleList",
    "a parametrization",
    "weight norm by hooks",
    "dropout of a submodule that trains",
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Where a change cannot be cut, the answer comes from the uncut backbone with a warning, tested on its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", kept(CHANGES, *ALWAYS))
def test_a_change_after_the_first_call_shows_in_the_next(name: str) -> None:
    """In the stage before the first exit and in the one behind the last."""
    model, x = build(), R(ROWS, WIDTH)
    before = assert_answers_of_eager_backbone(model, x)
    for where in ("a", "c"):
        CHANGES[name](model.backbone.get_submodule(where))
    after = assert_answers_of_eager_backbone(model, x)
    for k in (0, -1):
        assert not torch.allclose(before[k], after[k], atol=1e-3), "the change changes nothing: the test is void"
    assert model.check(x) is None


UNDONE: dict[str, Callable[[Block], Callable[[], Any]]] = {
    "a forward hook removed": lambda b: b.layer.register_forward_hook(twice).remove,
    "a replaced forward deleted": lambda b: (replaced_forward(b), lambda: delattr(b.layer, "forward"))[1],
    "a parametrization removed": lambda b: (
        parametrized(b),
        lambda: parametrize.remove_parametrizations(b.layer, "weight", leave_parametrized=True),
    )[1],
    "one of two parametrizations removed": lambda b: (
        parametrized_twice(b),
        lambda: b.layer.parametrizations.weight.__delitem__(1),
    )[1],
    "a parametrization's own attribute": lambda b: (
        parametrize.register_parametrization(b.layer, "weight", Clipped(0.3)),
        lambda: setattr(b.layer.parametrizations.weight[0], "limit", 0.05),
    )[1],
    "a pruning made permanent": lambda b: (
        prune.l1_unstructured(b.layer, "weight", 0.5),
        lambda: prune.remove(b.layer, "weight"),
    )[1],
    "pruned once more": lambda b: (
        prune.l1_unstructured(b.layer, "weight", 0.3),
        lambda: prune.l1_unstructured(b.layer, "weight", 0.3),
    )[1],
    "a weight norm by hooks removed": lambda b: (
        torch.nn.utils.weight_norm(b.layer),
        lambda: torch.nn.utils.remove_weight_norm(b.layer),
    )[1],
    "a submodule taken away again": lambda b: (
        b.more.append(nn.Linear(WIDTH, WIDTH)),
        lambda: b.more.__delitem__(1),
    )[1],
}


class Clipped(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(-self.limit, self.limit)


@pytest.mark.parametrize("name", sampled(UNDONE, 3))
def test_a_change_that_is_undone_after_a_call_shows_in_the_next(name: str) -> None:
    model, x = build(), R(ROWS, WIDTH)
    for where in ("a", "c"):
        undo = UNDONE[name](model.backbone.get_submodule(where))
        assert_answers_of_eager_backbone(model, x)
        undo()
        assert_answers_of_eager_backbone(model, x)
    assert model.check(x) is None


def test_a_change_back_and_forth_shows_every_time() -> None:
    model, x = build(), R(ROWS, WIDTH)
    first = assert_answers_of_eager_backbone(model, x)[-1]
    for gain in (0.5, 1.5, 0.5, 1.5):
        model.backbone.c.gain = gain
        latest = assert_answers_of_eager_backbone(model, x)[-1]
    torch.testing.assert_close(latest, first)


def test_a_change_before_the_model_is_made_is_in_it() -> None:
    for name in ("a forward hook", "a replaced forward of a layer", "a parametrization", "weight norm by hooks"):
        net = Net()
        CHANGES[name](net.a)
        CHANGES[name](net.c)
        model = build(net)
        assert_answers_of_eager_backbone(model, R(ROWS, WIDTH))
        assert model.check(R(ROWS, WIDTH)) is None


def test_a_forward_that_was_replaced_before_the_model_is_made_is_in_it() -> None:
    """By a function that holds on to the module itself."""
    net = Straight()
    net.forward = lambda x: net.top(torch.relu(net.b(torch.relu(net.a(x)))))  # type: ignore[method-assign]
    model = build(net)
    assert_answers_of_eager_backbone(model, R(ROWS, WIDTH))
    net.b = nn.Linear(WIDTH, WIDTH)
    assert_answers_of_eager_backbone(model, R(ROWS, WIDTH))


@pytest.mark.parametrize("how", ["default", "keyword", "closure", "global"])
def test_a_replaced_forward_reads_the_weights_wherever_they_are(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights move as a model goes to another dtype and back, and the function reaches them by its own ways."""
    net = Straight()
    layer, bias = net.b, 3.0
    monkeypatch.setitem(globals(), "LAYER", layer)
    forwards: dict[str, Any] = {
        "default": lambda x, m=layer: F.linear(x, m.weight) + bias,
        "keyword": lambda x, *, m=layer: F.linear(x, m.weight) + bias,
        "closure": lambda x: F.linear(x, layer.weight) + bias,
        "global": lambda x: F.linear(x, LAYER.weight) + bias,  # type: ignore[name-defined]  # noqa: F821
    }
    layer.forward = forwards[how]
    model, x = build(net), R(ROWS, WIDTH)
    before = assert_answers_of_eager_backbone(model, x)[-1]
    model.double().float()
    with torch.no_grad():
        layer.weight.mul_(2)
    after = assert_answers_of_eager_backbone(model, x)[-1]
    assert not torch.allclose(before, after, atol=1e-3)
    assert model.explain(x).reason is None


CONV_CHANGES: dict[str, Callable[[nn.Conv1d], Any]] = {
    "stride": lambda c: setattr(c, "stride", (2,)),
    "padding": lambda c: (setattr(c, "padding", (2,)), setattr(c, "_reversed_padding_repeated_twice", [2, 2])),
    "dilation": lambda c: setattr(c, "dilation", (2,)),
    "padding mode": lambda c: setattr(c, "padding_mode", "reflect"),
}


@pytest.mark.parametrize("name", sampled(CONV_CHANGES, 2))
def test_an_attribute_of_a_convolution_shows_in_the_next_call(name: str) -> None:
    model, x = cet.EarlyExit(Convolutions().eval(), ["a", "b"], (R(4, 3, 16),)).eval(), R(ROWS, 3, 16)
    for where in ("a", "c"):
        assert_answers_of_eager_backbone(model, x)
        CONV_CHANGES[name](model.backbone.get_submodule(where)[0])
        assert_answers_of_eager_backbone(model, x)
    assert model.check(x) is None


def test_a_hook_on_the_backbone_itself_shows_in_the_next_call() -> None:
    model, x = build(), R(ROWS, WIDTH)
    for add in (
        lambda: model.backbone.register_forward_hook(twice),
        lambda: model.backbone.register_forward_pre_hook(halved_input),
    ):
        handle = add()
        assert_answers_of_eager_backbone(model, x)
        handle.remove()
        assert_answers_of_eager_backbone(model, x)


def test_a_replaced_forward_of_the_backbone_shows_in_the_next_call() -> None:
    model, x = build(), R(ROWS, WIDTH)
    assert_answers_of_eager_backbone(model, x)
    net = model.backbone
    net.forward = lambda x: net.top(net.c(torch.relu(net.b(net.a(x)))))  # type: ignore[method-assign]
    assert_answers_of_eager_backbone(model, x)


def test_a_hook_on_all_modules_shows_in_the_next_call() -> None:
    model, x = build(), R(ROWS, WIDTH)
    assert_answers_of_eager_backbone(model, x)

    def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output + 0.1 if type(module) is nn.LayerNorm else None

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_answers_of_eager_backbone(model, x)
    finally:
        handle.remove()
    assert_answers_of_eager_backbone(model, x)


def test_a_hook_that_reads_a_variable_follows_the_variable() -> None:
    model, x, gain = build(), R(ROWS, WIDTH), [2.0]
    model.backbone.c.register_forward_hook(lambda _module, _inputs, output: output * gain[0])
    assert_answers_of_eager_backbone(model, x)
    gain[0] = 5.0
    assert_answers_of_eager_backbone(model, x)


def test_a_hook_that_collects_activations_gets_those_of_the_call() -> None:
    model, x, seen = build(), R(ROWS, WIDTH), []
    model.predict(x)
    model.backbone.c.layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    for _ in range(2):
        seen.clear()
        model.predict(x)
        collected = [value for value in seen if tuple(value.shape) == (ROWS, WIDTH)]
        with torch.no_grad():
            seen.clear()
            model.backbone(x)
        assert len(collected) == 1
        assert type(collected[0]) is Tensor
        torch.testing.assert_close(collected[0], seen[0])


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def test_a_replaced_forward_of_a_class_shows_in_the_next_call() -> None:
    model, x = build(), R(ROWS, WIDTH)
    assert_answers_of_eager_backbone(model, x)
    with replaced(Block, "forward", lambda self, x: torch.tanh(self.layer(x))):
        assert_answers_of_eager_backbone(model, x)
    assert_answers_of_eager_backbone(model, x)


# A hook of NumPy, and code that decides by a value, are beyond torch.export.
UNCUTTABLE: dict[str, Callable[[Block], Any]] = {
    "a hook of NumPy": lambda b: b.register_forward_hook(
        lambda _module, _inputs, output: torch.from_numpy(np.sort(output.detach().numpy(), axis=1))
    ),
    "a forward of NumPy": lambda b: setattr(
        b.layer, "forward", lambda x: torch.from_numpy(np.tanh(x.detach().numpy()))
    ),
    "a NumPy function": lambda b: setattr(b, "function", lambda h: torch.from_numpy(np.cos(h.detach().numpy()))),
}


@pytest.mark.parametrize("name", UNCUTTABLE)
def test_what_cannot_be_cut_is_answered_by_the_uncut_backbone_with_one_warning(name: str) -> None:
    model, x = build(), R(ROWS, WIDTH)
    assert_answers_of_eager_backbone(model, x)
    UNCUTTABLE[name](model.backbone.c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_answers_of_eager_backbone(model, x)
            assert_answers_of_eager_backbone(model, R(3, WIDTH))
    uncut = [w for w in caught if issubclass(w.category, cet.UncutWarning)]
    assert len(uncut) == 1
    assert issubclass(cet.UncutWarning, UserWarning)
    assert "\n" not in str(uncut[0].message)
    assert model.check(x) is None


def test_a_hook_that_mixes_rows_is_refused_or_never_lets_them_mix() -> None:
    model, x = build(), R(ROWS, WIDTH)
    model.predict(x)
    model.backbone.c.register_forward_hook(lambda _module, _inputs, output: output - output.mean(0))
    with pytest.raises((ValueError, RuntimeError), match="row"):
        model.predict(x)


# ---- heads ----------------------------------------------------------------------------------------------------------

HEAD_CHANGES: dict[str, Callable[[cet.EarlyExit], Any]] = {
    "a hook on the head": lambda m: m.heads[0].register_forward_hook(twice),
    "a pre-hook on its layer": lambda m: m.heads[0].linear.register_forward_pre_hook(halved_input),
    "a replaced forward of the head": lambda m: setattr(
        m.heads[0], "forward", lambda f, linear=m.heads[0].linear: linear(torch.relu(f))
    ),
    "a replaced forward of its layer": lambda m: setattr(
        m.heads[0].linear, "forward", lambda f, w=m.heads[0].linear.weight: torch.tanh(f @ w.T)
    ),
    "another head": lambda m: m.heads.__setitem__(0, nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, K))),
    "another layer": lambda m: setattr(m.heads[0], "linear", nn.Linear(WIDTH, K)),
    "a layer without bias": lambda m: setattr(m.heads[0].linear, "bias", None),
    "a parametrization": lambda m: parametrize.register_parametrization(m.heads[0].linear, "weight", Doubled()),
    "pruning": lambda m: prune.l1_unstructured(m.heads[0].linear, "weight", 0.5),
    "weight norm by hooks": lambda m: torch.nn.utils.weight_norm(m.heads[0].linear).weight_g.data.mul_(3),
    "a hidden layer": lambda m: setattr(m.heads[0], "hidden", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())),
    "a norm": lambda m: setattr(m.heads[0], "norm", nn.LayerNorm(WIDTH)),
    "weights in place": lambda m: m.heads[0].linear.weight.data.mul_(3),
    "a low-rank adapter": lambda m: setattr(m.heads[0], "linear", LoraLinear(m.heads[0].linear)),
}


@pytest.mark.parametrize("name", HEAD_CHANGES)
def test_a_change_of_a_head_shows_in_the_next_call(name: str) -> None:
    model, x = build(Straight()), R(ROWS, WIDTH)
    before = assert_answers_of_eager_backbone(model, x)
    HEAD_CHANGES[name](model)
    after = assert_answers_of_eager_backbone(model, x)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert model.check(x) is None


# ---- adapters -------------------------------------------------------------------------------------------------------


ADAPTER_STEPS: dict[str, Callable[[LoraLinear], Any]] = {
    "scaling": lambda lora: lora.scaling.update(one=5.0),
    "disabled": lambda lora: setattr(lora, "_disable_adapters", True),
    "enabled": lambda lora: setattr(lora, "_disable_adapters", False),
    "another adapter": lambda lora: setattr(lora, "_active_adapter", ["two"]),
    "both adapters, in place": lambda lora: lora._active_adapter.append("one"),
    "merged": lambda lora: lora.merge(),
    "unmerged": lambda lora: lora.unmerge(),
    "trained": lambda lora: lora.lora_B["two"].weight.data.add_(0.3),
}


def test_every_step_of_an_adapters_life_shows_in_the_next_call() -> None:
    net = Net()
    for block in (net.a, net.c):
        block.layer = LoraLinear(block.layer)
    model, x = build(net), R(ROWS, WIDTH)
    assert_answers_of_eager_backbone(model, x)
    for step in ADAPTER_STEPS.values():
        for block in (net.a, net.c):
            step(block.layer)
        assert_answers_of_eager_backbone(model, x)
    assert model.check(x) is None


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)])
        self.top = nn.Linear(WIDTH, K)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.top(x.mean(1))


def test_an_adapter_that_a_fused_layer_passes_over_is_refused_until_the_layer_obeys_it() -> None:
    backbone, x = Encoder().requires_grad_(False).eval(), R(ROWS, 5, WIDTH)
    model = cet.EarlyExit(backbone, ["layers.0"], (x[:3],))
    closed = model.predict(x).logits
    assert torch.allclose(closed, backbone(x), atol=1e-5)
    backbone.layers[0].linear1 = LoraLinear(backbone.layers[0].linear1).requires_grad_(False)
    for call in (model.predict, model.check, model.exit_answers, model.stages_for):
        with pytest.raises(ValueError, match="set_fastpath_enabled"):
            call(x)
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        cet.EarlyExit(backbone, ["layers.0"], (x[:3],))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            obeyed = model.predict(x).logits
        assert torch.allclose(obeyed, backbone(x), atol=1e-5)
        assert not torch.allclose(obeyed, closed, atol=1e-2)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def peft_model() -> tuple[Any, cet.EarlyExit]:
    peft = pytest.importorskip("peft")

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.top = nn.Linear(WIDTH, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.tanh(self.c(torch.tanh(self.a(x)))))

    config = peft.LoraConfig(r=2, target_modules=["a", "c"], init_lora_weights=False)
    adapted = peft.get_peft_model(Small(), config)
    adapted.add_adapter("other", peft.LoraConfig(r=3, target_modules=["a", "c"], init_lora_weights=False))
    inner = adapted.base_model.model.eval()
    return adapted, cet.EarlyExit(inner, ["a"], (R(4, WIDTH),)).eval()


@pytest.mark.parametrize("order", [("merge", "unmerge"), ("disabled", "other"), ("other", "scaled", "merge")])
def test_a_model_under_peft_follows_its_adapters(order: tuple[str, ...]) -> None:
    adapted, model = peft_model()
    x = R(ROWS, WIDTH)

    def scale() -> None:
        for layer in (adapted.base_model.model.a, adapted.base_model.model.c):
            layer.set_scale("other", 4.0)

    steps: dict[str, Callable[[], Any]] = {
        "merge": adapted.merge_adapter,
        "unmerge": adapted.unmerge_adapter,
        "other": lambda: adapted.set_adapter("other"),
        "scaled": scale,
    }
    assert_answers_of_eager_backbone(model, x)
    for step in order:
        if step == "disabled":
            with adapted.disable_adapter():
                assert_answers_of_eager_backbone(model, x)
        else:
            steps[step]()
        assert_answers_of_eager_backbone(model, x)
    assert model.check(x) is None


# ---- modes ----------------------------------------------------------------------------------------------------------


class Moded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(1.0))
        self.b = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
        self.c = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(1.0))
        self.top = nn.Linear(WIDTH, K)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.a(x)
        h = h + self.b(h)
        return self.top(torch.tanh(h + self.c(h)))


def test_a_submodule_that_trains_in_a_model_in_eval_mode_does_so_in_both() -> None:
    model, x = build(Moded()), R(ROWS, WIDTH)
    before = assert_answers_of_eager_backbone(model, x)[-1]
    model.backbone.c[1].train()  # dropout of everything: what it does is known
    during = assert_answers_of_eager_backbone(model, x)[-1]
    assert not torch.allclose(before, during, atol=1e-3)
    assert model.backbone.c[1].training
    model.eval()
    torch.testing.assert_close(assert_answers_of_eager_backbone(model, x)[-1], before)


def test_dropout_of_a_head_that_trains_in_a_model_in_eval_mode_drops() -> None:
    head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(1.0), nn.Linear(WIDTH, K))
    model = cet.EarlyExit(Net().eval(), {"a": head}, (R(4, WIDTH),), policy=cet.ExitPolicy("confidence", (0.0,))).eval()
    x = R(ROWS, WIDTH)
    model.predict(x)
    head[1].train()
    torch.testing.assert_close(model.predict(x).logits, head[2].bias.expand(ROWS, K))


def test_random_dropout_in_eval_mode_draws_from_the_generator_of_the_caller() -> None:
    model, x = build(Moded()), R(4, WIDTH)
    model.predict(x)
    model.backbone.c[1].p = 0.5
    model.backbone.c[1].train()
    for _ in range(2):
        torch.manual_seed(3)
        got = model.predict(x).logits
        torch.manual_seed(3)
        torch.testing.assert_close(got, model.backbone(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(cet.AnswerMismatchError, match=r"answers otherwise each time.*model\.eval\(\)"):
        model.check(x)


def test_random_dropout_in_eval_mode_draws_anew_for_every_call() -> None:
    """Monte-Carlo dropout: what both paths share is the distribution."""
    model, x = build(Moded()), R(2, WIDTH)
    model.predict(x)
    model.backbone.c[1].p = 0.5
    model.backbone.c[1].train()
    draws = torch.stack([model.predict(x).logits for _ in range(8)])
    assert len({draw.numpy().tobytes() for draw in draws}) == 8


@pytest.mark.parametrize("call", ["predict", "forward"])
def test_batch_norm_in_batch_mode_is_refused_by_name(call: str) -> None:
    model, x = build(Moded()), R(ROWS, WIDTH)
    model.predict(x)
    statistics = model.backbone.b[1].running_mean.clone()
    model.backbone.b[1].train()
    with pytest.raises((ValueError, RuntimeError), match=r"'?b\.1'?") as refused:
        getattr(model, call)(x)
    assert "\n" not in str(refused.value)
    assert torch.equal(model.backbone.b[1].running_mean, statistics)
    model.eval()
    assert_answers_of_eager_backbone(model, x)


def test_batch_norm_without_statistics_of_its_own_is_refused() -> None:
    class Unnormed(Moded):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, track_running_stats=False))

    with pytest.raises(ValueError, match=r"'b\.1' keeps no statistics .* rows depend on each other"):
        build(Unnormed())


def test_the_model_takes_the_mode_of_its_backbone() -> None:
    assert not cet.EarlyExit(Net().eval(), ["a"], (R(4, WIDTH),)).training
    model = cet.EarlyExit(Net().train(), ["a"], (R(4, WIDTH),))
    assert model.training
    assert len(model(R(ROWS, WIDTH))) == 2
    in_eval = cet.EarlyExit(Net().eval(), ["a"], (R(4, WIDTH),))
    assert not any(module.training for module in in_eval.modules()), "the heads take it too"
    assert in_eval(R(ROWS, WIDTH)).shape == (ROWS, K)
    assert in_eval.predict(R(ROWS, WIDTH)).logits.shape == (ROWS, K)


def test_the_loss_refuses_a_model_whose_backbone_is_in_eval_mode() -> None:
    model = build(Moded()).train()
    model.backbone.eval()
    loss = cet.ConsistentExitLoss(None, consistency_weight=0)
    with pytest.raises(ValueError, match="eval"):
        loss(model, R(ROWS, WIDTH), torch.randint(K, (ROWS,)))


# ---- one module under two names, softmax ----------------------------------------------------------------------------


def test_one_module_under_two_names_that_are_both_called_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)
            self.b = self.a
            self.top = nn.Linear(WIDTH, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.relu(self.b(torch.relu(self.a(x)))))

    for exits in (["a"], ["b"], ["a", "b"]):
        with pytest.raises(ValueError, match=r"exit '[ab]' .*(twice|2 times|two names)"):
            cet.EarlyExit(Shared(), exits, (R(4, WIDTH),))


def test_one_module_under_two_names_that_is_called_once_is_an_exit() -> None:
    net = Net()
    net.alias = net.a
    assert_answers_of_eager_backbone(cet.EarlyExit(net.eval(), ["a", "b"], (R(4, WIDTH),)).eval(), R(ROWS, WIDTH))


def test_a_module_that_is_called_twice_since_the_cut_is_not_answered_by_its_first_call() -> None:
    model, x = build(), R(ROWS, WIDTH)
    model.predict(x)
    net = model.backbone
    net.forward = lambda x: net.top(net.c(net.b(net.a(net.a(x)))))  # type: ignore[method-assign]
    with pytest.raises((ValueError, RuntimeError), match=r"exit 'a'.*(twice|2 times)"):
        model.predict(x)
    with pytest.raises((ValueError, RuntimeError), match=r"exit 'a'.*(twice|2 times)"):
        model.exit_logits(x)


PROBABILITIES: dict[str, Callable[[], nn.Module]] = {
    "a module": lambda: nn.Softmax(dim=1),
    "a module of the last dimension": lambda: nn.Softmax(dim=-1),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_backbone_that_ends_in_a_softmax_is_refused(name: str) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, K), PROBABILITIES[name]())
    with pytest.raises(ValueError, match=r"(?i)softmax.*logits") as refused:
        cet.EarlyExit(net, ["0"], (R(4, WIDTH),))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backbone_that_returns_a_functional_softmax_is_refused(dtype: torch.dtype) -> None:
    class Probabilities(Convolutions):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(super().forward(x), -1)

    with pytest.raises(ValueError, match=r"(?i)softmax.*logits"):
        cet.EarlyExit(Probabilities().to(dtype), ["a"], (R(4, 3, 20, dtype=dtype),))


def test_a_backbone_that_ends_in_a_log_softmax_is_fine() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, K), nn.LogSoftmax(dim=1)).eval()
    model = cet.EarlyExit(net, ["0"], (R(4, WIDTH),)).eval()
    assert_answers_of_eager_backbone(model, R(ROWS, WIDTH))


def test_logits_that_lie_between_0_and_1_but_do_not_add_up_to_1_are_fine() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, K), nn.Hardtanh(0, 1)).eval()
    assert_answers_of_eager_backbone(cet.EarlyExit(net, ["0"], (R(4, WIDTH),)).eval(), R(ROWS, WIDTH))


# ---- dtype, device, copies ------------------------------------------------------------------------------------------


def test_part_of_a_model_in_another_dtype_is_followed_or_fails_as_the_backbone_does() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.top(self.c(self.b(h)).to(self.top.weight.dtype)).float()

    model, x = build(Mixed()), R(ROWS, WIDTH)
    assert_answers_of_eager_backbone(model, x)
    model.backbone.top.double()
    assert_answers_of_eager_backbone(model, x)
    assert model.check(x) is None


class Frozen(Net):
    """Goes another way where its weights are frozen."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if next(self.parameters()).requires_grad else 3 * y


def test_code_that_asks_whether_its_weights_are_trained_is_followed() -> None:
    model, x = build(Frozen()), R(ROWS, WIDTH)
    before = assert_answers_of_eager_backbone(model, x)[-1]
    model.backbone.requires_grad_(False)
    torch.testing.assert_close(assert_answers_of_eager_backbone(model, x)[-1], 3 * before)
    model.backbone.requires_grad_(True)
    torch.testing.assert_close(assert_answers_of_eager_backbone(model, x)[-1], before)


@pytest.mark.parametrize("call", ["predict", "forward", "exit_logits", "check"])
def test_one_module_that_becomes_two_exits_is_refused(call: str) -> None:
    layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, K)]
    model = cet.EarlyExit(nn.Sequential(*layers).eval(), ["1", "3"], (R(4, WIDTH),))
    model.backbone[3] = model.backbone[1]
    with pytest.raises((ValueError, RuntimeError), match="does not say where to leave"):
        getattr(model, call)(R(ROWS, WIDTH))


def test_a_copy_does_not_follow_the_changes_of_the_original() -> None:
    model, x = build(), R(ROWS, WIDTH)
    before = assert_answers_of_eager_backbone(model, x)
    twin = copy.deepcopy(model)
    model.backbone.c.gain = 0.3
    model.backbone.a.layer.register_forward_hook(twice)
    assert_answers_of_eager_backbone(model, x)
    torch.testing.assert_close(assert_answers_of_eager_backbone(twin, x)[-1], before[-1])
    twin.backbone.c.power = 2
    assert_answers_of_eager_backbone(twin, x)
    assert_answers_of_eager_backbone(model, x)


def test_two_models_on_one_backbone_both_follow_it() -> None:
    net, x = Net().eval(), R(ROWS, WIDTH)
    one, two = build(net), cet.EarlyExit(net, ["b"], (R(4, WIDTH),)).eval()
    for change in ("a float", "a forward hook", "a submodule appended to a ModuleList"):
        CHANGES[change](net.c)
        assert_answers_of_eager_backbone(one, x)
        assert_answers_of_eager_backbone(two, x)


def test_another_backbone_is_followed() -> None:
    model, x = build(), R(ROWS, WIDTH)
    assert_answers_of_eager_backbone(model, x)
    model.backbone = Net().eval()
    assert_answers_of_eager_backbone(model, x)
    model.backbone = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH)})
    with pytest.raises(Exception, match=r"."):
        model.predict(x)


def test_gradients_follow_a_change_too() -> None:
    model, x = build(), R(ROWS, WIDTH)
    model.predict(x)
    model.backbone.c.register_forward_hook(twice)
    model.policy = cet.ExitPolicy.closed(3)
    model(x).sum().backward()
    got = model.backbone.a.layer.weight.grad.clone()
    model.zero_grad()
    model.backbone(x).sum().backward()
    torch.testing.assert_close(got, model.backbone.a.layer.weight.grad)


# ---- check and calibration ------------------------------------------------------------------------------------------

HIDDEN_GAIN = {"a": 1.0, "b": 1.0, "final": 1.0}
"""A global variable: what no look at a module shows."""


class Secretive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, K)
        self.scaler = Scaler()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x * HIDDEN_GAIN["a"])
        h = self.b(torch.relu(h) * HIDDEN_GAIN["b"])
        return self.out(self.top(h) * HIDDEN_GAIN["final"])


class Scaler(nn.Identity):
    pass


@pytest.fixture
def hidden_gain(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setitem(HIDDEN_GAIN, name, 3.0)


@pytest.mark.parametrize("name", HIDDEN_GAIN)
def test_check_names_the_first_exit_that_differs(name: str, hidden_gain: Callable[[str], None]) -> None:
    model, x = build(Secretive()), R(ROWS, WIDTH)
    model.predict(x)
    assert model.check(x) is None
    assert model.check(x[:1]) is None
    hidden_gain(name)
    with pytest.raises(cet.AnswerMismatchError, match=f"exit '{name}'") as found:
        model.check(x)
    assert isinstance(found.value, RuntimeError)
    assert "\n" not in str(found.value)


def test_check_looks_at_closed_exits_and_keeps_policy_mode_and_generator() -> None:
    model, x = build(Secretive()), R(ROWS, WIDTH)
    policy = cet.ExitPolicy("confidence", (None, 0.5))
    model.policy = policy
    state = torch.get_rng_state()
    assert model.check(x=x) is None
    assert model.policy is policy
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", HIDDEN_GAIN)
def test_calibrate_checks_the_first_batch(name: str, hidden_gain: Callable[[str], None]) -> None:
    model = build(Secretive())
    loader = [(R(32, WIDTH), torch.randint(K, (32,))) for _ in range(2)]
    cet.calibrate(model, loader)
    hidden_gain(name)
    with pytest.raises(cet.AnswerMismatchError, match=f"exit '{name}'"):
        cet.calibrate(model, loader)


def test_check_agrees_on_values_that_are_not_finite() -> None:
    model, x = build(Secretive()), R(ROWS, WIDTH)
    x[1], x[2, 0] = float("nan"), float("inf")
    assert model.check(x) is None


@pytest.mark.parametrize(
    ("dtype", "exits"), [(torch.bfloat16, ["a"]), (torch.float32, ["a"]), (torch.float32, ["a", "b"])]
)
@pytest.mark.parametrize(
    ("hooked", "score"), sampled(itertools.product([False, True], ["entropy", "confidence", "margin"]), 2)
)
def test_rows_leave_where_calibration_found_that_they_would(
    dtype: torch.dtype, exits: list[str], hooked: bool, score: Any
) -> None:
    """Thresholds are put where scores are, so that any other way to compute these shows."""
    net = Convolutions().to(dtype).eval()
    model = cet.EarlyExit(net, exits, (R(4, 3, 20, dtype=dtype),)).eval()
    x, y = R(256, 3, 20, dtype=dtype), torch.randint(K, (256,))
    model.predict(x[:8])
    if hooked:
        net.a.register_forward_hook(twice)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    found = cet.calibrate(model, batches, 0.3, score=score, guarantee=None)
    model.policy = found.policy
    assert any(threshold is not None for threshold in found.policy.thresholds)
    leaving = torch.cat([model.predict(part).exit_index for part in x.split(64)])
    shares = torch.bincount(leaving, minlength=len(exits) + 1).double() / len(x)
    assert [row.fraction for row in found.report.exits] == shares.tolist()


def test_the_uncut_answer_is_that_of_the_heads_as_they_are() -> None:
    model, x = build(), R(ROWS, WIDTH)
    UNCUTTABLE["a hook of NumPy"](model.backbone.a)
    HEAD_CHANGES["another head"](model)
    assert_answers_of_eager_backbone(model, x)
    model.policy = cet.ExitPolicy("confidence", (0.0, 0.0))
    torch.testing.assert_close(model.predict(x).logits, exit_logits_of_eager_backbone(model, x)[0])
