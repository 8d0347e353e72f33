"""One sensible composition per kind of input, from what changes the world to what changes its recording."""

from __future__ import annotations

from collections.abc import Sequence

from .audio import Gain, Noise, SpecMask, TimeShift
from .compose import Compose, RandomApply
from .images import ColorJitter, Crop, Erase, Flip
from .sensors import AxisRotation, ChannelDropout, Drift, Jitter, Scaling, TimeMask, TimeWarp
from .tokens import TokenDropout, TokenMask


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


def text(severity: float = 1.0, *, mask_id: int, special_ids: Sequence[int]) -> Compose:
    """For a mapping with "input_ids" and "attention_mask", both (B, T), as tokenizers give them.

    Args:
        severity: 0 is the identity.
        mask_id: `tokenizer.mask_token_id`.
        special_ids: `tokenizer.all_special_ids`, which are never touched.
    """
    ids = tuple(special_ids)
    return Compose(TokenMask(mask_id, special_ids=ids), TokenDropout(special_ids=ids)).with_severity(severity)
