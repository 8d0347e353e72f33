"""Which positions of a sequence are real, from the input that the backbone was given for that purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# What a tensor under this name holds where a position is padding; every other name means the opposite, 1 for real.
_TRUE_IS_PADDING = ("src_key_padding_mask", "key_padding_mask", "padding_mask")
_TRUE_IS_REAL = ("attention_mask", "input_mask", "mask")
_LENGTHS = ("lengths", "input_lengths", "seq_lengths")
KNOWN_NAMES = (*_TRUE_IS_REAL[:1], *_TRUE_IS_PADDING, *_LENGTHS)
"""Inputs that are taken for a mask without being named in a :class:`cet.HeadSpec`."""


Resampler = Callable[[int, Tensor], Tensor]


def looks_like_mask(name: str) -> bool:
    """Whether an input of this name is probably meant to hide padding."""
    last = name.rpartition(".")[2].lower()
    return "mask" in last or last in _LENGTHS


def stride_of(given: Tensor, positions: int) -> int:
    """How many positions of the input each of the features stands for, judged by an example."""
    covered = given.shape[1] if given.ndim == 2 else int(given.max()) if given.numel() else 1
    return max(1, covered // max(1, positions))


def real_positions(name: str, given: Tensor, positions: int, stride: int) -> Tensor:
    """A mask ``(B, positions)`` bool that is true where features are of real input.

    A backbone that shortens the sequence is taken to do so evenly: a position of the features is real where the first
    of the ``stride`` input positions that it stands for is.

    Args:
        name: of the input. ``src_key_padding_mask``, ``key_padding_mask`` and ``padding_mask`` are true, or ``-inf``,
            at padding; ``lengths`` holds the number of real positions of each row; any other is nonzero at real ones.
        given: that input, ``(B, T)``, or ``(B,)`` for lengths.
        positions: how many positions the features have.
        stride: see above.
    """
    if given.ndim == 1:
        return torch.arange(positions, device=given.device) * stride < given[:, None]
    if name.rpartition(".")[2] in _TRUE_IS_PADDING:
        mask = given == 0 if given.is_floating_point() else ~given.bool()
    else:
        mask = given != 0
    mask = mask[:, ::stride][:, :positions]
    if mask.shape[1] < positions:
        mask = torch.cat([mask, mask[:, -1:].expand(-1, positions - mask.shape[1])], dim=1)
    return mask


def resampler_of(backbone: nn.Module) -> Resampler | None:
    """The method by which Hugging Face's speech models shorten a mask along with their features."""
    for module in backbone.modules():
        method = getattr(module, "_get_feature_vector_attention_mask", None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None


def find_mask(names: Sequence[str], tensors: Sequence[object]) -> str | None:
    """The input that hides padding, by its name."""
    for known in KNOWN_NAMES:
        for name, value in zip(names, tensors, strict=True):
            if name.rpartition(".")[2] == known and isinstance(value, Tensor) and value.ndim in (1, 2):
                return name
    return None
