"""Which rows make a batch of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from cet.data.batches import UNLABELLED


class ShuffledBatches(Sampler[Tensor]):
    """Row indices, batch by batch, in an order that the seed and the number of the epoch decide.

    Lightning calls ``set_epoch`` before each epoch. Every batch is full: the rows left at the end of an epoch are not
    used in it.
    """

    def __init__(self, num_rows: int, batch_size: int, *, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = min(batch_size, num_rows)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        used = torch.randperm(self.num_rows, generator=order)[: len(self) * self.batch_size]
        yield from used.view(len(self), self.batch_size)

    def __len__(self) -> int:
        return self.num_rows // self.batch_size


class LabelledShare(Sampler[Tensor]):
    """Row indices, batch by batch, of which a fixed share has a label, where few rows have one.

    Batches drawn from all rows alike would have few labelled rows or none, and the supervised term be the mean over
    those few. An epoch has as many batches as all rows fill once; labelled rows come round more often than others, each
    as often as the next. The order depends on the seed and the number of the epoch, as that of
    :class:`cet.training.sampling.ShuffledBatches` does. Give it to a loader as
    ``DataLoader(TensorDataset(x, y), sampler=LabelledShare(y, 64, 0.5), batch_size=None)``.

    Args:
        y: ``(N,)`` int64, -100 for a row without a label.
        batch_size: rows of a batch; all rows where there are fewer.
        share: of labelled rows in a batch, in (0, 1]; at least one row is labelled. At 1 the others are left out.
        seed: of the order.

    Raises:
        ValueError: for a share or size out of range, and when no row has a label.
    """

    def __init__(self, y: Tensor, batch_size: int, share: float, *, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; give a number in (0, 1]")
        has_label = y != UNLABELLED
        self.labelled, self.unlabelled = has_label.nonzero().squeeze(1), (~has_label).nonzero().squeeze(1)
        if len(self.labelled) == 0:
            raise ValueError("no row of y has a label, so there is nothing to learn; give labels for some rows")
        self.batch_size = min(batch_size, len(y))
        self.num_labelled = max(1, round(share * self.batch_size)) if len(self.unlabelled) else self.batch_size
        self.num_batches = len(y) // self.batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        counts = self.num_labelled, self.batch_size - self.num_labelled
        parts = [
            _drawn(rows, count * len(self), order).view(len(self), count)
            for rows, count in zip((self.labelled, self.unlabelled), counts, strict=True)
        ]
        yield from torch.cat(parts, dim=1)

    def __len__(self) -> int:
        return self.num_batches


def shuffled(y: Tensor, batch_size: int, labelled_share: float, *, seed: int) -> ShuffledBatches | LabelledShare:
    """The order of training rows with labels ``y``: of all rows alike, or with a share of labelled ones where some have
    none."""
    if bool((y != UNLABELLED).all()):
        return ShuffledBatches(len(y), batch_size, seed=seed)
    return LabelledShare(y, batch_size, labelled_share, seed=seed)


def batches(x: Tensor, y: Tensor, sampler: Any) -> DataLoader[Any]:
    """A loader that takes a whole batch from the tensors by one indexing operation."""
    return DataLoader(TensorDataset(x, y), sampler=sampler, batch_size=None)


def mixed_seed(*numbers: int) -> int:
    """A seed of 64 bits in which all the numbers count."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _drawn(rows: Tensor, count: int, order: torch.Generator) -> Tensor:
    """``count`` of the rows, each as often as the next, one shuffled round after another."""
    rounds = -(-count // max(1, len(rows)))
    drawn = [rows[torch.randperm(len(rows), generator=order)] for _ in range(rounds)]
    return torch.cat([*drawn, rows[:0]])[:count]
