"""A small residual 1-D CNN for windows of sensor data."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EXITS = ("block1", "block2", "block3")


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
    """Four residual blocks, each at half the rate of the one before and wider, then mean pooling and a classifier.

    Deep blocks cost more than shallow ones and see more of the window, so that leaving early saves compute and costs
    accuracy. The kernels of the first block are longer, so that its exit sees half a second at 50 Hz.

    Shape: windows ``(B, in_channels, L)`` to logits ``(B, num_classes)``.
    """

    def __init__(self, num_classes: int, in_channels: int = 6) -> None:
        super().__init__()
        self.block1 = ResidualBlock(in_channels, 24, kernel_size=9)
        self.block2 = ResidualBlock(24, 32, kernel_size=5)
        self.block3 = ResidualBlock(32, 64, kernel_size=5)
        self.block4 = ResidualBlock(64, 128, kernel_size=5)
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.block4(self.block3(self.block2(self.block1(x))))
        logits: Tensor = self.classifier(features.mean(2))
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
