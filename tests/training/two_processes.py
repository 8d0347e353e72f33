"""One of several processes that train one model; what it ends with is written to a file.

The processes meet through a file in FOLDER and speak over the loopback interface, on ports that the system chooses:
there is no port to race for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import cet

WATCHDOG = 100.0
ROWS, STEPS = 24, 4

Result = dict[str, Any]


def shift(x: Tensor) -> Tensor:
    return x + 0.3


def make_model() -> cet.EarlyExit:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return cet.EarlyExit(net, ["0", "2"], (torch.zeros(2, 5),))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator)


def with_torch(rank: int, world_size: int, _folder: Path) -> Result:
    """Steps of plain SGD, each process on every world_size-th row."""
    model, loss_of = make_model(), cet.ConsistentExitLoss(shift, teacher="final")
    net: nn.Module = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    x, y = (part[rank::world_size] for part in data())
    net.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, x, y)[0].backward()
        optimizer.step()
    net.eval()
    model.policy = cet.ExitPolicy("confidence", (0.4, None))
    with torch.no_grad():
        return {"weights": weights_of(model), "answers": net(data()[0])}


def with_lightning(rank: int, world_size: int, folder: Path) -> Result:
    """Two epochs of the Lightning module, then one whose perturbation draws random numbers."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from cet.training import MultiExitTraining

    class Launched(LightningEnvironment):
        """The processes are there already, and have met."""

        @property
        def creates_processes_externally(self) -> bool:
            return True

        def world_size(self) -> int:
            return world_size

        def global_rank(self) -> int:
            return rank

        def local_rank(self) -> int:
            return rank

    draws: list[Tensor] = []

    def noise(x: Tensor) -> Tensor:
        draws.append(torch.randn(4))
        return x + torch.randn_like(x)

    def fit(perturb: Callable[[Tensor], Tensor], epochs: int) -> cet.EarlyExit:
        model = make_model().train()
        distributed: Result = {"strategy": DDPStrategy(cluster_environment=Launched()), "devices": world_size}
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **(distributed if world_size > 1 else {"devices": 1}),
        )
        # Process k has rows k, k + world_size, ... in order: the same rows per step for any number of processes.
        rows = TensorDataset(*data())
        mine = DistributedSampler(rows, world_size, rank, shuffle=False)
        loader = DataLoader(rows, sampler=mine, batch_size=6 // world_size)
        trainer.fit(MultiExitTraining(model, cet.ConsistentExitLoss(perturb)), loader, loader)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        results.setdefault("metrics", metrics)
        return model

    results: Result = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        weights = weights_of(fit(shift, 2))
        noisy = weights_of(fit(noise, 1))
    return {**results, "weights": weights, "noisy_weights": noisy, "draws": torch.stack(draws)}


TASKS = {"torch": with_torch, "lightning": with_lightning}


@contextmanager
def together(rank: int, world_size: int, folder: Path) -> Iterator[None]:
    """A process group of those who come to `folder`; none for a single process."""
    if world_size == 1:
        yield
        return
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=WATCHDOG),
    )
    yield
    dist.barrier()
    dist.destroy_process_group()


def main(task: str, rank: int, world_size: int, folder: Path) -> Result:
    with together(rank, world_size, folder):
        return TASKS[task](rank, world_size, folder)


def one_of_two(task: str, rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.save(main(task, rank, 2, folder), folder / f"{rank}.pt")
