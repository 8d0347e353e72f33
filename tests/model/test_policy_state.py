"""The policy is part of the model's state: it is stored, loaded and copied with the weights."""

from __future__ import annotations

import copy
import io
import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet

R = torch.randn
K = 4
POLICY = cet.ExitPolicy("margin", (0.25, None), (0.5, 2.0, 1.0), (0.5, 0.5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.tanh(self.b(torch.tanh(self.a(x)))))


def build(policy: cet.ExitPolicy | None = None) -> cet.EarlyExit:
    return cet.EarlyExit(Net().eval(), ["a", "b"], (R(4, 6),), policy=policy).eval()


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        cet.ExitPolicy("entropy", (math.inf, -math.inf)),
        cet.ExitPolicy("confidence", (0.1 + 0.2, None)),
        cet.ExitPolicy.closed(3),
    ],
)
def test_a_state_dict_carries_the_policy(policy: cet.ExitPolicy) -> None:
    model, other = build(policy), build(cet.ExitPolicy("confidence", (0.5, 0.5)))
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert other.policy == policy
    x = R(9, 6)
    assert torch.equal(other.predict(x).exit_index, model.predict(x).exit_index)


def test_a_file_of_torch_carries_the_policy_without_pickled_code() -> None:
    model, other, file = build(POLICY), build(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.policy == POLICY


def without_policy(model: cet.EarlyExit) -> dict[str, Any]:
    """A state dict as it was before policies were part of it."""
    return {name: value for name, value in model.state_dict().items() if "extra_state" not in name}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_without_a_policy_loads_and_the_policy_stays(strict: bool, assign: bool) -> None:
    model, other = build(), build(POLICY)
    state = without_policy(model)
    assert len(state) == len(list(model.parameters()))
    result = other.load_state_dict(state, strict=strict, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert other.policy == POLICY
    assert torch.equal(other.backbone.a.weight, model.backbone.a.weight)


def test_other_missing_keys_are_still_an_error() -> None:
    state = without_policy(build())
    del state["backbone.a.weight"]
    with pytest.raises(RuntimeError, match=r"backbone\.a\.weight"):
        build().load_state_dict(state)


def test_a_state_dict_for_another_number_of_exits_is_refused_and_the_policy_stays() -> None:
    other = cet.EarlyExit(Net().eval(), ["a"], (R(4, 6),), policy=cet.ExitPolicy("confidence", (0.5,)))
    with pytest.raises((RuntimeError, ValueError)):
        other.load_state_dict(build(POLICY).state_dict())
    assert other.policy == cet.ExitPolicy("confidence", (0.5,))


def test_a_model_inside_a_model_keeps_its_policy() -> None:
    """As in a Lightning module, whose checkpoints are its state dict."""

    class Outer(nn.Module):
        def __init__(self, policy: cet.ExitPolicy | None = None) -> None:
            super().__init__()
            self.model = build(policy)

    outer = Outer()
    outer.load_state_dict(Outer(POLICY).state_dict())
    assert outer.model.policy == POLICY


def test_the_weights_of_the_state_are_those_of_before() -> None:
    """Averages of weights, and everything else that walks over a state dict, find tensors or leave the policy alone."""
    model = build(POLICY)
    assert set(without_policy(model)) == {name for name, _ in model.named_parameters()}
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.update_parameters(build())
    twin = torch.optim.swa_utils.AveragedModel(build())
    twin.load_state_dict(averaged.state_dict())
    assert twin.module.policy == POLICY
    assert copy.deepcopy(model).policy == POLICY


def test_a_lightning_checkpoint_keeps_the_policy(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, policy: cet.ExitPolicy | None = None) -> None:
            super().__init__()
            self.model = build(policy)

        def training_step(self, batch: Any) -> Tensor:
            (x,) = batch
            return sum(logits.square().mean() for logits in self.model.train()(x))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu",
        enable_model_summary=False,
    )  # fmt: skip
    module = Module(POLICY)
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(R(8, 6)), batch_size=4))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    loaded = Module()
    loaded.load_state_dict(torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"])
    assert loaded.model.policy == POLICY


def test_a_calibration_may_be_assigned() -> None:
    model = build()
    loader = [(R(64, 6), torch.randint(K, (64,)))]
    calibration = cet.calibrate(model, loader, 0.2)
    model.policy = calibration
    assert model.policy == calibration.policy
    assert isinstance(model.policy, cet.ExitPolicy)
    model.policy = types.SimpleNamespace(policy=POLICY)
    assert model.policy is POLICY
    with pytest.raises(TypeError, match=r"give a cet\.ExitPolicy"):
        model.policy = types.SimpleNamespace(policy=0.5)
    with pytest.raises(ValueError, match="policy has 1 threshold "):
        model.policy = types.SimpleNamespace(policy=cet.ExitPolicy("confidence", (0.5,)))
    assert model.policy is POLICY


def test_the_file_of_a_model_keeps_the_policy_and_a_new_one_wins(tmp_path: Any) -> None:
    model = build(POLICY)
    model.save(tmp_path / "m")
    assert cet.load(tmp_path / "m", Net()).policy == POLICY
    model.policy = cet.ExitPolicy("confidence", (0.5, 0.6))
    model.save(tmp_path / "m")
    assert cet.load(tmp_path / "m", Net()).policy == model.policy


# ---- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["confidence", "margin"])
@pytest.mark.parametrize("threshold", [95, 2.5, -3.0])
def test_a_finite_threshold_far_outside_0_and_1_is_refused(score: Any, threshold: float) -> None:
    """Up to 2 is a usual way to write that nobody leaves; more is a percentage."""
    with pytest.raises(ValueError, match=rf"thresholds\[1\] is {threshold}.*at most 1") as refused:
        cet.ExitPolicy(score, (0.5, threshold))
    assert "\n" not in str(refused.value)


def test_a_percentage_is_told_how_to_be_written() -> None:
    with pytest.raises(ValueError, match=r"95.*0\.95"):
        cet.ExitPolicy("confidence", (95, 95))


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("threshold", [0.0, 1.0, math.inf, -math.inf, None])
def test_the_ends_of_the_range_and_infinities_are_fine(score: Any, threshold: float | None) -> None:
    model = cet.EarlyExit(Net().eval(), ["a"], (R(4, 6),), policy=cet.ExitPolicy(score, (threshold,)))
    leaving = model.predict(R(9, 6)).exit_index.tolist()
    everybody = -math.inf if score != "entropy" else math.inf
    nobody = -everybody
    if threshold in (everybody, nobody):
        assert leaving == [0 if threshold == everybody else 1] * 9


def test_an_entropy_above_that_of_any_class_is_fine() -> None:
    assert cet.ExitPolicy("entropy", (5.5,)).thresholds == (5.5,)
