"""Perturbations of images (B, C, H, W). For pixel noise see `Jitter`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import Draws, TensorPerturbation, along, masked, mean, number, shift, span


@dataclass(frozen=True)
class Crop(TensorPerturbation):
    """Pads each image and crops it back to its size at a random place: a shift by whole pixels.

    He et al. 2016, arXiv 1512.03385, section 4.2. Severity scales the padding, up to one pixel less than the
    image.

    Args:
        padding: padding on each side as a fraction of H and of W.
        padding_mode: "reflect" mirrors the image at its edge pixels, "zeros" pads with zero.
    """

    layouts = ("(B, C, H, W)",)
    padding: float = number(0.125, high=1.0)
    padding_mode: Literal["reflect", "zeros"] = "reflect"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding_mode not in ("reflect", "zeros"):
            raise ValueError(f"Crop: padding_mode {self.padding_mode!r} is unknown; pass 'reflect' or 'zeros'")

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        for dim in (-2, -1):
            size = x.shape[dim]
            limit = min(round(min(self.severity * self.padding, 1.0) * size), size - 1)
            offset = draws.integers(1, high=2 * limit) - limit
            x = shift(x, offset, dim, reflect=self.padding_mode == "reflect")
        return x


@dataclass(frozen=True)
class Flip(TensorPerturbation):
    """Mirrors images left to right. He et al. 2016, arXiv 1512.03385, section 4.2.

    Severity scales the probability, up to 1.

    Args:
        probability: chance of each image to be mirrored.
    """

    layouts = ("(B, C, H, W)",)
    probability: float = number(0.5, high=1.0)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        return torch.where(draws.uniform(1, 1, 1) < self.severity * self.probability, x.flip(-1), x)


@dataclass(frozen=True)
class ColorJitter(TensorPerturbation):
    """Changes brightness, contrast and saturation, in this order, by factors uniform in [1 - a, 1 + a].

    Brightness multiplies the image, contrast stretches it about its mean, saturation about its grey
    image: the mean over channels, however many. Nothing is clipped, since the range of x is not known.
    Howard 2013, arXiv 1312.5402, section 2.2. Severity scales the range of the factors, which stay >= 0.

    Args:
        brightness: a of the brightness factor.
        contrast: a of the contrast factor.
        saturation: a of the saturation factor.
    """

    layouts = ("(B, C, H, W)",)
    brightness: float = number(0.2)
    contrast: float = number(0.2)
    saturation: float = number(0.2)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        def factor(amount: float) -> Tensor:
            limit = self.severity * amount
            return draws.uniform(1, 1, 1, low=1 - limit, high=1 + limit).clamp(min=0)

        brighter = x * factor(self.brightness)
        stretched = torch.lerp(mean(brighter, (1, 2, 3)), brighter, factor(self.contrast))
        saturated = torch.lerp(mean(stretched, (1,)), stretched, factor(self.saturation))
        return torch.where(x.isfinite(), saturated, x)


@dataclass(frozen=True)
class Erase(TensorPerturbation):
    """Random erasing: replaces a rectangle of each image; `RandomApply(Erase(), 0.5)` spares half of them.

    Zhong et al. 2020, arXiv 1708.04896, algorithm 1. Where the paper draws again, a rectangle that is
    longer than the image is cut to it; areas start at 0. Severity scales the largest area.

    Args:
        area: largest area as a fraction of H * W; areas are uniform from 0 to it.
        aspect: smallest height / width; the ratio is log-uniform from it to its inverse.
        fill: what is put there; None: the mean of the row's channel.
    """

    layouts = ("(B, C, H, W)",)
    area: float = number(0.4, high=1.0)
    aspect: float = number(0.3, low=0.01, high=1.0)
    fill: float | None = number(None, low=-math.inf)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        height, width = x.shape[-2:]
        area = draws.uniform(1, high=min(self.severity * self.area, 1.0) * height * width)
        aspect = draws.uniform(1, low=math.log(self.aspect), high=-math.log(self.aspect)).exp()

        def side(dim: int, extent: Tensor) -> Tensor:
            size = x.shape[dim]
            extent = extent.round().clamp(max=size)
            return along(span(draws.integers(1, high=size - extent), extent, size), x, dim)

        inside = side(-2, (area * aspect).sqrt()) & side(-1, (area / aspect).sqrt())
        return masked(x, inside, self.fill, (-2, -1))
