"""One sensible composition per kind of input, from what changes the world to what changes its recording."""

from __future__ import annotations

from .audio import Gain, Noise, SpecMask, TimeShift
from .compose import Compose, RandomApply
from .images import ColorJitter, Crop, Erase, Flip
from .sensors import AxisRotation, ChannelDropout, Drift, Jitter, Scaling, TimeMask, TimeWarp


def sensor(severity: float = 1.0, *, rotate: bool = True) -> Compose:
    """For sensor windows (B, C, L).

    Args:
        severity: 0 is the identity.
        rotate: C is a multiple of 3, the x, y, z triples of sensors in one body, which may be turned.
    """
    perturbs = (
        TimeWarp(),
        *((AxisRotation(),) if rotate else ()),
        Scaling(),
        Drift(),
        Jitter(),
        RandomApply(TimeMask(), 0.5),
        ChannelDropout(),
    )
    return Compose(*perturbs).with_severity(severity)


def audio_waveform(severity: float = 1.0) -> Compose:
    """For waveforms (B, L) or (B, C, L); severity 0 is the identity."""
    return Compose(TimeShift(), Gain(), Noise()).with_severity(severity)


def audio_spectrogram(severity: float = 1.0) -> Compose:
    """For spectrograms (B, F, T) or (B, C, F, T), best on a log scale; severity 0 is the identity."""
    return Compose(Jitter(), SpecMask()).with_severity(severity)


def image(severity: float = 1.0) -> Compose:
    """For images (B, C, H, W) whose labels survive a mirror; severity 0 is the identity."""
    return Compose(Crop(), Flip(), ColorJitter(), Jitter(), RandomApply(Erase(), 0.5)).with_severity(severity)
