"""A small residual 1-D CNN for windows of sensor data."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (24, 32, 64, 128)


def exits_of(widths: Sequence[int]) -> tuple[str, ...]:
    """Behind every block of a :class:`SensorNet` but the last."""
    return tuple(f"block{index + 1}" for index in range(len(widths) - 1))


EXITS = exits_of(WIDTHS)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, ``(B, in_channels, L)`` to ``(B, channels, ceil(L / 2))``.

    He et al. 2016, arXiv 1512.03385, section 3.3, in one dimension.
    """

    def __init__(self, in_channels: int, channels: int, *, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv1d(in_channels, channels, kernel_size, stride=2, padding=padding, bias=False)
        self.norm1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size, padding=padding, bias=False)
        self.norm2 = nn.BatchNorm1d(channels)
        self.shortcut = nn.Sequential(
            nn.Conv1d(in_channels, channels, 1, stride=2, bias=False),
            nn.BatchNorm1d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SensorNet(nn.Module):
    """Residual blocks, each at half the rate of the one before and wider, then mean pooling and a classifier.

    Deep blocks cost more than shallow ones and see more of the window, so that leaving early saves compute and costs
    accuracy. The kernels of the first block are longer, so that its exit sees half a second at 50 Hz. The blocks are
    the submodules ``block1``, ``block2`` and so on.

    Shape: windows ``(B, in_channels, L)`` to logits ``(B, num_classes)``.

    Args:
        num_classes: of the logits.
        in_channels: of the windows.
        widths: channels of each block.
    """

    def __init__(self, num_classes: int, in_channels: int = 6, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.num_blocks = len(widths)
        for index, (before, width) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            block = ResidualBlock(before, width, kernel_size=9 if index == 0 else 5)
            self.add_module(f"block{index + 1}", block)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.num_blocks):
            x = getattr(self, f"block{index + 1}")(x)
        logits: Tensor = self.classifier(x.mean(2))
        return logits


class Standardized(nn.Module):
    """A net whose input channels are brought to mean 0 and standard deviation 1 first, as they were in training.

    Mean and scale are buffers, so that they are saved with the weights.

    Shape: ``(B, C, ...)`` to what the net makes of it.

    Args:
        net: takes inputs of that shape.
        mean: ``(C,)``.
        scale: ``(C,)``, the standard deviations, > 0.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.ndim - 2))
        logits: Tensor = self.net((x - self.mean.view(shape)) / self.scale.view(shape))
        return logits
