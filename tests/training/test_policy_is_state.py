"""The policy is part of the state: it survives every way to save and load a model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cet
from cet.training import MultiExitTraining
from cet.training.lightning import AtomicCheckpointIO

X, Y = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
POLICIES = [
    cet.ExitPolicy("confidence", (0.4, None)),
    cet.ExitPolicy("entropy", (None, 1.05), temperatures=(0.5, 2.0, 1.0), survival=(1.0, 0.3)),
    cet.ExitPolicy("margin", (float("inf"), -float("inf"))),
    cet.ExitPolicy.closed(3),
]


def make(policy: cet.ExitPolicy | None = None, seed: int = 0) -> cet.EarlyExit:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return cet.EarlyExit(net, ["0", "2"], (X[:3],), policy=policy)


def assert_same_answers(got: cet.EarlyExit, expected: cet.EarlyExit) -> None:
    assert got.policy == expected.policy
    ours, theirs = got.eval().predict(X), expected.eval().predict(X)
    assert torch.equal(ours.exit_index, theirs.exit_index)
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_state_dicts_through_torch_save(policy: cet.ExitPolicy, tmp_path: Path) -> None:
    model, other = make(policy), make(POLICIES[0], seed=1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_answers(other, model)
    assert copy.deepcopy(model).policy == policy


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_state_dicts_through_safetensors_as_the_trainer_of_hugging_face_writes_them(
    policy: cet.ExitPolicy, tmp_path: Path
) -> None:
    model, other = make(policy), make(seed=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_answers(other, model)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["alone", "in a module"])
def test_a_state_from_before_the_policy_was_in_it_leaves_the_policy(wrap: Any) -> None:
    model, other = make(POLICIES[1]), make(POLICIES[0], seed=1)
    state = {name: value for name, value in wrap(model).state_dict().items() if not name.endswith("_extra_state")}
    wrap(other).load_state_dict(state, strict=True)
    assert other.policy == POLICIES[0]
    other.policy = POLICIES[1]
    assert_same_answers(other, model)


def test_a_state_for_other_exits_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    fewer = cet.EarlyExit(net, ["0"], (X[:3],), policy=cet.ExitPolicy("margin", (0.5,)))
    with pytest.raises(ValueError, match="policy has 1 threshold but the model has 2 early exits"):
        make().load_state_dict(fewer.state_dict(), strict=False)


def test_a_calibration_can_be_assigned_and_saved() -> None:
    model, other = make(), make(seed=1)
    calibration = cet.calibrate(model, [(X, Y)], max_accuracy_drop=0.5)
    model.policy = calibration  # type: ignore[assignment]
    assert model.policy == calibration.policy
    other.load_state_dict(model.state_dict())
    assert_same_answers(other, model)


def test_casts_and_averages_leave_the_policy() -> None:
    model = make(POLICIES[1])
    assert model.half().float().policy == POLICIES[1]
    average = torch.optim.swa_utils.AveragedModel(make(POLICIES[1]))
    average.update_parameters(make(POLICIES[1], seed=1))
    assert average.module.policy == POLICIES[1]
    restored = torch.optim.swa_utils.AveragedModel(make())
    restored.load_state_dict(average.state_dict())
    assert_same_answers(restored.module, average.module)


def lightning_trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_lightning_checkpoints(tmp_path: Path) -> None:
    loss = cet.ConsistentExitLoss(None, 0.0)
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(TensorDataset(X, Y), batch_size=32)
    model, other = make(POLICIES[1]), make(seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning_trainer(tmp_path, max_epochs=1)
        trainer.fit(MultiExitTraining(model.train(), loss), loader)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        # Nothing is left to train: what the checkpoint holds is what the model gets.
        resumed = lightning_trainer(tmp_path, max_epochs=1)
        resumed.fit(MultiExitTraining(other.train(), loss), loader, ckpt_path=tmp_path / "last.ckpt")
    assert_same_answers(other, model)


def test_states_of_accelerate(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare_model(make(POLICIES[1]))
    accelerator.save_state(str(tmp_path))
    expected = make(POLICIES[1])
    accelerator.unwrap_model(model).load_state_dict(make(seed=1).state_dict())
    accelerator.load_state(str(tmp_path))
    assert_same_answers(accelerator.unwrap_model(model), expected)
