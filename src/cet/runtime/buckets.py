"""Which numbers of rows get a graph of their own; a batch is padded to the next one up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

DRIFT = 0.1
"""Share of the weight that is spread over all counts: inputs are not always what the calibration samples were."""

_MAX_CANDIDATES = 512


def choose_buckets(
    capacity: int, exits: Sequence[int], survival: Sequence[float] | None, limit: int
) -> list[tuple[int, ...]]:
    """The buckets of the first segment, then of those behind each of ``exits``, at most ``limit`` for each.

    Args:
        capacity: rows of the largest batch.
        exits: the open exits.
        survival: the expected fraction of rows that is still on its way behind each early exit, if it is known.
        limit: at least 1.
    """
    entering = geometric_buckets(capacity, limit)
    if survival is None:
        return [entering] * (len(exits) + 1)
    return [entering, *(least_padding(survivor_weights(entering, survival[k]), limit) for k in exits)]


def geometric_buckets(capacity: int, limit: int) -> tuple[int, ...]:
    """At most ``limit`` buckets up to ``capacity``, each at least twice the one before: for counts of which nothing is
    known."""
    ratio = max(2.0, capacity ** (1 / (limit - 1))) if limit > 1 else math.inf
    return tuple(sorted({max(1, round(capacity / ratio**i)) for i in range(limit)}))


def survivor_weights(batch_sizes: Sequence[int], survival: float) -> NDArray[np.float64]:
    """How much a padded row matters at each count of kept rows, ``(max(batch_sizes) + 1,)``.

    Rows are taken to survive independently of each other, so that a count is binomial. Batches of every size matter
    alike: their padding is weighed against their own rows.

    Args:
        batch_sizes: the sizes that batches may have.
        survival: the probability that a row is still on its way.
    """
    weights = np.zeros(max(batch_sizes) + 1)
    probability = torch.tensor(min(max(survival, 1e-9), 1 - 1e-9), dtype=torch.float64)
    for size in batch_sizes:
        counts = torch.arange(size + 1, dtype=torch.float64)
        binomial = torch.distributions.Binomial(size, probability)
        expected = binomial.log_prob(counts).exp().numpy()  # type: ignore[no-untyped-call]
        weights[: size + 1] += ((1 - DRIFT) * expected + DRIFT / (size + 1)) / size
    return weights


def least_padding(weights: NDArray[np.float64], limit: int) -> tuple[int, ...]:
    """The buckets, at most ``limit``, with the least ``sum over n of weights[n] * (bucket(n) - n)``.

    By dynamic programming over the largest bucket of a prefix. The last bucket is the largest count. Beyond 512 counts
    only every so many are candidates.

    Args:
        weights: ``(capacity + 1,)``, of each count from 0 on; a count of 0 needs no bucket.
        limit: at least 1.
    """
    capacity = len(weights) - 1
    step = math.ceil(capacity / _MAX_CANDIDATES)
    ends = np.unique(np.append(np.arange(0, capacity, step), capacity))
    counts = np.arange(capacity + 1)
    mass = np.cumsum(np.where(counts > 0, weights, 0.0))[ends]
    rows = np.cumsum(counts * weights)[ends]
    # padding[i, j]: of the counts in (ends[i], ends[j]], in the bucket ends[j]; none for i = j, a bucket left out
    padding = ends * (mass - mass[:, None]) - (rows - rows[:, None])
    padding[np.tril_indices(len(ends), -1)] = np.inf
    least = padding[0]
    choices: list[NDArray[np.intp]] = []
    for _ in range(limit - 1):
        total = least[:, None] + padding
        choices.append(total.argmin(axis=0))
        least = total.min(axis=0)
    end = len(ends) - 1
    buckets = {capacity}
    for choice in reversed(choices):
        end = int(choice[end])
        buckets.add(int(ends[end]))
    return tuple(sorted(buckets - {0}))
