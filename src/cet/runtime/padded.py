"""A staged program on padded batches, every value that outlives a graph in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cet.ops.compact import memory_order
from cet.ops.padded import Answers, PaddedExit, RowPairs, gather_and_scatter_rows, padded_scores
from cet.partition.inputs import copied
from cet.partition.stages import Program
from cet.runtime.exits import take_padded_exit
from cet.runtime.policy import ExitPolicy
from cet.runtime.scores import require_kernel
from cet.runtime.segments import segments_of


class RowBuffer:
    """A value with one row per sample, ``capacity`` of them, each one block of memory.

    Rows beyond those of the last batch hold what earlier batches left there, at first copies of the rows of ``value``:
    always what the next stage could be given, so that computing them does no harm.
    """

    def __init__(self, value: Tensor, dim: int, capacity: int) -> None:
        self._dim = dim
        self._shape = value.shape
        self._repeated = [d for d, stride in enumerate(value.stride()) if stride == 0]
        core = self._core(value)
        self._order = memory_order(core)
        rows = core.movedim(dim, 0)
        inner = [d for d in memory_order(rows) if d != 0]
        shape = (capacity, *rows.shape[1:])
        self.rows = torch.empty_permuted(shape, (0, *inner), dtype=value.dtype, device=value.device)
        self.rows.copy_(rows[torch.arange(capacity, device=value.device) % len(rows)])
        self.nbytes = self.rows.nbytes

    def load(self, value: Tensor) -> None:
        """Fill the first rows."""
        rows = self._core(value).movedim(self._dim, 0)
        self.rows[: len(rows)].copy_(rows)

    def give(self, value: Tensor) -> RowPairs:
        """What to move so that the buffer gets rows of ``value``."""
        rows = self._core(value).movedim(self._dim, 0).resolve_conj().resolve_neg()  # bytes are moved
        alike = torch.empty_like(self.rows[: len(rows)])
        if any(s != t and n > 1 for s, t, n in zip(rows.stride()[1:], alike.stride()[1:], rows.shape[1:], strict=True)):
            rows = alike.copy_(rows)
        return [(rows, self.rows)]

    def take(self, rows: int) -> Tensor:
        """The first rows, in the memory layout that the value had, on which later operations may rely."""
        value = self.rows[:rows].movedim(0, self._dim)
        if self._order[0] != self._dim:
            value = torch.empty_permuted(value.shape, self._order, dtype=value.dtype, device=value.device).copy_(value)
        return value.expand(*self._shape[: self._dim], rows, *self._shape[self._dim + 1 :])

    def _core(self, value: Tensor) -> Tensor:
        for dim in self._repeated:
            value = value.narrow(dim, 0, 1)
        return value


class CommonBuffer:
    """A value that all rows have in common, or that is the same for every row."""

    def __init__(self, value: Tensor, dim: int | None) -> None:
        self._dim = dim
        self._shape = value.shape
        self._value = torch.empty_like(self._core(value))
        self.nbytes = self._value.nbytes
        self.load(value)

    def load(self, value: Tensor) -> None:
        self._value.copy_(self._core(value))

    def give(self, value: Tensor) -> RowPairs:
        self.load(value)
        return ()

    def take(self, rows: int) -> Tensor:
        if self._dim is None:
            return self._value
        return self._value.expand(*self._shape[: self._dim], rows, *self._shape[self._dim + 1 :])

    def _core(self, value: Tensor) -> Tensor:
        return value if self._dim is None else value.narrow(self._dim, 0, 1)


class Constant:
    """A number, or an input that is no tensor: part of what was captured."""

    nbytes = 0

    def __init__(self, value: Any) -> None:
        self._value = value

    def load(self, value: Any) -> None:
        pass

    def give(self, value: Any) -> RowPairs:
        return ()

    def take(self, rows: int) -> Any:
        return self._value


Buffer = RowBuffer | CommonBuffer | Constant


def buffer_for(value: Any, dim: int | None, capacity: int) -> Buffer:
    """Memory for a value that holds its rows in ``dim``, if it has rows."""
    if not isinstance(value, Tensor):
        return Constant(value)
    if dim is None or (value.stride(dim) == 0 and value.shape[dim] > 1):
        return CommonBuffer(value, dim)
    return RowBuffer(value, dim, capacity)


Sending = Callable[[int, Tensor], AbstractContextManager[None]]


class PaddedProgram:
    """The segments of a program with the memory between them, for batches of up to ``capacity`` rows.

    The number of rows that enter a segment and the thresholds are on the device.

    Args:
        program: the stages.
        heads: one per early exit.
        policy: its open exits part the segments, its score is part of them; thresholds and temperatures may change.
        inputs: the inputs of a call with ``capacity`` rows, run once to learn what crosses the cuts.
        is_batched: which of these hold one row per sample.
        capacity: how many.
    """

    def __init__(
        self,
        program: Program,
        heads: Sequence[nn.Module],
        policy: ExitPolicy,
        inputs: Sequence[Any],
        is_batched: Sequence[bool],
        capacity: int,
    ) -> None:
        self.segments = segments_of(program, policy.thresholds)
        self._heads = heads
        self._score = require_kernel(policy.score, "a padded batch")
        self._sizes = program.input_sizes(inputs)
        self._entry = program.entry
        device = inputs[is_batched.index(True)].device
        numbers = {"dtype": torch.int32, "device": device}
        self.counts = torch.zeros(len(self.segments) + 1, **numbers)
        """How many rows enter each segment; the last entry means nothing."""
        in_turn = torch.arange(capacity, **numbers)
        self._positions = [in_turn, *(torch.zeros(capacity, **numbers) for _ in self.segments[1:])]
        self._state = torch.zeros(2 + 2 * capacity, dtype=torch.int64, device=device)
        # Each begins at 16 bytes, on which kernels are specialised: one serves all exits.
        self._decisions = torch.zeros(len(program.stages), 4, device=device)[:, :2]
        self._exit_indices = (torch.arange(2 * len(program.stages), device=device) // 2)[::2]
        self._policy: ExitPolicy | None = None
        # Of copies: other inputs need not be expanded where these are.
        given = copied(inputs)
        self._crossing = [[buffer_for(given[i], 0 if is_batched[i] else None, capacity) for i in program.entry]]
        for index, segment in enumerate(self.segments[:-1]):
            _, values = self._compute(index, capacity)
            pairs = zip(values, segment.row_dims, strict=True)
            self._crossing.append([buffer_for(value, dim, capacity) for value, dim in pairs])
        logits, _ = self._compute(len(self.segments) - 1, capacity)
        self._answers = Answers(
            torch.empty_like(logits, memory_format=torch.contiguous_format),
            torch.empty(capacity, device=device),
            torch.empty(capacity, dtype=torch.int64, device=device),
        )

    def load(self, inputs: Sequence[Any], rows: int, policy: ExitPolicy) -> None:
        """Put a batch and the thresholds where the segments find them."""
        if policy is not self._policy:
            pairs = [
                (0.0 if threshold is None else threshold, policy.temperature(k))
                for k, threshold in enumerate((*policy.thresholds, None))
            ]
            self._decisions.copy_(torch.tensor(pairs))
            self._policy = policy
        for buffer, index in zip(self._crossing[0], self._entry, strict=True):
            buffer.load(inputs[index])
        self.counts[0].fill_(rows)

    def run(self, index: int, rows: int, sending: Sending) -> None:
        """One segment on the first ``rows`` rows, as many as enter it or more. Rows that leave get their answers, the
        others are moved on to the next segment. ``sending`` is entered with the count of these once it is known."""
        exit_index = self.segments[index].exit_index
        count, num_kept = self.counts[index], self.counts[index + 1]
        positions = self._positions[index][:rows]
        decision, this_exit = self._decisions[exit_index], self._exit_indices[exit_index]
        features, values = self._compute(index, rows)
        if index == len(self.segments) - 1:
            scores = padded_scores(features, decision, count, score=self._score)
            everyone = self._answers.pairs(features, scores, this_exit)
            gather_and_scatter_rows(None, positions, None, count, (), everyone)
            return
        kept = [(positions, self._positions[index + 1])]
        for buffer, value in zip(self._crossing[index + 1], values, strict=True):
            kept += buffer.give(value)
        take_padded_exit(
            self._heads[exit_index],
            features,
            self.segments[index].mask(values),
            PaddedExit(decision, this_exit, count, num_kept, positions, self._state),
            kept,
            self._answers,
            self._score,
            partial(sending, index, num_kept),
        )

    def answers(self, rows: int, *, with_scores: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits, exit index and score of the last batch, in memory of their own."""
        logits, scores, exits = (answers[:rows] for answers in self._answers)
        if not with_scores:
            return logits.clone(), None, None
        return logits.clone(), exits.clone(), scores.clone()

    def _compute(self, index: int, rows: int) -> tuple[Tensor, list[Any]]:
        """Features and crossing values of a segment, or the logits."""
        return self.segments[index].run(rows, self._sizes, [buffer.take(rows) for buffer in self._crossing[index]])

    def memory(self) -> int:
        """Bytes of what crosses the cuts and of the answers."""
        buffers = sum(buffer.nbytes for crossing in self._crossing for buffer in crossing)
        return buffers + sum(answers.nbytes for answers in self._answers)
