"""The temperature of an exit: one number that makes its probabilities honest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_TEMPERATURE = 20.0
"""Temperatures are kept within ``[1 / MAX_TEMPERATURE, MAX_TEMPERATURE]``."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [1/20, 20] that minimises the cross-entropy of ``softmax(logits / temperature)`` (Guo et al.
    2017, arXiv 1706.04599).

    The labels are smoothed by ``1 / (n + 2)``, in the manner of Platt (1999): ``n`` samples without an error do not
    show that there are none, and would otherwise drive all probabilities to 1, where samples cannot be told apart.
    Cross-entropy is convex in the inverse temperature, so its slope changes sign once, which bisection finds.

    Args:
        logits: ``(n, K)``; rows that are not finite are left out.
        labels: ``(n,)`` int64.
    """
    finite = logits.isfinite().all(dim=1)
    if not finite.any():
        return 1.0
    logits, labels = logits[finite].double(), labels[finite]
    smoothing = 1 / (len(labels) + 2)
    of_label = torch.lerp(logits.gather(1, labels[:, None]).mean(), logits.mean(), smoothing)
    low, high = -math.log(MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(30):
        middle = (low + high) / 2
        expected = (torch.softmax(logits * math.exp(middle), dim=1) * logits).sum(dim=1).mean()
        if expected < of_label:  # the loss still falls as the logits are scaled up
            low = middle
        else:
            high = middle
    return math.exp(-middle)
