"""Bytes between the caches and device memory, counted in the interpreter: what the kernels move against what they must.

Programs run side by side, and their accesses go through a cache that forgets what was used longest ago. It stands to
the programs that run at once as the L2 cache of a large GPU does: it holds four times what each of them reads of a
row. All is small here, the part of a row too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from cet import ops
from conftest import triton_backend as backend  # noqa: F401
from interleaving import interleaved

SECTOR = 32  # bytes, the least that is read or written
RESIDENT, SHARE = 8, 2048
CACHE = 4 * RESIDENT * SHARE


class Memory:
    """Attributes:
    read, written: bytes that the cache had to fetch, and to give back.
    """

    def __init__(self, cache: int) -> None:
        self.read = self.written = 0
        self._room = cache // SECTOR
        self._is_changed: OrderedDict[int, bool] = OrderedDict()  # by sector, the longest unused first

    def access(self, addresses: Any, mask: Any, *, changes: bool) -> None:
        for sector in np.unique(np.asarray(addresses)[np.asarray(mask)] // SECTOR).tolist():
            known = self._is_changed.pop(sector, None)
            if known is None and not changes:
                self.read += SECTOR
            self._is_changed[sector] = changes or bool(known)
            if len(self._is_changed) > self._room:
                self.written += SECTOR * self._is_changed.popitem(last=False)[1]

    @property
    def moved(self) -> int:
        """All, with what is still to be given back."""
        return self.read + self.written + SECTOR * sum(self._is_changed.values())


@contextmanager
def counted() -> Iterator[Memory]:
    """What launches within move."""
    memory = Memory(CACHE)
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def loading(ptrs: Any, mask: Any, *others: Any) -> Any:
        memory.access(ptrs.data, mask.data, changes=False)
        return load(ptrs, mask, *others)

    def storing(ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        memory.access(ptrs.data, mask.data, changes=True)
        return store(ptrs, value, mask, *others)

    with (
        mock.patch.object(builder, "create_masked_load", loading),
        mock.patch.object(builder, "create_masked_store", storing),
        mock.patch("interleaving.RESIDENT", RESIDENT),
        mock.patch("cet.kernels.exit_gate._SHARE_BYTES", SHARE),
        mock.patch("cet.kernels.exit_gate._ROWS_BYTES", SHARE // 2),
        interleaved(),
    ):
        yield memory


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


ROWS = {"rows that share programs": (260, 8, 16), "rows that four programs share": (20, 32, 64)}


def exit_step(rows: str, *, in_one_pass: bool) -> float:
    """Bytes moved over the least: features read, survivors and answers written."""
    features = torch.randn(ROWS[rows])
    weight = torch.randn(7, features.shape[1])
    with ops.use_backend("reference"):
        threshold = float(ops.exit_gate(features, weight, threshold=0.0)[1].median())
    with counted() as memory:
        if in_one_pass:
            logits, _, (kept, _, (moved,)) = ops.exit_step(features, weight, None, [features], threshold=threshold)
        else:
            logits, _, exit_mask = ops.exit_gate(features, weight, threshold=threshold)
            kept, _, (moved,) = ops.compact(exit_mask, [features])
    assert len(kept) == len(features) // 2
    assert features.nbytes > 2 * CACHE
    ratio = memory.moved / nbytes(features, moved, logits)
    print(f"{ratio:.3f}")
    return ratio


@pytest.mark.parametrize("rows", ROWS)
def test_the_exit_step_reads_features_once(backend: str, rows: str) -> None:  # noqa: F811
    assert 1 <= exit_step(rows, in_one_pass=True) <= 1.05


@pytest.mark.slow
def test_a_gate_and_a_copy_after_it_read_survivors_twice(backend: str) -> None:  # noqa: F811
    """So that what is counted above could be seen."""
    assert exit_step("rows that share programs", in_one_pass=False) > 1.25


def test_compaction_reads_and_writes_survivors_alone(backend: str) -> None:  # noqa: F811
    tensors = [torch.randn(64, 24, 128), torch.randn(64, 96)]
    with counted() as memory:
        moved = ops.compact(torch.arange(64) % 2 == 0, tensors).tensors
    assert 1 <= memory.moved / (2 * nbytes(*moved)) <= 1.05


def test_the_loss_reads_logits_and_writes_gradients_once(backend: str) -> None:  # noqa: F811
    clean, perturbed = (torch.randn(64, 1000, requires_grad=True) for _ in range(2))
    with counted() as memory:
        ops.consistent_exit_loss([clean], [perturbed], torch.arange(64)).loss.backward()
    assert 1 <= memory.moved / (2 * nbytes(clean, perturbed)) <= 1.05
