"""Changes in out-of-the-way places show in the next call, and rows that depend on each other are refused anywhere."""

from __future__ import annotations

import contextvars
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet
from cet.partition import fingerprint

R = torch.randn
X = R(12, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cet.UncutWarning)
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def scale(self) -> Any:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu() * self.scale())


def wrapped(net: nn.Module) -> cet.EarlyExit:
    return cet.EarlyExit(net.eval(), ["a"], (X[:2],)).eval()


def assert_follows(model: cet.EarlyExit, change: Callable[[], Any]) -> None:
    """Before and after a change the answers are those of the backbone, and the change makes a difference."""
    before = model.backbone(X)
    torch.testing.assert_close(model.predict(X).logits, before)
    change()
    after = model.backbone(X)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(model.predict(X).logits, after)
    torch.testing.assert_close(model.exit_answers(X)[-1][0], after)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b2 = nn.Linear(16, 16)
        self.b2.weight = self.b.weight
        self.register_buffer("p", torch.ones(16))
        self.register_buffer("q", self.p)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b2(self.b(self.a(x).relu() * self.p).relu() * self.q))


@pytest.mark.parametrize("which", ["b", "b2"])
@pytest.mark.parametrize("how", ["assigned", "loaded", "buffer"])
def test_tensors_that_are_one_may_be_parted(which: str, how: str) -> None:
    model = wrapped(Tied())
    net: Any = model.backbone

    def part() -> None:
        if how == "assigned":
            getattr(net, which).weight = nn.Parameter(R(16, 16))
        elif how == "loaded":
            state = {name: value.clone() for name, value in net.state_dict().items()}
            net.load_state_dict({**state, f"{which}.weight": R(16, 16)}, assign=True)
        else:
            setattr(net, "p" if which == "b" else "q", 2 * torch.ones(16))

    assert_follows(model, part)


def test_tensors_that_become_one_are_followed() -> None:
    model = wrapped(Tied())
    net: Any = model.backbone
    net.b2.weight = nn.Parameter(R(16, 16))
    model.predict(X)
    assert_follows(model, lambda: setattr(net.b2, "weight", net.b.weight))


def _code(net: Any) -> None:
    def scale(self: Any) -> Any:
        return -3.0

    type(net).scale.__code__ = scale.__code__


def _defaults(net: Any) -> None:
    type(net).scale.__defaults__ = (-2.0,)


@pytest.mark.parametrize("change", [_code, _defaults])
def test_functions_that_are_changed_in_place(change: Callable[[Any], None]) -> None:
    class N(Net):
        def scale(self, by: float = 2.0) -> Any:
            return by

    if change is _code:
        N.scale.__defaults__ = None  # type: ignore[attr-defined]
        N.scale.__code__ = (lambda self: 2.0).__code__
    model = wrapped(N())
    assert_follows(model, lambda: change(model.backbone))


class Settings:
    factor = 2.0


class Options(dict[str, float]):
    factor = 2.0


@pytest.mark.parametrize("kind", ["class", "object", "module", "subclass of dict"])
def test_settings_wherever_they_stand(kind: str) -> None:
    class Config(Settings):
        pass

    module = types.ModuleType("my_settings")
    module.factor = 2.0  # type: ignore[attr-defined]
    options = Options()
    options.factor = 2.0
    config, changed = {
        "class": (Config, Config),
        "object": (Config(), Config),
        "module": (module, module),
        "subclass of dict": (options, options),
    }[kind]

    class N(Net):
        def __init__(self) -> None:
            super().__init__()
            self.config = config

        def scale(self) -> Any:
            return self.config.factor

    assert_follows(wrapped(N()), lambda: setattr(changed, "factor", -1.0))


def test_the_order_of_a_dict_and_parameters_in_a_list() -> None:
    class N(Net):
        def __init__(self) -> None:
            super().__init__()
            self.factors = [nn.Parameter(torch.ones(16))]
            self.table = {"a": 2.0, "b": -3.0}

        def scale(self) -> Any:
            return self.factors[0] * next(iter(self.table.values()))

    model = wrapped(N())
    net: Any = model.backbone
    assert_follows(model, lambda: net.table.update(a=net.table.pop("a")))
    assert_follows(model, lambda: net.factors[0].data.mul_(-3))


def test_a_mutable_input_that_is_no_tensor() -> None:
    class N(Net):
        def forward(self, x: Tensor, config: Any = None) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu() * (config.v if config else 1.0))

    model = wrapped(N())
    config = types.SimpleNamespace(v=2.0)
    for value in (2.0, -3.0):
        config.v = value
        torch.testing.assert_close(model.predict(X, config=config).logits, model.backbone(X, config=config))


def test_batch_norm_in_train_mode_is_refused_in_explicit_stages_too() -> None:
    net = cet.Stages(s=nn.Linear(8, 16), b=nn.Sequential(nn.BatchNorm1d(16), nn.ReLU()), t=nn.Linear(16, 5))
    model = cet.EarlyExit(net.eval(), ["s"], (X[:2],)).eval()
    model.predict(X)
    norm: Any = net.get_submodule("b.0")
    before = norm.running_mean.clone()
    norm.train()
    with pytest.raises(ValueError, match=r"'b\.0' normalises by the statistics of the batch"):
        model.predict(X)
    assert torch.equal(norm.running_mean, before)
    norm.eval()
    torch.testing.assert_close(model.predict(X).logits, net(X))


SCANS: dict[str, Callable[[Tensor], Tensor]] = {
    "so many of a batch": lambda h: h * ((h[:, :1] > -9).long().cumsum(0) <= 4),
    "a maximum so far": lambda h: h + 0 * h.cummax(0).values.clamp(max=-99),
    "in another order": lambda h: h.sort(0).values,
    "reversed": lambda h: h.flip(0),
    "shifted": lambda h: h.roll(1, 0),
    "so many of all positions": lambda h: (
        h.reshape(-1, 4) * ((h.reshape(-1, 4)[:, :1] > -9).long().cumsum(0) <= 16)
    ).reshape(h.shape),
}


@pytest.mark.parametrize("name", SCANS)
def test_what_runs_along_the_rows_is_refused(name: str) -> None:
    class N(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(SCANS[name](self.b(self.a(x).relu())))

    with pytest.raises((ValueError, RuntimeError), match="rows") as refused:
        wrapped(N()).predict(X)
    assert "\n" not in str(refused.value)


def test_a_scan_along_positions_is_nobody_elses_business() -> None:
    class N(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).cumsum(1).sort(-1).values.flip(-1).roll(1, 1))

    model = wrapped(N())
    torch.testing.assert_close(model.predict(X).logits, model.backbone(X))


def test_rows_are_looked_at_for_sizes_without_a_cut_too() -> None:
    class N(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if x.shape[1] > 20:
                h = h - h.mean(0)
            return self.c(h.mean(1))

    exits = {"a": cet.HeadSpec(layout="channels_last")}
    model = cet.EarlyExit(N().eval(), exits, (R(2, 10, 8),)).eval()
    for _ in range(3):
        with pytest.raises(ValueError, match="rows of a batch depend on each other"):
            model.predict(R(12, 30, 8))
    assert len(model.predict(R(12, 10, 8)).labels) == 12


def test_a_head_that_returns_a_part_of_its_features() -> None:
    net = nn.Sequential(nn.Linear(8, 5), nn.ReLU(inplace=True), nn.Linear(5, 5))
    model = cet.EarlyExit(net.eval(), {"0": nn.Identity()}, (X[:2],)).eval()
    torch.testing.assert_close(model.exit_answers(X)[0][0], model.exit_logits(X)[0])
    model.check(X)
    early = cet.EarlyExit(nn.Sequential(nn.Identity(), nn.Linear(8, 8)).eval(), {"0": nn.Identity()}, (X[:2],)).eval()
    x = X.clone()
    for answers in (early.exit_answers(x)[0][0], early.exit_logits(x)[0]):
        answers.detach().zero_()
        assert torch.equal(x, X)


def test_a_call_that_failed_binds_nobody() -> None:
    class N(Net):
        def forward(self, x: Tensor, mode: str = "id", scale: float = 1.0) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu() * {"id": 1, "neg": -1}[mode] * scale)

    model = wrapped(N())
    with pytest.raises(KeyError):
        model.predict(X, mode="typo")
    torch.testing.assert_close(model.predict(X, mode="neg").logits, model.backbone(X, mode="neg"))
    for scale in (0.1, 0.2):
        torch.testing.assert_close(model.exit_logits(X, scale=scale)[-1], model.backbone(X, scale=scale))
    nan = float("nan")
    for _ in range(2):
        assert model.exit_logits(X, scale=nan)[-1].isnan().all()


def test_a_mask_that_comes_later_and_is_not_used_is_named() -> None:
    class N(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            h = self.a(x)
            if attention_mask is not None:
                h = h * attention_mask[..., None]
            return self.c(h.mean(1))

    model = cet.EarlyExit(N().eval(), {"a": cet.HeadSpec(layout="channels_last")}, (R(2, 7, 4),)).eval()
    with pytest.warns(UserWarning, match="'attention_mask' looks like a mask"):
        model.exit_logits(R(3, 7, 4), attention_mask=torch.ones(3, 7))


class MaybeTied(Net):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.b2 = nn.Linear(16, 16)
        if tied:
            self.b2.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b2(self.b(self.a(x).relu()).relu()))


def test_a_file_is_read_into_tensors_that_can_hold_it(tmp_path: Any) -> None:
    path = tmp_path / "m.safetensors"
    wrapped(MaybeTied(tied=False)).save(path)
    into = MaybeTied(tied=True)
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(ValueError, match=r"b2\.weight.* are one tensor in the model"):
        cet.load(path, into)
    assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())
    tied = wrapped(MaybeTied(tied=True))
    tied.save(path)
    for kind in (True, False):
        torch.testing.assert_close(cet.load(path, MaybeTied(tied=kind)).predict(X).logits, tied.predict(X).logits)


def test_a_file_is_not_read_into_an_expanded_buffer(tmp_path: Any) -> None:
    class N(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("e", torch.ones(1).expand(16))

    path = tmp_path / "m.safetensors"
    wrapped(N()).save(path)
    into = N()
    before = into.a.weight.clone()
    with pytest.raises(ValueError, match=r"backbone\.e, whose elements share memory.*register a copy"):
        cet.load(path, into)
    assert torch.equal(into.a.weight, before)


class InAList(Net):
    def __init__(self, by_list: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.a, self.b])
        self.by_list = by_list

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if self.by_list else (self.a, self.b):
            x = layer(x).relu()
        return self.c(x)


@pytest.mark.parametrize("by_list", [True, False])
@pytest.mark.parametrize("exits", [["a", "b"], ["layers.0", "layers.1"], ["a", "layers.1"]])
def test_an_exit_may_have_either_name_of_its_module(exits: list[str], by_list: bool) -> None:
    model = cet.EarlyExit(InAList(by_list).eval(), exits, (X[:2],)).eval()
    torch.testing.assert_close(model.predict(X).logits, model.backbone(X))
    assert model.explain(X).stages == (*exits, "final")


@pytest.mark.parametrize("compiled", [True, False])
def test_classes_and_dtypes_of_submodules_are_watched(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Louder(nn.Linear):
        pass

    if not compiled:
        monkeypatch.setattr(fingerprint, "watching", fingerprint._Comparison)
    for change in (
        lambda net: setattr(net.b, "__class__", Louder),
        lambda net: setattr(net.b.weight, "data", net.b.weight.data.double()),
        lambda net: net.b.half(),
        lambda net: setattr(net, "c", nn.Linear(16, 5)),
    ):
        net = Net()
        seen = fingerprint.Fingerprint(net)
        assert seen.is_current()
        change(net)
        assert not seen.is_current()


class KeepsInLists(nn.Module):
    """A module and a parameter that are no submodule and no registered parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 16), nn.Linear(16, 5)
        self.modules_kept, self.parameters_kept = [nn.Linear(16, 16)], [nn.Parameter(R(16))]

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.modules_kept[0](self.a(x)) * self.parameters_kept[0]).relu())


MOVES: dict[str, Callable[[Any], object]] = {
    "data of a module in a list": lambda net: setattr(net.modules_kept[0].weight, "data", R(16, 16)),
    "data of a parameter in a list": lambda net: setattr(net.parameters_kept[0], "data", R(16)),
    "vector_to_parameters": lambda net: nn.utils.vector_to_parameters(R(272), net.modules_kept[0].parameters()),
    "there and back": lambda net: net.modules_kept[0].double().apply(lambda module: module.weight.data.mul_(2)).float(),
}


@pytest.mark.parametrize("name", MOVES)
def test_weights_that_are_not_registered_may_be_moved(name: str) -> None:
    net = KeepsInLists()
    model = wrapped(net)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model.predict(X).logits, net(X))
            MOVES[name](net)
        torch.testing.assert_close(model.predict(X).logits, net(X))
        net.modules_kept[0].weight.mul_(2)
        torch.testing.assert_close(model.predict(X).logits, net(X))


def test_other_classes_are_refused() -> None:
    model = wrapped(Net())
    model.policy = cet.ExitPolicy("confidence", (0.5,))
    model.predict(X)
    model.backbone.c = nn.Linear(16, 7)
    for call in (lambda: model.predict(X), lambda: model(X), lambda: model.exit_logits(X), lambda: model.train()(X)):
        with pytest.raises(ValueError, match="gives 7 classes but its exits have 5; wrap it anew"):
            call()


class RewritesWhatGradientsNeed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(h.add_(self.b(h)))


def test_a_backbone_without_gradients_answers_where_they_are_recorded() -> None:
    net = RewritesWhatGradientsNeed()
    model = wrapped(net)
    torch.testing.assert_close(model(X), net(X))


class Numbered(float):
    k = 1.0


class Holder:
    k = 1.0


HOLDER = Holder()
SETTINGS = {"k": 1.0}
CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("k", default=1.0)


@pytest.mark.parametrize(
    ("held", "read", "change"),
    [
        (lambda: types.MappingProxyType(SETTINGS), lambda o: o["k"], lambda o: SETTINGS.update(k=4.0)),
        (lambda: weakref.ref(HOLDER), lambda o: o().k, lambda o: setattr(HOLDER, "k", 4.0)),
        (lambda: CONTEXT, lambda o: o.get(), lambda o: CONTEXT.set(4.0)),
        (lambda: OrderedDict(a=1.0, b=3.0), lambda o: next(iter(o.values())), lambda o: o.move_to_end("a")),
        (lambda: torch.ones(()), lambda o: o.item(), lambda o: o.numpy().fill(4.0)),
        (lambda: torch.ones(2), lambda o: o.tolist()[1], lambda o: o.data.fill_(4.0)),
        (lambda: Numbered(2.0), lambda o: o.k, lambda o: setattr(o, "k", 4.0)),
    ],
    ids=["mapping proxy", "weak reference", "context", "order", "number", "numbers", "attribute of a number"],
)
def test_values_that_change_without_their_holder(held: Any, read: Any, change: Any) -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.held = held()

        def scale(self) -> Any:
            return read(self.held)

    net = Scaled()
    assert_follows(wrapped(net), lambda: change(net.held))


@pytest.mark.parametrize("kind", ["sparse", "quantised", "nested"])
def test_tensors_whose_numbers_cannot_be_listed_are_held_all_the_same(kind: str) -> None:
    net = Net().eval()
    net.other = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2)]),
    }[kind]()
    model = cet.EarlyExit(net, ["a"], (X,)).eval()
    torch.testing.assert_close(model.predict(X).logits, net(X))
    model.check(X)


def test_hooks_that_another_thread_adds_meanwhile_are_no_error() -> None:
    hooks: OrderedDict[int, Any] = OrderedDict()

    class Meddling:
        """Where a thread may be switched, another adds a hook."""

        @property
        def __self__(self) -> None:
            hooks[len(hooks)] = print

    hooks[0] = hooks[1] = Meddling()
    assert [*fingerprint.followed_hooks(hooks)] == [0, 1]
