"""Perturbations of sensor windows (B, C, L): C axes such as accelerometer xyz then gyroscope xyz, L samples.

Um et al. is T. T. Um et al., "Data augmentation of wearable sensor data for Parkinson's disease monitoring
using convolutional neural networks", ICMI 2017, arXiv 1706.00527.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Draws, TensorPerturbation, along, count, masked, mean, number, take


@dataclass(frozen=True)
class Jitter(TensorPerturbation):
    """Adds white Gaussian noise: sensor noise, or pixel noise for images (B, C, H, W).

    Um et al., "jittering". Severity scales the noise's standard deviation. Gradients pass as if the noise
    were a constant.

    Args:
        std: standard deviation of the noise.
        relative: `std` is in units of each row's and channel's own standard deviation, else in units of x.
    """

    layouts = ("(B, C, L)", "(B, C, H, W)")
    std: float = number(0.05)
    relative: bool = True

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        noise = draws.normal(*x.shape[1:]) * (self.severity * self.std)
        return x + noise * channel_std(x) if self.relative else x + noise


@dataclass(frozen=True)
class Scaling(TensorPerturbation):
    """Multiplies each channel by a log-normal gain exp(std * N(0, 1)) of its own: calibration error.

    Um et al., "scaling"; they draw the gain from N(1, std**2), with which the log-normal agrees for small
    `std`, but it never flips a sign. Severity scales `std`.

    Args:
        std: standard deviation of the gain's natural logarithm.
    """

    layouts = ("(B, C, L)",)
    std: float = number(0.1)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        return x * (draws.normal(x.shape[1], 1) * (self.severity * self.std)).exp()


@dataclass(frozen=True)
class AxisRotation(TensorPerturbation):
    """Rotates x, y, z triples of channels, all triples of a row by one 3-D rotation: how a device is worn.

    The axis is uniform on the sphere, the angle uniform from 0 to `max_degrees`. Um et al., "rotation".
    Severity scales the angle. A missing value takes part as the mean of its row's channel.

    Args:
        max_degrees: largest angle.
        triples: first channel of each triple; (0, 4) spares channel 3, None means 0-2, 3-5 and so on.

    Raises:
        ValueError: at a call, if a triple does not fit into the channels.
    """

    layouts = ("(B, C, L)",)
    max_degrees: float = number(30.0, high=180.0)
    triples: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.triples is not None and not (
            isinstance(self.triples, tuple)
            and all(isinstance(start, int) and start >= 0 for start in self.triples)
            and all(later - start >= 3 for start, later in pairwise(sorted(self.triples)))
        ):
            raise ValueError(
                f"AxisRotation: triples is {self.triples!r}; pass a tuple of first channels at least 3 apart"
            )

    def _check_shape(self, shape: torch.Size) -> None:
        super()._check_shape(shape)
        channels = shape[1]
        if self.triples is None and channels % 3:
            raise ValueError(
                f"AxisRotation: x has {channels} channels, not a multiple of 3; name the first channel of"
                " each x, y, z triple by triples=(...)"
            )
        if self.triples and max(self.triples) + 3 > channels:
            raise ValueError(
                f"AxisRotation: triples {self.triples} reach beyond the {channels} channels of x;"
                f" start them at {channels - 3} at the latest"
            )

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        axis = F.normalize(draws.normal(1, 3), dim=-1)
        angle = draws.uniform(1, 1, high=math.radians(self.severity * self.max_degrees))
        identity = torch.eye(3, device=x.device, dtype=x.dtype).unsqueeze(0)
        cross = torch.linalg.cross(identity, axis)  # cross @ v is the cross product of axis and v
        # Rodrigues' formula.
        rotation = identity + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)
        rotated = x.clone()
        for start in range(0, x.shape[1], 3) if self.triples is None else self.triples:
            triple = x[:, start : start + 3]
            finite = triple.isfinite()
            filled = torch.where(finite, triple, mean(triple, (-1,)))
            rotated[:, start : start + 3] = torch.where(finite, rotation @ filled, triple)
        return rotated


@dataclass(frozen=True)
class Drift(TensorPerturbation):
    """Adds a slow random baseline to each channel: bias instability of inertial sensors, electrode drift.

    The baseline is piecewise linear through Gaussian knots. O. J. Woodman, "An introduction to inertial
    navigation", UCAM-CL-TR-696, 2007, section 3.2. Severity scales its standard deviation.

    Args:
        std: standard deviation of the knots, in units of each row's and channel's own standard deviation.
        knots: knots over the window, both ends counted; at least 2.
    """

    layouts = ("(B, C, L)",)
    std: float = number(0.2)
    knots: int = count(4, low=2)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        _, channels, length = x.shape
        return x + draws.curve(channels, self.knots, length) * (self.severity * self.std) * channel_std(x)


@dataclass(frozen=True)
class TimeMask(TensorPerturbation):
    """Replaces contiguous spans of time in all channels at once: lost packets.

    The time mask of SpecAugment, arXiv 1904.08779, section 2, on the raw signal. Severity scales the longest
    span.

    Args:
        fraction: longest span as a fraction of L; lengths are uniform from 0 to it.
        spans: number of spans, which may overlap.
        fill: what is put there; None: the mean of the row's channel.
    """

    layouts = ("(B, C, L)",)
    fraction: float = number(0.2, high=1.0)
    spans: int = count(1)
    fill: float | None = number(None, low=-math.inf)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        mask = draws.spans(x.shape[-1], self.spans, self.severity * self.fraction)
        return masked(x, along(mask, x, -1), self.fill, (-1,))


@dataclass(frozen=True)
class ChannelDropout(TensorPerturbation):
    """Sets whole channels to zero, never all of a row: sensors that fail.

    Tompson et al. 2015, arXiv 1411.4280, section 3.2 ("SpatialDropout"), on the input and without rescaling.
    Severity scales the probability, up to 1.

    Args:
        probability: chance of each channel to be dropped, unless it is the last one left.
    """

    layouts = ("(B, C, L)",)
    probability: float = number(0.1, high=1.0)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        chance = draws.uniform(x.shape[1], 1)
        survivor = chance.argmax(1, keepdim=True)
        dropped = (chance < self.severity * self.probability).scatter(1, survivor, False)
        return masked(x, dropped, 0.0, ())


@dataclass(frozen=True)
class TimeWarp(TensorPerturbation):
    """Plays each window at a smoothly changing speed with its ends in place: movements done faster or slower.

    The logarithm of the speed is piecewise linear through Gaussian knots, so that time never runs
    backwards; samples are interpolated linearly, alike in all channels. Between a sample and a missing
    one it is the nearer of the two. Um et al., "time-warping". Severity scales `std`.

    Args:
        std: standard deviation of the knots: of the natural logarithm of the local speed.
        knots: knots over the window, both ends counted; at least 2.
    """

    layouts = ("(B, C, L)",)
    std: float = number(0.2)
    knots: int = count(4, low=2)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        last = x.shape[-1] - 1
        if last == 0:
            return x.clone()
        log_speed = draws.curve(1, self.knots, last).squeeze(1) * (self.severity * self.std)
        travelled = F.pad(log_speed.softmax(-1).cumsum(-1), (1, 0))
        position = travelled / travelled[:, -1:] * last
        index = position.long().clamp(max=last - 1)
        left, right, weight = take(x, index, -1), take(x, index + 1, -1), along(position - index, x, -1)
        between = left.isfinite() & right.isfinite()
        return torch.where(between, torch.lerp(left, right, weight), torch.where(weight < 0.5, left, right))


def channel_std(x: Tensor) -> Tensor:
    """Standard deviation of the values of each row and channel that are not missing, broadcastable to x.

    A constant for autograd: the gradient of a standard deviation is undefined for a flat channel.
    """
    x, dims = x.detach(), tuple(range(2, x.ndim))
    return mean((x - mean(x, dims)).square(), dims).sqrt()
