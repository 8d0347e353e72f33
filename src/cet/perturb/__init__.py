"""Batched, seeded input perturbations that run on the device of their input.

    perturb = cet.perturb.Compose(cet.perturb.AxisRotation(20), cet.perturb.Jitter(0.1))
    noisy = perturb(x, generator=torch.Generator(x.device).manual_seed(0))      # x: (B, C, L)
    harder = perturb.with_severity(2.0)

Every perturbation has strengths in physical units and a severity that scales them: 0 is the identity, 1 the
strengths as given. See `Perturbation` for what all of them promise.
"""

from .audio import Gain, Noise, SpecMask, TimeShift
from .base import Perturbation, TensorPerturbation
from .compose import Compose, On, RandomApply, RandomChoice
from .images import ColorJitter, Crop, Erase, Flip
from .presets import audio_spectrogram, audio_waveform, image, sensor, text
from .sensors import AxisRotation, ChannelDropout, Drift, Jitter, Scaling, TimeMask, TimeWarp
from .tokens import EmbeddingNoise, TokenDropout, TokenMask

__all__ = [
    "AxisRotation",
    "ChannelDropout",
    "ColorJitter",
    "Compose",
    "Crop",
    "Drift",
    "EmbeddingNoise",
    "Erase",
    "Flip",
    "Gain",
    "Jitter",
    "Noise",
    "On",
    "Perturbation",
    "RandomApply",
    "RandomChoice",
    "Scaling",
    "SpecMask",
    "TensorPerturbation",
    "TimeMask",
    "TimeShift",
    "TimeWarp",
    "TokenDropout",
    "TokenMask",
    "audio_spectrogram",
    "audio_waveform",
    "image",
    "sensor",
    "text",
]
