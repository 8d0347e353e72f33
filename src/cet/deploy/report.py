"""What :func:`cet.export` reports: what was compared, and how fast the file is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cet.deploy.check import Agreement, Comparison
from cet.deploy.description import Description
from cet.deploy.loaded import LoadedModel
from cet.deploy.segments import ExportedStages, with_rows
from cet.measure.rounds import Timings, time_calls
from cet.measure.timers import wall_clock

if TYPE_CHECKING:
    from cet.calibration.cost import ExitCosts

FULL = "without exits"
_SECONDS = 0.3


@dataclass(frozen=True)
class ExportReport:
    """What :func:`cet.export` wrote. As text it is a few lines and a table.

    Attributes:
        path: of the file.
        format: of the file.
        num_bytes: its size.
        description: what the file says of itself.
        comparison: with the model, row by row; of a quantised file at every exit, on the samples that it was made by.
        timings: of one row, in the same runtime: of the model without exits, and with all rows leaving at each exit.
    """

    path: str
    format: str
    num_bytes: int
    description: Description
    comparison: Comparison | Agreement
    timings: Timings[str]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.num_bytes / 1e6:.2f} MB",
            *self._compared(),
            "one row in the same runtime:",
        ]
        for name in self.timings.seconds:
            ratio = self.timings.ratio(FULL, name).median
            factor = "" if name == FULL else f", {ratio:.2f} times as fast"
            lines.append(f"  {name}: {self.timings.time(name).median * 1e3:.3f} ms{factor}")
        return "\n".join(lines)

    @property
    def costs(self) -> ExitCosts:
        """What leaving at each exit costs, in measured milliseconds of one row: for :func:`cet.calibrate`."""
        from cet.calibration.cost import ExitCosts

        at = [self.timings.time(name).median * 1e3 for name in self.timings.seconds if name != FULL]
        if len(at) != len(self.description.exits):
            raise ValueError("exits that are closed were left out of this file; export with thresholds='input'")
        rising = np.maximum.accumulate(at)
        return ExitCosts(tuple(np.diff(rising, prepend=0.0).tolist()), (0.0,) * (len(at) - 1), "ms")

    def _compared(self) -> list[str]:
        compared = self.comparison
        if isinstance(compared, Comparison):
            left_out = f", {compared.near} near a threshold left out" if compared.near else ""
            return [
                f"{compared.rows} answers are those of the model{left_out}; logits differ by up to "
                f"{compared.largest_difference:.1g}"
            ]
        lines = [f"int8 beside float32 on {compared.rows} samples:"]
        for k, name in enumerate(self.description.exits):
            right = ", accuracy {1:.1%} instead of {0:.1%}".format(*compared.accuracy[k]) if compared.accuracy else ""
            lines.append(f"  {name}: the same class for {compared.same[k]:.1%}{right}")
        return lines


def time_exits(loaded: LoadedModel, full: Callable[..., object], stages: ExportedStages) -> Timings[str]:
    """Seconds of one row in the model without exits, and in the file where it leaves at each exit.

    Args:
        loaded: of a file whose thresholds are an input.
        full: takes the tensors of a call by name, and answers without exits.
        stages: what the file was made from.
    """
    description = loaded.description
    row = with_rows(stages.inputs, stages.input_format.is_batched, 1)
    given = dict(zip(stages.input_format.names, row, strict=True))
    arrays = {expected.name: given[expected.name].numpy() for expected in description.inputs}
    always = math.inf if description.is_low_when_sure else -math.inf
    calls: dict[str, Callable[[], object]] = {FULL: partial(full, arrays)}
    for segment in stages.segments:
        k = segment.exit_index
        thresholds = tuple(always if index == k else None for index in range(len(description.thresholds)))
        name = "leaving nowhere" if k == len(thresholds) else f"leaving at {description.exits[k]}"
        calls[name] = partial(loaded.run, list(arrays.values()), thresholds)
    return time_calls(calls, wall_clock, seconds=_SECONDS)
