"""The stages of a model, each with the head of its exit, as a graph of ``torch.export``: what formats are made from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cet.deploy.description import BATCH, ExportError, Range, reason_of
from cet.deploy.sizes import Place, sizes_that_vary
from cet.model.early_exit import EarlyExit, StagedBatch
from cet.partition.export import CUTTING, quiet
from cet.partition.inputs import EXAMPLE_ROWS, Call, InputFormat
from cet.partition.opaque_ops import OpaqueOps
from cet.partition.private_copy import private_copy
from cet.partition.stages import CutError, Program
from cet.runtime.exits import head_logits
from cet.runtime.segments import Segment, segments_of


@dataclass(frozen=True)
class ExportedStages:
    """A model as segments between open exits.

    Attributes:
        model: the private copy that they were made from, in eval mode on the CPU.
        input_format: of the calls that they take.
        inputs: the inputs of the example call; those that are no tensors are constants.
        shapes: for each input its sizes: a number, or the name of a size that may vary.
        ranges: the sizes that may vary, with their least and largest value.
        entry: which inputs the first segment takes.
        sized: which inputs every segment takes first, for their sizes.
        segments: shallow first; the last ends in the backbone's own logits.
        program: all segments in one graph, each with inputs of its own: it takes what the first takes, then what the
            second takes, and so on, and returns what they return in that order.
    """

    model: EarlyExit
    input_format: InputFormat
    inputs: tuple[Any, ...]
    shapes: tuple[tuple[int | str, ...] | None, ...]
    ranges: Mapping[str, Range]
    entry: tuple[int, ...]
    sized: tuple[int, ...]
    segments: tuple[SegmentModule, ...]
    program: ExportedProgram

    @property
    def tensor_names(self) -> list[tuple[list[str], list[str]]]:
        """For each segment, names of the tensors that it takes, and of those that it makes for later ones."""
        names = [self.input_format.names[index] for index in self.entry_tensors]
        found = []
        for segment in self.segments:
            exit_name, count = self.model.exit_names[segment.exit_index], segment.num_made
            made = [f"{exit_name}/{index}" for index in range(count)]
            found.append((names, made))
            names = [(made if kind == "made" else names)[index] for kind, index in segment.handed_on]
        return found

    @property
    def entry_tensors(self) -> list[int]:
        """Which of the inputs that the first segment takes are tensors."""
        return [index for index in self.entry if isinstance(self.inputs[index], Tensor)]

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of the backbone's own logits."""
        dtype: torch.dtype = outputs_of(self.program)[-1].dtype
        return dtype


def export_segments(
    model: EarlyExit, call: Call, thresholds: Sequence[float | None], batch: int | None, *, sizes_vary: bool = True
) -> ExportedStages:
    """Export the stages between open exits.

    Args:
        model: in eval mode.
        call: an example call with at least one row.
        thresholds: one per early exit; exits whose threshold is None are left out.
        batch: the number of rows, or None for any.
        sizes_vary: whether other sizes may vary too, where the stages allow it.

    Raises:
        ValueError, TypeError: for an example without rows, or with other inputs than the model takes.
        ExportError: when the model cannot be cut for such inputs, or a stage cannot be exported, with the reason.
    """
    model = exportable_copy(model)
    args, kwargs = call
    form = model.input_format
    if len(form.flatten(args, kwargs)[form.is_batched.index(True)]) == 0:
        raise ValueError("example_inputs has 0 rows; give at least 1")
    with CUTTING, torch.inference_mode(False), torch.no_grad():
        try:
            staged = model.staged(*args, **kwargs)
        except CutError as error:
            raise ExportError(f"the model cannot be exported, as it cannot be cut: {error}") from error
        except RuntimeError as error:
            raise ExportError(
                f"the backbone fails on example_inputs ({reason_of(error)}); give one that it takes"
            ) from error
        return _Exporter(model, staged, thresholds, batch).export(sizes_vary)


def exportable_copy(model: EarlyExit) -> EarlyExit:
    """A copy of the model on the CPU; ``torch.export`` swaps parameters, which others must not see meanwhile."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return private_copy(model)
    return copy.deepcopy(model).cpu()


class SegmentModule(nn.Module):
    """The stages up to one exit, and its head, as a module that ``torch.export`` takes.

    It takes the inputs whose sizes vary, for their sizes alone, and the tensors that cross the cut before it. It
    returns the logits of the exit, then those tensors that it has made for later segments.

    Args:
        model: owns the weights that the segment reads.
        segment: the stages.
        sizes: the sizes of inputs that all stages take: an (index among the sized inputs, dimension) for those that
            are read off a tensor, a number for those that are fixed.
        sized: an example of the inputs whose sizes vary.
        values: an example of the values that cross the cut before it; those that are no tensors are constants.
        row_dims: for each of these the dimension that holds the rows, or None.

    Attributes:
        exit_index: the exit behind it.
        example: what :meth:`forward` takes.
        taken_row_dims: for each of the tensors that it takes the dimension that holds the rows, or None.
        crossing: what crosses the cut behind it, of the example.
        handed_on: for each of these ``("made", i)``, the i-th tensor that it made, or ``("taken", i)``, the i-th that
            it took, unchanged.
        row_dims: for each of these the dimension that holds the rows; None: common to all rows.
    """

    def __init__(
        self,
        model: EarlyExit,
        segment: Segment,
        sizes: Sequence[tuple[int, int] | int],
        sized: Sequence[Tensor],
        values: Sequence[Any],
        row_dims: Sequence[int | None],
    ) -> None:
        super().__init__()
        self.backbone, self.heads = model.backbone, model.heads  # whose weights the stages look up
        self._segment = segment
        self._sizes = sizes
        self._constants = [None if isinstance(value, Tensor) else value for value in values]
        self._places = [index for index, value in enumerate(values) if isinstance(value, Tensor)]
        self._hold_rows = [(index, dim) for index, dim in enumerate(row_dims) if dim is not None]
        self._written: frozenset[int] = frozenset()
        self.exit_index, self.row_dims = segment.exit_index, segment.row_dims
        # Copies: sizes of one tensor would be traced as one symbol in all segments, whose rows differ in number.
        self.example = [tensor.clone() for tensor in sized], [values[place].clone() for place in self._places]
        self.taken_row_dims = [row_dims[place] for place in self._places]
        self._look()

    def _look(self) -> None:
        """Run to see which of the tensors the stages change in place, and which they hand on as they are."""
        sized, tensors = self.example
        given = [tensor.clone() for tensor in tensors]
        versions = [tensor._version for tensor in given]
        self.run(sized, given)
        self._written = frozenset(
            i for i, (tensor, before) in enumerate(zip(given, versions, strict=True)) if tensor._version != before
        )
        given = [tensor.clone() for tensor in tensors]
        _, self.crossing = self.run(sized, given)
        self.handed_on: list[tuple[str, int]] = []
        for value in self.crossing:
            taken = next((i for i, tensor in enumerate(given) if tensor is value), None)
            made = sum(kind == "made" for kind, _ in self.handed_on)
            self.handed_on.append(("made", made) if taken is None else ("taken", taken))

    def forward(self, sized: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        features, crossing = self.run(sized, tensors)
        k = self._segment.exit_index
        if k == len(self.heads):
            return (features,)
        logits = head_logits(self.heads[k], features, self._segment.mask(crossing))
        made = [value for value, (kind, _) in zip(crossing, self.handed_on, strict=True) if kind == "made"]
        return (logits, *made)

    @property
    def num_made(self) -> int:
        """How many tensors it makes for later segments."""
        return sum(kind == "made" for kind, _ in self.handed_on)

    def run(self, sized: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Any]]:
        """The features of the exit, before its head, and what crosses the cut behind it; None for what it only hands
        on."""
        values: list[Any] = list(self._constants)
        for index, (place, tensor) in enumerate(zip(self._places, tensors, strict=True)):
            values[place] = tensor.clone() if tensor is not None and index in self._written else tensor
        where, dim = next((index, dim) for index, dim in self._hold_rows if values[index] is not None)
        sizes = [size if isinstance(size, int) else sized[size[0]].shape[size[1]] for size in self._sizes]
        return self._segment.run(values[where].shape[dim], sizes, values)


class _AllSegments(nn.Module):
    """Segments beside each other, each on inputs of its own: to trace them together takes the time of one."""

    def __init__(self, segments: Sequence[SegmentModule]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.traced: set[int] = set()  # changed in place: torch.export takes assignments to attributes back

    def forward(self, *examples: tuple[Sequence[Tensor], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for at, (segment, example) in enumerate(zip(self.segments, examples, strict=True)):
            with OpaqueOps():
                outputs += segment(*example)
            self.traced.add(at)
        return tuple(outputs)


class _Exporter:
    """Exports the segments of one cut model."""

    def __init__(
        self, model: EarlyExit, staged: StagedBatch, thresholds: Sequence[float | None], batch: int | None
    ) -> None:
        self.model = model
        self.program: Program = staged.program
        self.batch = batch
        self.input_format = staged.input_format
        self.is_batched = staged.input_format.is_batched
        self.given = [value.detach().cpu() if isinstance(value, Tensor) else value for value in staged.inputs]
        self.inputs = with_rows(self.given, self.is_batched, batch or EXAMPLE_ROWS)
        self.segments = segments_of(self.program, tuple(thresholds))

    def export(self, sizes_vary: bool) -> ExportedStages:
        """The segments: for sizes that vary, or, where a segment holds for the example's alone, for these."""
        vary = sizes_vary and sizes_that_vary(self.program, self.inputs, self.is_batched, self.input_format.names)
        return (vary and self._export(*vary)) or self._export({}, {}) or self._refuse()

    def _export(self, names: Mapping[Place, str], ranges: Mapping[str, Range]) -> ExportedStages | None:
        sized = tuple(dict.fromkeys(index for index, _ in self.program.sizes)) if names else ()
        segments = self._modules_of(sized)
        program = self._trace(segments, bool(names))
        if not self._keeps_sizes(segments, program, len(sized), names):
            return None
        shapes = tuple(
            tuple(
                (BATCH if self.batch is None else self.batch)
                if dim == 0 and self.is_batched[index]
                else names.get((index, dim), size)
                for dim, size in enumerate(value.shape)
            )
            if isinstance(value, Tensor)
            else None
            for index, value in enumerate(self.inputs)
        )
        given, entry = tuple(self.given), self.program.entry
        return ExportedStages(self.model, self.input_format, given, shapes, ranges, entry, sized, segments, program)

    def _keeps_sizes(
        self, segments: Sequence[SegmentModule], program: ExportedProgram, num_sized: int, names: Mapping[Place, str]
    ) -> bool:
        """Whether no size that varies was fixed while a segment was traced."""
        taken, outputs = iter(inputs_of(program)), iter(outputs_of(program))
        varies = [{dim for index, dim in names if index == tensor} for tensor in self._entry_tensors]
        for segment in segments:
            _ = [next(taken) for _ in range(num_sized)]
            tensors = [next(taken) for _ in segment.taken_row_dims]
            for tensor, dims, row_dim in zip(tensors, varies, segment.taken_row_dims, strict=True):
                rows = set() if row_dim is None or self.batch is not None else {row_dim}
                if not dims | rows <= _dims_that_vary(tensor):
                    return False
            next(outputs)
            made = [next(outputs) for kind, _ in segment.handed_on if kind == "made"]
            crossing = [(made if kind == "made" else tensors)[i] for kind, i in segment.handed_on]
            varies = [_dims_that_vary(tensor) for tensor in crossing]
        return True

    def _refuse(self) -> NoReturn:
        raise ExportError(
            f"the model holds for {EXAMPLE_ROWS} rows only when it is exported, as its code fixes the size of the "
            "batch; give batch=1"
        )

    @property
    def _entry_tensors(self) -> list[int]:
        return [index for index in self.program.entry if isinstance(self.inputs[index], Tensor)]

    def _modules_of(self, sized: Sequence[int]) -> tuple[SegmentModule, ...]:
        sized_inputs = [self.inputs[index] for index in sized]
        sizes = [
            (sized.index(index), dim) if sized else self.inputs[index].shape[dim] for index, dim in self.program.sizes
        ]
        values: Sequence[Any] = self.program.entry_values(self.inputs)
        row_dims: Sequence[int | None] = [0 if self.is_batched[index] else None for index in self.program.entry]
        modules: list[SegmentModule] = []
        for segment in self.segments:
            if modules and not all(isinstance(value, Tensor) for value in values):
                before = self.model.exit_names[modules[-1].exit_index]
                raise ExportError(f"a number that is computed crosses exit {before!r}; name another exit")
            module = SegmentModule(self.model, segment, sizes, sized_inputs, values, row_dims).eval()
            values, row_dims = module.crossing, module.row_dims
            modules.append(module)
        return tuple(modules)

    def _trace(self, segments: Sequence[SegmentModule], varies: bool) -> ExportedProgram:
        def dynamic(tensor: Tensor, row_dim: int | None) -> dict[int, Any]:
            return {dim: Dim.AUTO for dim in range(tensor.ndim) if (self.batch is None if dim == row_dim else varies)}

        shapes = [
            (
                [dict.fromkeys(range(tensor.ndim), Dim.AUTO) for tensor in segment.example[0]],
                [dynamic(*pair) for pair in zip(segment.example[1], segment.taken_row_dims, strict=True)],
            )
            for segment in segments
        ]
        together = _AllSegments(segments).eval()
        examples = tuple(segment.example for segment in segments)
        try:
            with quiet():
                return torch.export.export(together, examples, dynamic_shapes=(tuple(shapes),), strict=False)
        except Exception as error:
            name = self.model.exit_names[segments[len(together.traced)].exit_index]
            raise tracing_error(f"the stage that ends in exit {name!r}", error) from error


def tracing_error(what: str, error: Exception) -> ExportError:
    """Says why a stage cannot be traced."""
    return ExportError(
        f"torch.export cannot trace {what} ({reason_of(error)}); give it code without branches on values"
    )


def with_rows(inputs: Sequence[Any], is_batched: Sequence[bool], rows: int) -> list[Any]:
    """So many rows of a call, the last one repeated where it has too few."""
    return [
        value[torch.arange(rows).clamp(max=len(value) - 1)] if batched else value
        for value, batched in zip(inputs, is_batched, strict=True)
    ]


def inputs_of(program: ExportedProgram) -> list[Any]:
    """The tensors that a graph takes, as it was traced with them."""
    return [_values(program)[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]


def outputs_of(program: ExportedProgram) -> list[Any]:
    """The tensors that a graph returns, as they were traced."""
    return [_values(program)[name] for name in program.graph_signature.user_outputs if isinstance(name, str)]


def _dims_that_vary(tensor: Any) -> set[int]:
    return {dim for dim, size in enumerate(tensor.shape) if isinstance(size, torch.SymInt)}


def _values(program: ExportedProgram) -> dict[str, Any]:
    return {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
