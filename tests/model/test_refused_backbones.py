"""What cannot work is refused when the model is made, in one sentence that names the way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet
from oracle import answers_of, assert_answers_of_eager_backbone

R = torch.randn
K = 4
ROWS = 9


class Net(nn.Module):
    """Returns what it is told to make of its logits."""

    def __init__(self, result: Callable[[nn.Module, Tensor], Any] = lambda _net, z: z, classes: int = K) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.top = nn.Linear(8, classes)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(self, self.top(torch.tanh(self.b(torch.tanh(self.a(x))))))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(net: nn.Module, **options: Any) -> cet.EarlyExit:
    return cet.EarlyExit(net, ["a"], (R(4, 6),), **options)


def assert_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as refused:
        make()
    assert "\n" not in str(refused.value)
    assert ";" in str(refused.value) or "call" in str(refused.value), "the last part is what to do"


# ---- one logit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_a_backbone_with_one_logit_has_two_classes(flat: bool) -> None:
    """``(B, 1)`` or ``(B,)``, as for a binary cross-entropy with logits: class 1 has the logit, class 0 has zero."""
    net = Net(lambda _net, z: z[:, 0] if flat else z, classes=1).eval()
    model = build(net).eval()
    x = R(ROWS, 6)
    with torch.no_grad():
        z = net(x).reshape(ROWS)
        expected = torch.stack([torch.zeros(ROWS), z], dim=1)
    assert model.num_classes == 2
    got = model.predict(x)
    torch.testing.assert_close(got.logits, expected)
    assert torch.equal(got.labels, (z > 0).long())
    torch.testing.assert_close(got.logits.softmax(1)[:, 1], torch.sigmoid(z))
    with torch.no_grad():
        early, final = model.exit_logits(x)
    assert early.shape == final.shape == (ROWS, 2)
    torch.testing.assert_close(final, expected)
    confidence = early.softmax(1).amax(1)
    model.policy = cet.ExitPolicy("confidence", (confidence.sort().values[3:5].mean().item(),))
    answers = answers_of([early, final], model.policy)
    got = model.predict(x)
    assert torch.equal(got.exit_index, answers.exit_index)
    torch.testing.assert_close(got.logits, answers.logits, rtol=1e-4, atol=1e-4)
    assert model.check(x) is None


def test_a_model_with_one_logit_is_trained_with_the_same_gradient_as_by_binary_cross_entropy() -> None:
    net = Net(classes=1)
    model = build(net.train()).train()
    x, y = R(ROWS, 6), torch.randint(2, (ROWS,))
    nn.functional.cross_entropy(model(x)[-1], y).backward()
    got = net.a.weight.grad.clone()
    net.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y.float()).backward()
    torch.testing.assert_close(got, net.a.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_model_with_one_logit_comes_back(tmp_path: Any) -> None:
    model = build(Net(classes=1).eval()).eval()
    model.save(tmp_path / "m")
    x = R(ROWS, 6)
    assert torch.equal(cet.load(tmp_path / "m", Net(classes=1)).predict(x).logits, model.predict(x).logits)


# ---- what is no classifier ------------------------------------------------------------------------------------------

NO_CLASSIFIER: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "a dict": (lambda _net, z: {"logits": z, "features": z}, r"dict.*logits"),
    "a tuple": (lambda _net, z: (z, z * 2), r"tuple.*logits"),
    "a list": (lambda _net, z: [z, z * 2], r"list.*logits"),
    "a map of classes": (lambda _net, z: z[:, :, None, None].expand(-1, -1, 5, 5), r"\(3, 4, 5, 5\)|\(B, K"),
    "a sequence of classes": (lambda _net, z: z[:, :, None].expand(-1, -1, 5), r"\(3, 4, 5\)|\(B, K"),
    "nothing": (lambda _net, z: None, r"NoneType.*logits"),
    "integers": (lambda _net, z: z.argmax(1), r"logits"),
    "classes as integers": (lambda _net, z: z.long(), r"logits"),
    "a multi-label probability": (lambda _net, z: torch.sigmoid(z), r"(?i)sigmoid.*logits"),
    "a probability of one class": (lambda _net, z: torch.sigmoid(z[:, :1]), r"(?i)sigmoid.*logits"),
    "no classes": (lambda _net, z: z[:, :0], r"\(3, 0\)|class"),
}


@pytest.mark.parametrize("name", NO_CLASSIFIER)
def test_a_backbone_that_returns_no_logits_is_refused(name: str) -> None:
    result, message = NO_CLASSIFIER[name]
    assert_refused(lambda: build(Net(result).eval()), message)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda net, z: (z, z * 2) if net.training else z, r"train.*tuple|tuple.*train"),
        (lambda net, z: {"out": z, "aux": z} if net.training else z, r"train.*dict|dict.*train"),
        (lambda net, z: [z, z] if net.training else z, r"train.*list|list.*train"),
        (lambda net, z: z.sum() if net.training else z, r"train"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_auxiliary_outputs_in_train_mode_are_caught_when_the_model_is_made(
    result: Callable[[nn.Module, Tensor], Any], message: str, training: bool
) -> None:
    """As those of Inception and GoogLeNet: whatever mode the backbone is in at that time."""
    net = Net(result).train(training)
    assert_refused(lambda: build(net), message)
    assert net.training is training


def test_looking_at_train_mode_changes_nothing() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.drop(self.norm(self.b(torch.tanh(self.a(x))))))

    net = Counting().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    model = build(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.norm.training
    assert all(p.grad is None for p in model.parameters())
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        build(Net())  # draws the weights of net and head
    assert len(model(R(ROWS, 6))) == 2


# ---- labels of the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.rand(ROWS, K), r"\(9, 4\).*not one-hot; give class indices"),
        (torch.rand(ROWS), r"no class index.*int64"),
        (torch.randint(K, (ROWS, 5)), r"\(9, 5\)"),
        (torch.randint(K, (ROWS,)) + K, r"label"),
    ],
)
def test_labels_that_are_no_classes_are_refused(y: Tensor, message: str) -> None:
    loss = cet.ConsistentExitLoss(None, consistency_weight=0)
    assert_refused(lambda: loss(build(Net().train()).train(), R(ROWS, 6), y), message)


# ---- raw errors -----------------------------------------------------------------------------------------------------


def test_a_scripted_backbone_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.top = nn.Linear(6, 8), nn.Linear(8, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.tanh(self.a(x)))

    for make in (torch.jit.script, lambda m: torch.jit.trace(m, R(4, 6)), lambda m: torch.jit.freeze(script(m))):
        net = make(Plain().eval())
        assert_refused(lambda net=net: build(net), r"(?i)(script|trac|jit)")


def script(module: nn.Module) -> Any:
    return torch.jit.script(module.eval())


def test_an_exported_backbone_is_refused() -> None:
    exported = torch.export.export(Net().eval(), (R(4, 6),))
    assert_refused(lambda: build(exported), r"(?i)export")
    assert_refused(lambda: build(exported.module()), r"(?i)export|exit 'a'")


@pytest.mark.parametrize("net", [None, "resnet18", lambda x: x, Net, [Net()]])
def test_what_is_no_module_is_refused(net: Any) -> None:
    assert_refused(lambda: build(net), r"(?i)nn\.Module")


def test_a_model_in_a_model_is_refused_or_right() -> None:
    inner = build(Net().eval()).eval()
    try:
        outer = cet.EarlyExit(inner, ["backbone.b"], (R(4, 6),)).eval()
    except ValueError as error:
        if "EarlyExit" not in str(error) or "\n" in str(error):
            raise
        return
    assert_answers_of_eager_backbone(outer, R(ROWS, 6))


class ByMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(6, 8), nn.Linear(8, K)

    def forward(self, flags: Tensor) -> Tensor:
        return self.top(torch.tanh(self.a(flags.float())))


def test_boolean_inputs_are_fine_where_the_backbone_takes_them() -> None:
    model = cet.EarlyExit(ByMask().eval(), ["a"], (torch.rand(4, 6) > 0.5,)).eval()
    assert_answers_of_eager_backbone(model, torch.rand(ROWS, 6) > 0.5)


def test_boolean_inputs_that_the_backbone_does_not_take_are_refused() -> None:
    assert_refused(lambda: cet.EarlyExit(Net().eval(), ["a"], (torch.rand(4, 6) > 0.5,)), r"dtype|Bool|bool")


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (R(4, 6).double(), "x is float64 but was float32"),
        (torch.ones(4, 6, dtype=torch.int64), "x is int64 but was float32"),
        (R(4, 5), r"x has shape \(4, 5\) but had \(3, 6\)"),
    ],
)
def test_an_input_of_another_kind_on_which_the_backbone_fails_is_named(x: Tensor, named: str) -> None:
    model = build(Net().eval()).eval()
    y = torch.zeros(4, dtype=torch.int64)
    for call in (model, model.predict, model.exit_logits, lambda x: cet.calibrate(model, [(x, y)], guarantee=None)):
        assert_refused(lambda call=call: call(x), named)
    half = build(Net().eval()).eval().bfloat16()
    assert_refused(lambda: half.predict(R(4, 6)), "x is float32 but was bfloat16")
    assert half.predict(R(4, 6).bfloat16()).logits.dtype == torch.bfloat16


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        net = Net().eval()
    assert_refused(lambda: build(net), r"made within torch\.inference_mode\(\)")


def test_an_export_that_would_lose_the_exits_is_refused() -> None:
    model, x = build(Net().eval()).eval(), R(4, 6)
    recorded = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(recorded(x), model(x))
    model.policy = cet.ExitPolicy("entropy", (0.5,))
    assert_refused(lambda: torch.export.export(model, (x,)), r"torch\.export records no exits.*cet\.export")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([R(3, 6), R(4, 6)], layout=layout)
    assert_refused(lambda: cet.EarlyExit(Net().eval(), ["a"], (nested,)), r"nested")
    model = cet.EarlyExit(Net().eval(), {"a": cet.HeadSpec(layout="channels_last")}, (R(4, 6),)).eval()
    assert_refused(lambda: model.predict(nested), r"nested")


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_inputs_are_refused(make: Callable[[Tensor], Tensor]) -> None:
    assert_refused(lambda: build_with(make(R(4, 6))), r"sparse")
    model = build(Net().eval()).eval()
    assert_refused(lambda: model.predict(make(R(4, 6))), r"sparse")


def build_with(x: Any) -> cet.EarlyExit:
    return cet.EarlyExit(Net().eval(), ["a"], (x,))


@pytest.mark.parametrize("x", [[[0.0] * 6] * 4, 3.0, "text", None])
def test_inputs_without_a_tensor_are_refused(x: Any) -> None:
    assert_refused(lambda: build_with(x), r"example_inputs|tensor")
    model = build(Net().eval()).eval()
    assert_refused(lambda: model.predict(x), r"x |tensor|inputs")


def test_numpy_inputs_are_refused() -> None:
    x = R(4, 6).numpy()
    assert_refused(lambda: build_with(x), r"(?i)ndarray|numpy|tensor")
    model = build(Net().eval()).eval()
    assert_refused(lambda: model.predict(x), r"(?i)ndarray|numpy|tensor")


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_calibrate_of_a_wrapped_model_is_refused_or_looks_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = build(Net().eval()).eval()
    loader = [(R(64, 6), torch.randint(K, (64,)))]
    try:
        found = cet.calibrate(wrap(model), loader, 0.2)
    except TypeError as error:
        if "module" not in str(error) or "\n" in str(error):
            raise
        return
    assert found.policy == cet.calibrate(model, loader, 0.2).policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), r"loader"),
        ((3,), r"loader"),
        (([(R(8, 6), torch.randint(K, (8,)))], "1%"), r"max_accuracy_drop.*0\.01"),
        (([(R(8, 6), torch.randint(K, (8,)))], None), r"max_accuracy_drop"),
        (([(R(8, 6), torch.randint(K, (8,)))], 5), r"max_accuracy_drop.*0\.0"),
    ],
)
def test_calibrate_refuses_what_it_cannot_use_in_one_sentence(arguments: tuple[Any, ...], message: str) -> None:
    model = build(Net().eval()).eval()
    assert_refused(lambda: cet.calibrate(model, *arguments), message)
