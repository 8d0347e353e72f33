"""A small conv net that is trained within a second, for tests of what int8 changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cet

K = 3


class Net(nn.Module):
    """Convolutions with a shortcut, batch norm, and a size that may vary."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv1d(2, width, 5, padding=2), nn.BatchNorm1d(width), nn.ReLU())
        self.b = nn.Sequential(nn.Conv1d(width, width, 5, padding=2), nn.BatchNorm1d(width))
        self.c = nn.Sequential(nn.Conv1d(width, 2 * width, 3, stride=2), nn.ReLU())
        self.top = nn.Linear(2 * width, K)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.c(torch.relu(h + self.b(h)))
        return self.top(h.mean(2))


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Waves of three frequencies in noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (n,), generator=draw)
    phase = 6.3 * torch.rand(n, 2, 1, generator=draw)
    wave = torch.sin(torch.arange(40) * (0.3 + 0.15 * y)[:, None, None] + phase)
    return wave + 0.9 * torch.randn(n, 2, 40, generator=draw), y


def trained(width: int = 16) -> cet.EarlyExit:
    """The net with two early exits, whose policy opens both."""
    torch.manual_seed(0)
    model = cet.EarlyExit(Net(width).train(), ["a", "b"], (torch.randn(4, 2, 40),))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = samples(1000, 0)
    for _ in range(6):
        for rows, labels in zip(x.split(100), y.split(100), strict=True):
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(logits, labels) for logits in model(rows)).backward()
            optimizer.step()
    model.eval().policy = cet.calibrate(model, [samples(1000, 1)], 0.05)
    assert all(threshold is not None for threshold in model.policy.thresholds)
    return model
