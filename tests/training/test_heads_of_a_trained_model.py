"""train_heads: the heads learn, and all else of a trained model stays as it was."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cet
import cet.training
from cet.training import MultiExitTraining, train_heads


class Net(nn.Module):
    """Batch normalisation and dropout: both would show a backbone in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.tail = nn.Linear(16, 3)
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes |= {module.training for module in self.modules()}
        logits: Tensor = self.tail(self.drop(self.body(x)))
        return logits


def data(rows: int = 96) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(rows) % 3
    x = torch.randn(rows, 4, generator=draw) * 0.3 + torch.eye(4)[y] * 2
    return list(zip(x.split(16), y.split(16), strict=True))


def make(head: Any = None) -> cet.EarlyExit:
    torch.manual_seed(0)
    model = cet.EarlyExit(Net(), {"body": head}, (torch.randn(3, 4),))
    with torch.no_grad():
        model.train().exit_logits(torch.randn(64, 4) + 1)  # running statistics that are not the initial ones
    model.eval()
    model.backbone.modes.clear()
    return model


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_heads_learn_and_the_backbone_is_the_same_bit_for_bit() -> None:
    model = make()
    backbone, heads = bits(model.backbone), bits(model.heads)
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    with torch.no_grad():
        final = model.exit_logits(x)[-1]
    losses = train_heads(model, data(), epochs=20, learning_rate=0.05)
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, backbone[name]) for name, value in model.backbone.state_dict().items())
    assert not any(torch.equal(value, heads[name]) for name, value in model.heads.state_dict().items())
    with torch.no_grad():
        early, still_final = model.exit_logits(x)
    assert torch.equal(still_final, final)
    assert (early.argmax(1) == y).float().mean() > 0.95


def test_the_loss_is_that_of_a_backbone_in_eval_mode() -> None:
    model, [batch, *_] = make(), data()
    with torch.no_grad():
        logits = model.exit_logits(batch[0])
    expected = sum(nn.functional.cross_entropy(z, batch[1]) for z in logits) / 2
    model.backbone.modes.clear()
    [loss] = train_heads(model, [batch], epochs=1)
    assert loss == pytest.approx(float(expected))
    assert model.backbone.modes == {False}


class StopError(Exception):
    pass


def broken() -> list[Any]:
    class Broken(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield data()[0]
            raise StopError

    return Broken([0])


@pytest.mark.parametrize("loader", [data(), broken()], ids=["to the end", "after an error"])
def test_modes_gradients_and_what_needs_them_are_put_back(loader: list[Any]) -> None:
    model = make(nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 3))).train()
    model.backbone.body[1].eval()
    model.backbone.tail.bias.requires_grad_(False)
    model.heads[0][0].weight.requires_grad_(False)
    model.backbone.tail.weight.grad = gradient = torch.ones(3, 16)
    modes = [module.training for module in model.modules()]
    needed = [weight.requires_grad for weight in model.parameters()]
    before = bits(model.heads)
    try:
        train_heads(model, loader, epochs=2)
    except StopError:
        assert len(loader) == 1
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == needed
    assert model.backbone.tail.weight.grad is gradient
    assert all(weight.grad is None for weight in model.heads.parameters())
    assert not any(torch.equal(value, before[name]) for name, value in model.heads.state_dict().items())


def test_a_seed_decides_all_random_numbers_and_leaves_those_of_others_alone() -> None:
    def trained(seed: int) -> Tensor:
        model = make()
        state = torch.get_rng_state()
        loss = cet.ConsistentExitLoss(lambda x: x + torch.randn_like(x))
        train_heads(model, data(), epochs=1, seed=seed, loss=loss)
        assert torch.equal(torch.get_rng_state(), state)
        return model.heads[0].linear.weight.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_the_final_exit_teaches_the_heads_without_labels() -> None:
    model = make()
    x = torch.cat([x for x, _ in data()])
    unlabelled = [(x, torch.full_like(y, -100)) for x, y in data()]
    loss = cet.ConsistentExitLoss(lambda x: x.clone(), teacher="final")
    train_heads(model, unlabelled, epochs=30, learning_rate=0.05, loss=loss)
    with torch.no_grad():
        early, final = model.exit_logits(x)
    assert (early.argmax(1) == final.argmax(1)).float().mean() > 0.9


def test_batches_of_any_kind() -> None:
    weights = []
    for loader, batch_fn in (
        (data(), None),
        ([{"x": x, "labels": y} for x, y in data()], None),
        ([(y, x) for x, y in data()], lambda batch: (batch[1], batch[0])),
    ):
        model = make()
        train_heads(model, loader, epochs=1, batch_fn=batch_fn)
        weights.append(model.heads[0].linear.weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(4, 3)}, TypeError, r"model is Linear; wrap it in cet\.EarlyExit"),
        ({"epochs": 0}, ValueError, "epochs is 0; give a whole number from 1 on"),
        ({"epochs": 1.5}, ValueError, "epochs is 1.5; give a whole number from 1 on"),
        ({"seed": "one"}, TypeError, "seed is 'one'; give a whole number"),
        ({"loss": "entropy"}, TypeError, "loss is 'entropy'; give a cet.ConsistentExitLoss"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate is 0\.0; give a positive number"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay is -1\.0; give a number >= 0"),
        ({"loader": None}, TypeError, "loader is None; give an iterable of batches"),
        ({"loader": []}, ValueError, "loader yields no batch in epoch 0"),
        ({"loader": iter(data())}, ValueError, "loader can be read once only, but epochs is 10; give a DataLoader"),
        (
            {"loader": [(torch.full((16, 4), torch.nan), data()[0][1])]},
            RuntimeError,
            "rows of the batch are not finite",
        ),
    ],
)
def test_misuse_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train_heads(**{"model": make(), "loader": data(), **arguments})


def test_heads_need_weights_of_their_own() -> None:
    with pytest.raises(ValueError, match="the heads have no weights to train"):
        train_heads(make(Truncate()), data())
    net = Net()
    model = cet.EarlyExit(net, {"body": net.tail}, (torch.randn(3, 4),))
    with pytest.raises(ValueError, match="the head of exit 'body' shares weights with the backbone"):
        train_heads(model, data())


class Truncate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3]


def test_a_model_in_half_precision_trains_in_it() -> None:
    model = make().bfloat16()
    backbone = bits(model.backbone)
    losses = train_heads(model, [(x.bfloat16(), y) for x, y in data()], epochs=5, learning_rate=0.05)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, backbone[name]) for name, value in model.backbone.state_dict().items())


def test_the_objective_and_the_heads_need_no_lightning() -> None:
    code = """
import sys
sys.modules["lightning"] = None  # an import of it raises ImportError
import cet, cet.training
assert cet.ConsistentExitLoss and cet.train_heads is cet.training.train_heads and cet.training.SensorNet
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert all(getattr(cet.training, name) is not None for name in cet.training.__all__)


def test_the_lightning_module_leaves_a_frozen_backbone_alone_too(tmp_path: Path) -> None:
    model = make().train()
    model.backbone.eval().requires_grad_(False)
    backbone, heads = bits(model.backbone), bits(model.heads)
    model.backbone.modes.clear()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data(), batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(MultiExitTraining(model, cet.ConsistentExitLoss(None, 0.0)), loader, loader)
    assert model.backbone.modes == {False}
    assert all(torch.equal(value, backbone[name]) for name, value in model.backbone.state_dict().items())
    assert not any(torch.equal(value, heads[name]) for name, value in model.heads.state_dict().items())
