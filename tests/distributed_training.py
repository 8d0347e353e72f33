"""Trains a model on two processes, and checks that both have the gradients and the weights of the whole batch."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import cet
from cet.training.lightning import MultiExitTraining

PROCESSES, ROWS = 2, 6


def shift(x: Tensor) -> Tensor:
    return x + 0.3


def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def make_model() -> cet.EarlyExit:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return cet.EarlyExit(net, ["0", "2"], (torch.zeros(2, 5),))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (PROCESSES * ROWS,), generator=generator)
    return torch.randn(PROCESSES * ROWS, 5, generator=generator), labels


def with_torch(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    model, loss_of = make_model(), cet.ConsistentExitLoss(shift, teacher="final")
    whole = copy.deepcopy(model)
    x, y = data()
    loss_of(whole, x, y)[0].backward()

    wrapped = DistributedDataParallel(model)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    loss_of(wrapped, x[mine], y[mine])[0].backward()
    for (name, got), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")

    wrapped.eval()
    model.policy = cet.ExitPolicy("confidence", (0.4, None))
    with torch.no_grad():
        assert torch.equal(wrapped(x), model(x))
    dist.destroy_process_group()


class Recorded(MultiExitTraining):
    def on_train_end(self) -> None:
        draws = self.all_gather(torch.randn(4))  # of the generator that the last step has seeded
        assert not torch.equal(draws[0], draws[1])
        trained, new = (
            torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (self.model, make_model())
        )
        weights = self.all_gather(trained)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(trained, new)


def with_lightning(folder: Path) -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp_spawn",
        max_epochs=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(*data()), batch_size=3)
    trainer.fit(Recorded(make_model(), cet.ConsistentExitLoss(noise)), loader, loader)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    spawn(with_torch, (str(folder / "store"),), nprocs=PROCESSES)
    with_lightning(folder)
    print("both trained")
