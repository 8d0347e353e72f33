"""Segments: the stages up to the next open exit, which run without a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from cet.partition.stages import Program, Stage


@dataclass(frozen=True)
class Segment:
    """Stages between which no row may leave, and the exit behind them."""

    stages: tuple[Stage, ...]
    exit_index: int
    """The exit behind them: an open one, or the final one."""

    @property
    def row_dims(self) -> tuple[int | None, ...]:
        """For each value that crosses the exit, the dimension that holds the rows, or None."""
        return self.stages[-1].row_dims

    def run(self, num_rows: int, sizes: Sequence[int], values: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Features of the exit, and what crosses it; behind the final exit the logits, and nothing."""
        *before, last = self.stages
        for stage in before:
            values = stage.run(num_rows, *sizes, *values)[1:]
        outputs = last.run(num_rows, *sizes, *values)
        if isinstance(outputs, Tensor):
            return outputs, []
        features, *crossing = outputs
        return features, crossing

    def mask(self, values: Sequence[Any]) -> Tensor | None:
        """The mask of the exit's head among what crosses the exit."""
        index = self.stages[-1].mask
        return None if index is None else values[index]


def segments_of(program: Program, thresholds: Sequence[float | None]) -> tuple[Segment, ...]:
    """The program between open exits."""
    return _segments(program.stages, tuple(threshold is not None for threshold in thresholds))


@lru_cache(maxsize=256)
def _segments(stages: tuple[Stage, ...], is_open: tuple[bool, ...]) -> tuple[Segment, ...]:
    ends = [*(index for index, opened in enumerate(is_open) if opened), len(stages) - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return tuple(Segment(stages[start : end + 1], end) for start, end in zip(starts, ends, strict=True))
