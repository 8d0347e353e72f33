"""All stages for one row as one module in which what is behind an exit is a branch: no host has to run a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from cet.deploy.description import Description
from cet.deploy.stage_modules import StageModule
from cet.partition.export import CUTTING, quiet


class NestedStages(nn.Module):
    """Takes the model's inputs one by one, each with one row, and thresholds ``(E - 1,)`` float32 last; returns logits
    ``(1, K)``, exit index ``(1,)`` int64 and score ``(1,)`` float32.

    Args:
        stages: for a fixed number of rows.
        description: of the file.
    """

    def __init__(self, stages: Sequence[StageModule], description: Description) -> None:
        super().__init__()
        self.names = [given.name for given in description.inputs]
        examples = [dict(zip(stage.entry.inputs, stage.example, strict=True)) for stage in reversed(stages)]
        tensors = {name: tensor for example in examples for name, tensor in example.items()}
        for given in description.inputs:  # those that no stage reads
            tensors.setdefault(given.name, torch.zeros(given.shape, dtype=getattr(torch, given.dtype)))  # type: ignore[arg-type]
        self.example = (*(tensors[name] for name in self.names), torch.zeros(len(description.thresholds)))
        self._entries = [stage.entry for stage in stages]
        self._is_low, self._dtype = description.is_low_when_sure, getattr(torch, description.logits_dtype)
        self.stages = nn.ModuleList(map(_graph, stages))

    def traced(self) -> ExportedProgram:
        """Its graph."""
        with CUTTING, quiet(), torch.no_grad():
            return torch.export.export(self, self.example, strict=False)

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, exit_index, score = self._from(0, dict(zip(self.names, given[:-1], strict=True)), given[-1])
        return logits, exit_index, score

    def _from(self, index: int, values: Mapping[str, Tensor], thresholds: Tensor) -> Any:
        """The answer by this stage or a later one."""
        entry, later = self._entries[index], self._entries[index + 1 :]
        logits, score, *made = self.stages[index](*(values[name] for name in entry.inputs))
        if not later:
            return self._answer(entry.exit_index, logits, score)
        values = dict(values) | dict(zip(entry.outputs, made, strict=True))
        needed = [name for name in values if any(name in stage.inputs for stage in later)]

        def leave(logits: Tensor, score: Tensor, _thresholds: Tensor, *_needed: Tensor) -> Any:
            return self._answer(entry.exit_index, logits, score)

        def go_on(_logits: Tensor, _score: Tensor, thresholds: Tensor, *tensors: Tensor) -> Any:
            return self._from(index + 1, dict(zip(needed, tensors, strict=True)), thresholds)

        threshold = thresholds[entry.exit_index]
        leaves = score <= threshold if self._is_low else score >= threshold  # false for NaN
        return torch.cond(leaves.all(), leave, go_on, (logits, score, thresholds, *(values[name] for name in needed)))

    def _answer(self, exit_index: int, logits: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of copies, laid out alike: both branches have to return the same kind of tensors, and none that they take."""
        row = torch.full((1,), exit_index, dtype=torch.int64)
        return logits.to(self._dtype).clone(memory_format=torch.contiguous_format), row, score.clone()


def _graph(stage: StageModule) -> nn.Module:
    """A stage as a graph, since a branch is traced by its code; without what nobody reads, which may be no tensor."""
    module = stage.traced().module(check_guards=False)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
