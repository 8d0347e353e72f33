"""Quantised, offloaded, meta and inference weights, and checkpointed activations: right, or refused with the way."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import cet
from oracle import assert_answers_of_eager_backbone

R = torch.randn
K = 4
ROWS = 9
EXITS = ["a", "b"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.b = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.top = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.b(self.a(x)))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quantised(module: nn.Module) -> nn.Module:
    if "qnnpack" in torch.backends.quantized.supported_engines and torch.backends.quantized.engine == "none":
        torch.backends.quantized.engine = "qnnpack"
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def assert_names_the_way(error: Exception, cause: str, way: str) -> None:
    """One sentence that names what is wrong and what to do."""
    message = str(error)
    if "\n" in message or not re.search(cause, message) or not re.search(way, message):
        raise error


def test_a_backbone_quantised_beforehand_works_or_names_the_way() -> None:
    """Its rows share a scale that is taken from the whole batch, so that a right answer needs one row at a time."""
    net = quantised(Net().eval())
    try:
        model = cet.EarlyExit(net, EXITS, (R(4, 6),)).eval()
    except (TypeError, ValueError) as error:
        assert_names_the_way(error, "quanti", "torchao|weight.only")
        return
    assert_answers_of_eager_backbone(model, R(ROWS, 6), atol=1e-3)


def test_a_model_that_is_quantised_as_a_whole_works_or_names_the_way() -> None:
    model = cet.EarlyExit(Net().eval(), EXITS, (R(4, 6),)).eval()
    model.predict(R(ROWS, 6))
    try:
        twin = quantised(model)
        twin.predict(R(ROWS, 6))
    except (TypeError, ValueError, RuntimeError) as error:
        assert_names_the_way(error, "quanti", "torchao|weight.only")
        return
    assert_answers_of_eager_backbone(twin, R(ROWS, 6), atol=1e-3)


def test_weights_quantised_by_torchao_work_and_come_back(tmp_path: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    net = Net().eval()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    model = cet.EarlyExit(net, EXITS, (R(4, 6),)).eval()
    assert_answers_of_eager_backbone(model, R(ROWS, 6), atol=1e-3)
    model.save(tmp_path / "m")
    other = Net().eval()
    quantization.quantize_(other, quantization.Int8WeightOnlyConfig())
    x = R(ROWS, 6)
    torch.testing.assert_close(cet.load(tmp_path / "m", other).predict(x).logits, model.predict(x).logits)
    with pytest.raises(ValueError, match=r"as Int8Tensor .* and the model as a plain tensor; quantise the backbone"):
        cet.load(tmp_path / "m", Net().eval())
    apart = Net().eval()
    quantization.quantize_(apart, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"quantise the backbone as it was when saved"):
        cet.load(tmp_path / "m", apart)


class Halves(Tensor):
    """A tensor that is kept as the sum of two, which takes no package to try."""

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> Halves:
        return Halves(parts["first"], parts["second"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and all(isinstance(arg, Halves) for arg in args[:2]):
            args[0].first.copy_(args[1].first)
            args[0].second.copy_(args[1].second)
            return args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Halves(args[0].first, args[0].second)
        whole = [arg.first + arg.second if isinstance(arg, Halves) else arg for arg in args]
        return func(*whole, **(kwargs or {}))


def with_halves() -> Net:
    net = Net().eval()
    net.b[0].weight = nn.Parameter(Halves(R(8, 8), R(8, 8)), requires_grad=False)
    return net


def test_weights_that_are_made_of_others_come_back(tmp_path: Any) -> None:
    model, x = cet.EarlyExit(with_halves(), EXITS, (R(4, 6),)).eval(), R(ROWS, 6)
    model.save(tmp_path / "m")
    assert torch.equal(cet.load(tmp_path / "m", with_halves()).predict(x).logits, model.predict(x).logits)
    with pytest.raises(ValueError, match=r"b.0.weight as Halves None and the model as a plain tensor; quantise"):
        cet.load(tmp_path / "m", Net().eval())
    whole = cet.EarlyExit(Net().eval(), EXITS, (R(4, 6),)).eval()
    whole.save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"b.0.weight as a plain tensor and the model as Halves None; quantise"):
        cet.load(tmp_path / "plain", with_halves())


# ---- meta and offload -----------------------------------------------------------------------------------------------


def test_a_backbone_on_the_meta_device_is_refused_with_the_way_or_becomes_right_once_it_is_filled() -> None:
    with torch.device("meta"):
        net = Net().eval()
    try:
        model = cet.EarlyExit(net, EXITS, (R(4, 6),)).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        assert_names_the_way(error, "meta", "to_empty|load")
        return
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert_answers_of_eager_backbone(model, R(ROWS, 6))


def test_a_model_whose_weights_went_to_meta_says_so() -> None:
    model = cet.EarlyExit(Net().eval(), EXITS, (R(4, 6),)).eval()
    model.predict(R(ROWS, 6))
    model.to("meta")
    with pytest.raises((TypeError, ValueError, RuntimeError), match="meta") as refused:
        model.predict(R(ROWS, 6))
    assert_names_the_way(refused.value, "meta", ";")


def test_a_backbone_with_offloaded_weights_works_or_names_the_way() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = Net().eval()
    x = R(ROWS, 6)
    with torch.no_grad():
        expected = net(x)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    try:
        model = cet.EarlyExit(net, EXITS, (R(4, 6),)).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        assert_names_the_way(error, "offload", r";|\.to\(")
        return
    torch.testing.assert_close(model.predict(x).logits, expected, rtol=1e-4, atol=1e-4)
    assert_answers_of_eager_backbone(model, x)


# ---- inference mode -------------------------------------------------------------------------------------------------


def test_a_model_made_in_inference_mode_can_be_trained_or_names_the_way() -> None:
    net = Net().eval()
    try:
        with torch.inference_mode():
            model = cet.EarlyExit(net, EXITS, (R(4, 6),)).eval()
    except (ValueError, RuntimeError) as error:
        assert_names_the_way(error, "inference", "outside|no_grad")
        return
    assert not any(p.is_inference() for p in model.parameters())
    assert_answers_of_eager_backbone(model, R(ROWS, 6))
    sum(logits.sum() for logits in model.train()(R(ROWS, 6))).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("inside", [False, True])
def test_a_backbone_made_in_inference_mode_predicts_or_names_the_way(inside: bool) -> None:
    with torch.inference_mode():
        net = Net().eval()
    try:
        with torch.inference_mode(inside):
            model = cet.EarlyExit(net, EXITS, (R(4, 6),)).eval()
    except (ValueError, RuntimeError) as error:
        assert_names_the_way(error, "inference", "outside|no_grad|clone|copy")
        return
    assert_answers_of_eager_backbone(model, R(ROWS, 6))
    with torch.inference_mode():
        assert_answers_of_eager_backbone(model, R(ROWS, 6))


# ---- checkpointed activations ---------------------------------------------------------------------------------------


class Checkpointed(Net):
    def __init__(self, use_reentrant: bool, early: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.early = early
        self.embed = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.training:
            if self.early:  # the exits are inside of what is computed again
                h = checkpoint(lambda t: self.b(self.a(t)), h, use_reentrant=self.use_reentrant)
            else:
                h = checkpoint(self.b, self.a(h), use_reentrant=self.use_reentrant)
        else:
            h = self.b(self.a(h))
        return self.top(h)


def gradients(model: cet.EarlyExit, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = [1.0, 2.0, 3.0]
    loss = sum(w * logits.square().sum() for w, logits in zip(weights, model.train()(x), strict=True))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_heads_and_backbone_get_their_gradients_through_checkpointed_activations(
    use_reentrant: bool, early: bool
) -> None:
    torch.manual_seed(3)
    model = cet.EarlyExit(Checkpointed(use_reentrant, early).train(), EXITS, (R(4, 6),)).train()
    torch.manual_seed(3)
    plain = cet.EarlyExit(Checkpointed(use_reentrant, early).train(), EXITS, (R(4, 6),)).train()
    plain.load_state_dict(model.state_dict())
    plain.backbone.forward = lambda x: plain.backbone.top(  # type: ignore[method-assign]
        plain.backbone.b(plain.backbone.a(plain.backbone.embed(x)))
    )
    x = R(ROWS, 6)
    expected = gradients(plain, x)
    try:
        got = gradients(model, x)
    except (ValueError, RuntimeError) as error:
        assert use_reentrant, "the way that is not reentrant works"
        assert_names_the_way(error, "checkpoint|reentrant", "use_reentrant=False")
        return
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_logits_of_all_exits_are_right_with_checkpointed_activations(use_reentrant: bool) -> None:
    model = cet.EarlyExit(Checkpointed(use_reentrant, True).train(), EXITS, (R(4, 6),)).train()
    x = R(ROWS, 6)
    try:
        trained = [logits.detach() for logits in model(x)]
    except (ValueError, RuntimeError) as error:
        assert_names_the_way(error, "checkpoint|reentrant", "use_reentrant=False")
        return
    model.eval()
    for got, wanted in zip(trained, assert_answers_of_eager_backbone(model, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_sequence_trains_its_heads() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
            self.top = nn.Linear(6, K)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.top(checkpoint_sequential(self.layers, 2, x, use_reentrant=False))
            return self.top(self.layers(x))

    model = cet.EarlyExit(Sequence().train(), ["layers.0", "layers.2"], (R(4, 6),)).train()
    sum(logits.square().sum() for logits in model(R(ROWS, 6))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
