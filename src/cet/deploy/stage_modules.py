"""Segments as modules of their own, each with the score of its exit: what runtimes with one method per stage take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cet.deploy.description import Description, ExportError, reason_of
from cet.deploy.manifest import StageEntry
from cet.deploy.segments import ExportedStages, SegmentModule, tracing_error
from cet.ops.definitions import SCORES, ScoreName
from cet.ops.exit_gate.definition import log_probabilities
from cet.partition.export import CUTTING, quiet
from cet.runtime.scores import require_kernel


@dataclass(frozen=True)
class StageModule:
    """A stage that takes its tensors one by one.

    Attributes:
        entry: what the manifest says of it.
        title: of the stage in an error.
        module: returns logits ``(n, K)``, scores ``(n,)`` float32, and the tensors that it makes for later stages.
        example: the tensors that it takes, in the order of the manifest.
        dynamic_shapes: of each of these, as :func:`torch.export.export` takes them.
    """

    entry: StageEntry
    title: str
    module: nn.Module
    example: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]

    def traced(self) -> ExportedProgram:
        """Its graph.

        Raises:
            ExportError: where it cannot be traced, with the reason.
        """
        try:
            with CUTTING, quiet(), torch.no_grad():
                return torch.export.export(
                    self.module, self.example, dynamic_shapes=(self.dynamic_shapes,), strict=False
                )
        except Exception as error:
            raise tracing_error(self.title, error) from error


def stage_modules(stages: ExportedStages, description: Description, most_rows: int | None) -> list[StageModule]:
    """The segments, with the score of the policy behind each.

    Args:
        stages: whose other sizes are those of the example.
        description: of the file.
        most_rows: how many rows they take at once; None where their number is fixed.
    """
    temperatures, score = description.temperatures, require_kernel(stages.model.policy.score, "such a file")
    used = iter(bool(node.users) for node in _placeholders(stages.program))
    modules = []
    for segment, (names, made) in zip(stages.segments, stages.tensor_names, strict=True):
        taken = [index for index in range(len(names)) if next(used)]
        k = segment.exit_index
        scored = _Scored(segment, taken, score, 1.0 if temperatures is None else temperatures[k])
        rows = [segment.taken_row_dims[index] for index in taken]
        entry = StageEntry(f"stage_{k}", k, {names[index]: segment.taken_row_dims[index] for index in taken}, (*made,))
        title = _title(stages, segment)
        modules.append(_module(entry, title, scored, [segment.example[1][index] for index in taken], rows, most_rows))
    return modules


def whole_module(stages: ExportedStages, most_rows: int | None) -> StageModule:
    """The backbone alone, from the same stages: what the exits are measured against."""
    first = stages.segments[0]
    taken = dict(zip(stages.tensor_names[0][0], first.taken_row_dims, strict=True))
    entry = StageEntry("full", stages.segments[-1].exit_index, taken, ())
    return _module(entry, "the backbone", _Whole(stages.segments), first.example[1], first.taken_row_dims, most_rows)


def _module(
    entry: StageEntry,
    title: str,
    module: nn.Module,
    example: Sequence[Tensor],
    row_dims: Sequence[int | None],
    most_rows: int | None,
) -> StageModule:
    if most_rows is not None:
        # Traced with as many rows as there may be: where PyTorch asks on the way whether there are fewer than some
        # number, the answer bounds them from below alone.
        rows = torch.arange(most_rows)
        example = [
            tensor if dim is None else tensor.index_select(dim, rows.clamp(max=tensor.shape[dim] - 1))
            for tensor, dim in zip(example, row_dims, strict=True)
        ]
    vary = most_rows is not None and most_rows > 1
    size = Dim("rows", max=most_rows) if vary else None
    shapes = tuple({} if dim is None or size is None else {dim: size} for dim in row_dims)
    return StageModule(entry, title, module.eval(), tuple(example), shapes)


def write_naming_stages(
    runtime: str, stages: Sequence[StageModule], write: Callable[[Sequence[StageModule]], bytes]
) -> bytes:
    """What ``write`` makes of all stages; where it fails, that of the first stage on which it fails alone is raised.

    Raises:
        ExportError: then, with the stage and the reason.
    """
    try:
        return write(stages)
    except ExportError:
        raise
    except Exception as together:
        what, error = stages[0].title if len(stages) == 1 else "the model", together
        for stage in stages if len(stages) > 1 else ():
            try:
                write([stage])
            except Exception as alone:
                what, error = stage.title, alone
                break
        raise ExportError(
            f"{what} has no form in {runtime} ({reason_of(error)}); compute it with operators that {runtime} has"
        ) from error


def _title(stages: ExportedStages, segment: SegmentModule) -> str:
    return f"the stage that ends in exit {stages.model.exit_names[segment.exit_index]!r}"


class _Scored(nn.Module):
    """A segment and the score of its exit, as a function of those of its tensors that it reads."""

    def __init__(self, segment: SegmentModule, taken: Sequence[int], score: ScoreName, temperature: float) -> None:
        super().__init__()
        self.segment = segment
        self._taken, self._temperature = taken, temperature
        self._score = score

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        tensors: list[Tensor | None] = [None] * len(self.segment.taken_row_dims)
        for index, tensor in zip(self._taken, given, strict=True):
            tensors[index] = tensor
        logits, *made = self.segment([], tensors)
        outputs = [logits, _score(log_probabilities(logits, self._temperature), self._score)]
        for tensor in made:  # no runtime returns one tensor twice, or one that it was given
            known = any(tensor is other for other in (*outputs, *given))
            outputs.append(tensor.clone() if known else tensor)
        return tuple(outputs)


def _score(log_p: Tensor, name: ScoreName) -> Tensor:
    """A score by its definition, in operators that the runtimes compute as PyTorch does."""
    if name == "entropy":
        return SCORES[name].definition(log_p)
    score = _margin(log_p) if name == "margin" else SCORES[name].definition(log_p)
    return torch.where(log_p[:, 0].isnan(), torch.nan, score)  # the largest of NaNs is a number in LiteRT


def _margin(log_p: Tensor) -> Tensor:
    """Without the two largest by ``topk``, which becomes a sort that LiteRT lacks, or the place of the largest, which
    becomes an operator that TFLite Micro lacks."""
    p = log_p.exp()
    first = p.amax(dim=1, keepdim=True)
    is_first = p == first
    is_shared = is_first.float().sum(dim=1) > 1
    return (first[:, 0] - p.masked_fill(is_first, -1.0).amax(dim=1)).masked_fill(is_shared, 0.0)


class _Whole(nn.Module):
    """All segments without heads."""

    def __init__(self, segments: Sequence[SegmentModule]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)

    def forward(self, *tensors: Tensor) -> Tensor:
        values: Sequence[Any] = tensors
        for segment in self.segments:
            features, values = segment.run([], values)  # type: ignore[operator]
        result: Tensor = features
        return result


def _placeholders(program: ExportedProgram) -> list[torch.fx.Node]:
    """The nodes of the tensors that a graph takes."""
    given = {name for name in program.graph_signature.user_inputs if isinstance(name, str)}
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
