"""Segments: the stages up to the next open exit, which run without a decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cet.partition.stages import Program, Stage


class Segment:
    """Stages between which no row may leave.

    Attributes:
        stages: one or more.
        exit_index: the exit behind them: an open one, or the final one.
        row_dims: for each value that crosses that exit, the dimension that holds the rows, or None.
        held: which of these values hold rows.
        held_dims: the dimensions that do.
    """

    def __init__(self, stages: tuple[Stage, ...], exit_index: int) -> None:
        self.stages = stages
        self.exit_index = exit_index
        *self._before, self._last = stages
        self.row_dims = self._last.row_dims
        self.held = [index for index, dim in enumerate(self.row_dims) if dim is not None]
        self.held_dims = [dim for dim in self.row_dims if dim is not None]

    def run(self, num_rows: int, sizes: Sequence[int], values: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Features of the exit, and what crosses it; behind the final exit the logits, and nothing."""
        for stage in self._before:
            values = stage.run(num_rows, *sizes, *values)[1:]
        outputs = self._last.run(num_rows, *sizes, *values)
        if isinstance(outputs, Tensor):
            return outputs, []
        features, *crossing = outputs
        return features, crossing

    def mask(self, values: Sequence[Any]) -> Tensor | None:
        """The mask of the exit's head among what crosses the exit."""
        index = self._last.mask
        return None if index is None else values[index]


def segments_of(program: Program, thresholds: tuple[float | None, ...]) -> list[Segment]:
    """The program between open exits."""
    latest: tuple[Any, list[Segment]] | None = program.memo.get("segments")
    if latest is not None and latest[0] is thresholds:
        return latest[1]
    stages = program.stages
    ends = [*(index for index, threshold in enumerate(thresholds) if threshold is not None), len(stages) - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    segments = [Segment(stages[start : end + 1], end) for start, end in zip(starts, ends, strict=True)]
    program.memo["segments"] = thresholds, segments
    return segments
