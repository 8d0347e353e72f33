"""Perturbations of audio: waveforms (B, L) or (B, C, L), and spectrograms (B, F, T) or (B, C, F, T)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Draws, TensorPerturbation, along, count, masked, mean, number, shift


@dataclass(frozen=True)
class Noise(TensorPerturbation):
    """Adds white Gaussian noise at an exact signal-to-noise ratio in every row; silence stays silent.

    Salamon & Bello 2017, arXiv 1608.04363, section II-B ("background noise"). Severity scales the noise's
    amplitude: the ratio is snr_db - 20 log10(severity). Gradients pass as if the noise were a constant.

    Args:
        snr_db: power of the row over power of its noise, channels taken together and missing values left out,
            in dB.
    """

    layouts = ("(B, L)", "(B, C, L)")
    snr_db: float = number(20.0, low=-math.inf)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        noise = draws.normal(*x.shape[1:])
        finite = x.isfinite()
        ratio = rms(x.detach(), finite) / rms(noise, finite)
        return x + noise * (ratio.nan_to_num() * (self.severity * 10 ** (-self.snr_db / 20)))


@dataclass(frozen=True)
class Gain(TensorPerturbation):
    """Makes each row louder or softer by a gain uniform in dB: distance to the microphone.

    Schlüter & Grill 2015, "Exploring data augmentation for improved singing voice detection with neural
    networks", ISMIR ("loudness"). Severity scales the range in dB.

    Args:
        max_db: largest gain either way, in dB of amplitude.
    """

    layouts = ("(B, L)", "(B, C, L)")
    max_db: float = number(6.0)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        limit = self.severity * self.max_db
        return x * 10 ** (draws.uniform(*(1,) * (x.ndim - 1), low=-limit, high=limit) / 20)


@dataclass(frozen=True)
class TimeShift(TensorPerturbation):
    """Moves each row earlier or later by whole samples; what is uncovered is silence.

    Piczak 2015, "Environmental sound classification with convolutional neural networks", MLSP ("random time
    delays"). Severity scales the longest shift.

    Args:
        fraction: longest shift either way as a fraction of L.
    """

    layouts = ("(B, L)", "(B, C, L)")
    fraction: float = number(0.1, high=1.0)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        limit = round(min(self.severity * self.fraction, 1.0) * x.shape[-1])
        return shift(x, draws.integers(1, high=2 * limit) - limit, -1)


@dataclass(frozen=True)
class SpecMask(TensorPerturbation):
    """SpecAugment without its time warp: masks bands of frequency and spans of time, alike in all channels.

    Park et al. 2019, arXiv 1904.08779, section 2; widths are fractions here, to suit any resolution. Severity
    scales the widest mask of either kind.

    Args:
        frequency_fraction: widest band as a fraction of F; widths are uniform from 0 to it.
        time_fraction: longest span as a fraction of T, likewise.
        frequency_masks: number of bands, which may overlap.
        time_masks: number of spans, likewise.
        fill: what is put there; None: the mean of the row's channel, the paper's zero for normalised input.
    """

    layouts = ("(B, F, T)", "(B, C, F, T)")
    frequency_fraction: float = number(0.2, high=1.0)
    time_fraction: float = number(0.2, high=1.0)
    frequency_masks: int = count(2, low=0)
    time_masks: int = count(2, low=0)
    fill: float | None = number(None, low=-math.inf)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        bands = draws.spans(x.shape[-2], self.frequency_masks, self.severity * self.frequency_fraction)
        spans = draws.spans(x.shape[-1], self.time_masks, self.severity * self.time_fraction)
        return masked(x, along(bands, x, -2) | along(spans, x, -1), self.fill, (-2, -1))


def rms(x: Tensor, where: Tensor) -> Tensor:
    """Root mean square of each row, broadcastable to x, of the values at the positions `where`."""
    return mean(torch.where(where, x.square(), math.nan), tuple(range(1, x.ndim))).sqrt()
