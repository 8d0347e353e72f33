"""A model with exits as one ONNX file of standard operators.

Each stage is exported once, and the graphs are nested by hand: behind each exit stands an ``If``, whose one branch
holds all that comes behind the exit. So the file grows, and takes time to write, linearly with the exits; an ``If``
made from ``torch.cond`` is traced again for each exit that it is in.

For any number of rows those that stay are gathered before the branch, and their answers scattered back behind it,
where tensors can be freed and written in place; logits, score and exit index are columns of one tensor on the way, so
that one scatter does. For a batch of one there is no index at all.

ONNX Runtime keeps a branch with all that it holds beside what it makes of it, and so weights of the last stage as often
as there are exits before it. Where that is much, the branches stand one behind the other instead, each with one stage,
and all weights around them; who has left passes through the rest, which costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch.export import ExportedProgram

from cet.deploy.description import BATCH, KEY, OUTPUTS, THRESHOLDS, Description, ExportError
from cet.deploy.manifest import StageEntry
from cet.deploy.onnx_int8 import feeds_of, quantized
from cet.deploy.onnx_nodes import IR_VERSION, Block, Value, Weights
from cet.deploy.onnx_operators import TRANSLATIONS
from cet.deploy.onnx_parts import num_bytes, own_values, place_weights, split
from cet.deploy.onnx_scores import negated, own_score, patience, scores
from cet.deploy.segments import ExportedStages, SegmentModule
from cet.partition.export import CUTTING, quiet
from cet.runtime.scores import ScoreFunction, has_kernel, is_low_when_sure

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Kind = tuple[ir.DataType, Sequence[int | str]]

OPSET = 20

_LARGEST = 2_000_000_000
"""Bytes that a protocol buffer holds."""
_MOST_COPIED = 64_000_000
"""Bytes of weights that branches within branches may cost a session of ONNX Runtime."""


class OnnxWriter:
    """Writes exported stages as ONNX models.

    Raises:
        ExportError: where an operator has no translation, and where the weights are more than one file can hold.
    """

    def __init__(self, stages: ExportedStages) -> None:
        size = sum(tensor.nbytes for tensor in (*stages.model.parameters(), *stages.model.buffers()))
        if size >= _LARGEST:
            raise ExportError(
                f"the weights take {size / 1e9:.1f} GB, and one ONNX file holds less than 2; give a smaller backbone"
            )
        self._stages = stages
        self._graph = _translated("the backbone or a head", lambda: stages.program)
        score = stages.model.policy.score
        self._own = (
            _translated(f"the score {score.name!r}", lambda: _traced(score, stages))
            if isinstance(score, ScoreFunction)
            else None
        )

    def quantize(self, batches: Iterable[Any], batch: int | None) -> None:
        """Turn the stages into int8, by the activations of these inputs of calls; see :mod:`cet.deploy.onnx_int8`.

        Raises:
            ExportError: where they cannot be.
        """
        stages = self._stages
        taken = [str(value.name) for value in self._graph.inputs]
        inputs, outputs = iter(self._graph.inputs), iter(self._graph.outputs)
        logits = [own_values(segment, len(stages.sized), inputs, outputs)[1][0] for segment in stages.segments]
        self._graph = quantized(self._graph, logits, feeds_of(stages, taken, batches, batch))

    def with_exits(self, description: Description) -> bytes:
        """The model with its exits, as it is described."""
        return _Model(self._stages, self._graph, description, self._stages.segments, self._own).with_exits()

    def without_exits(self, description: Description) -> bytes:
        """The backbone alone, from the same stages: what the exits are measured against."""
        return _Model(self._stages, self._graph, description, self._stages.segments).without_exits()

    def each_stage(self, description: Description) -> list[tuple[StageEntry, bytes]]:
        """Each segment as a model of its own, which answers all rows that it is given."""
        stages = self._stages
        written = []
        inputs, outputs = iter(self._graph.inputs), iter(self._graph.outputs)
        for segment, (taken, made) in zip(stages.segments, stages.tensor_names, strict=True):
            own = ir.convenience.extract(self._graph, *own_values(segment, len(stages.sized), inputs, outputs))
            written.append(_Model(stages, own, description, [segment]).stage(taken, made))
        return written


def _translated(what: str, program: Callable[[], ExportedProgram]) -> ir.Graph:
    """The graph of a program in ONNX.

    Raises:
        ExportError: where ``what`` it computes cannot be traced, or has no form there.
    """
    try:
        with CUTTING, quiet():
            translated = torch.onnx.export(
                program(),
                (),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS,
            )
    except Exception as error:
        reason = next((line for line in reversed(str(error.__cause__ or error).splitlines()) if line.strip()), "")
        raise ExportError(
            f"{what} has no form in ONNX ({reason.strip()}); compute it with operators that torch.onnx translates"
        ) from error
    assert translated is not None
    # Weights that are only rearranged are rearranged here, whatever their size: branches are not folded later.
    fold_constants(translated.model, should_fold=_rearranges, output_size_limit=_LARGEST)
    return translated.model.graph


def _traced(score: ScoreFunction, stages: ExportedStages) -> ExportedProgram:
    """A function of logits ``(n, K)`` as a graph that returns scores ``(n, 1)``."""

    class Own(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return score.function(logits).float().unsqueeze(1)

    any_rows = any(shape is not None and BATCH in shape for shape in stages.shapes)
    vary = {0: torch.export.Dim("rows")} if any_rows else None
    example = torch.zeros(4 if any_rows else 1, stages.model.num_classes)
    with torch.no_grad():
        return torch.export.export(Own().eval(), (example,), dynamic_shapes=(vary,), strict=False)


class _Model:
    """One model while it is written."""

    def __init__(
        self,
        stages: ExportedStages,
        graph: ir.Graph,
        description: Description,
        segments: Sequence[SegmentModule],
        own: ir.Graph | None = None,
    ) -> None:
        self.description = description
        self._segments = segments
        self._score, self._own = stages.model.policy.score, own
        self._graph = graph.clone()
        self._parts = split(self._graph, segments, len(stages.sized))
        held = set(self._graph.initializers.values())
        copied = sum(depth * num_bytes(part, held) for depth, part in enumerate(self._parts))
        self._is_chain = copied > _MOST_COPIED
        if self._is_chain:
            self._parts = split(self._graph, segments, len(stages.sized), is_chain=True)
        self._graph.outputs.clear()
        self._ranks = {value: len(value.shape or ()) for part in self._parts for value in part.outputs}
        self._weights = Weights()
        self._constants: dict[Value, Value] = {}
        for value in self._graph.initializers.values():
            assert value.const_value is not None
            self._constants[value] = self._weights.of(value.const_value, value.name or "weight")
            value.replace_all_uses_with(self._constants[value])
        self._inputs = [_value(given.name, _dtype(given.dtype), given.shape) for given in description.inputs]
        by_name = {value.name: value for value in self._inputs}
        names = stages.input_format.names
        self._entry = [by_name[names[index]] for index in stages.entry_tensors]
        self._sized = [by_name[names[index]] for index in stages.sized]
        self._negated = negated(self._score, description.batch is not None)
        self._is_low_when_sure = is_low_when_sure(self._score)
        never = -np.inf if self._is_low_when_sure else np.inf
        self._thresholds = np.array([never if t is None else t for t in description.thresholds], np.float32)
        self._given_thresholds = _value(THRESHOLDS, FLOAT, self._thresholds.shape)
        self._given_thresholds.const_value = ir.tensor(self._thresholds, name=THRESHOLDS)

    def with_exits(self) -> bytes:
        if self.description.batch is None:
            block, answers = self._any_rows()
        else:
            block, answers = self._row_by_stages() if self._is_chain else self._one_row(0, self._entry)
        thresholds = [self._given_thresholds] if self.description.thresholds_are_input else []
        outputs = [*zip(OUTPUTS, answers, self._kinds, strict=True)]
        return self._to_bytes(block, [*self._inputs, *thresholds], outputs, thresholds)

    def without_exits(self) -> bytes:
        whole = Block(self._weights, "")
        values = self._entry
        for depth in range(len(self._segments)):
            block, logits, values = self._segment(depth, values)
            whole.nodes += block.nodes
        return self._to_bytes(whole, self._inputs, [(OUTPUTS[0], logits, self._kinds[0])])

    def stage(self, names: Sequence[str], made: Sequence[str]) -> tuple[StageEntry, bytes]:
        """The only segment, which takes and makes tensors of these names."""
        ((segment, part),) = zip(self._segments, self._parts, strict=True)
        # A tensor that crosses the cut before it tells its sizes as well as the input that it is.
        rows = dict.fromkeys((str(value.name) for value in self._sized), None) | dict(
            zip(names, segment.taken_row_dims, strict=True)
        )
        given = [*(str(value.name) for value in self._sized), *names]
        taken = {
            name: _value(name, _dtype_of(inside), self._sizes(name, inside.shape, rows[name]))
            for name, inside in zip(given, part.inputs, strict=True)
        }
        shapes = [value.shape for value in part.outputs[1:]]  # nodes forget them on their way
        self._sized = [taken[str(value.name)] for value in self._sized]
        block, logits, score, crossing, _ = self._scored(0, [taken[name] for name in names])
        if self._negated:
            score = block.op("Neg", score)
        outputs = [
            (OUTPUTS[0], logits, self._kinds[0]),
            (OUTPUTS[2], block.op("Squeeze", score, block.integers(1)), self._kinds[2]),
        ]
        pairs = zip(crossing, segment.handed_on, segment.row_dims, strict=True)
        for value, (kind, index), row_dim in pairs:
            if kind == "made":
                name = made[index]
                own = block.op("Identity", value) if any(value is known for _, known, _ in outputs) else value
                outputs.append((name, own, (_dtype_of(value), self._sizes(name, shapes[index], row_dim))))
        used = [value for value in taken.values() if value.uses() or any(value is known for _, known, _ in outputs)]
        content = self._to_bytes(block, used, outputs)
        entry = StageEntry(
            file=f"{segment.exit_index}.onnx",
            exit_index=segment.exit_index,
            inputs={str(value.name): rows[str(value.name)] for value in used},
            outputs=tuple(name for name, *_ in outputs[2:]),
        )
        return entry, content

    def _sizes(self, name: str, shape: ir.Shape | None, row_dim: int | None) -> list[int | str]:
        """The sizes of a tensor on its way between stages; a name where they may vary."""
        assert shape is not None
        rows = self.description.batch or BATCH
        sizes = [size if isinstance(size, int) else f"{name}_{dim}" for dim, size in enumerate(shape)]
        return [rows if dim == row_dim else size for dim, size in enumerate(sizes)]

    def _segment(self, depth: int, values: Sequence[Value]) -> tuple[Block, Value, list[Value]]:
        """The nodes of a segment; its logits, and what crosses the cut behind it."""
        segment, part = self._segments[depth], self._parts[depth]
        block = Block(self._weights, f"{self.description.exits[segment.exit_index]}/")
        outer = dict(zip(part.inputs, [*self._sized, *values], strict=True))
        for inside, outside in outer.items():
            inside.replace_all_uses_with(outside)
        outer |= self._constants
        logits, *made = [outer.get(value, value) for value in part.outputs]
        self._graph.remove(part.nodes)
        block.take(part.nodes)
        sources = {"made": made, "taken": values}
        return block, logits, [sources[kind][index] for kind, index in segment.handed_on]

    def _scored(
        self, depth: int, values: Sequence[Value], seen: Sequence[Value] = ()
    ) -> tuple[Block, Value, Value, list[Value], list[Value]]:
        """The nodes of a segment; its logits, scores ``(n, 1)``, what crosses the cut behind it, and what the next
        score has to have seen, ``(n, 1)`` each."""
        block, logits, crossing = self._segment(depth, values)
        cast = block.cast(logits, self.description.logits_dtype)
        if self._score == "patience":
            score, seen = patience(block, logits, seen)
            return block, cast, score, crossing, seen
        temperatures = self.description.temperatures
        temperature = 1.0 if temperatures is None else temperatures[self._segments[depth].exit_index]
        if not has_kernel(self._score):
            assert self._own is not None
            return block, cast, own_score(block, logits, self._own, temperature), crossing, []
        producer = logits.producer()
        score = scores(
            block,
            logits,
            self._score,
            temperature,
            excludes=producer is None or producer.op_type != "Gemm",  # a linear layer rules no class out
            one_row=self.description.batch is not None,
        )
        return block, cast, score, crossing, []

    def _leaves(self, block: Block, score: Value, exit_index: int) -> Value:
        """Whether rows leave: of NaN no comparison is true."""
        if self.description.thresholds_are_input:
            limit = block.op("Gather", self._given_thresholds, block.constant(np.int64(exit_index)))
            limit = block.op("Neg", limit) if self._negated else limit
        else:
            limit = block.number(-self._thresholds[exit_index] if self._negated else self._thresholds[exit_index])
        is_low_when_sure = self._is_low_when_sure and not self._negated
        return block.op("LessOrEqual" if is_low_when_sure else "GreaterOrEqual", score, limit)

    def _one_row(self, depth: int, values: Sequence[Value], seen: Sequence[Value] = ()) -> tuple[Block, list[Value]]:
        """Logits ``(1, K)``, exit index ``(1,)`` and score ``(1,)`` of a batch of one, from a segment on."""
        block, logits, score, crossing, seen = self._scored(depth, values, seen)
        exit_index = self._segments[depth].exit_index
        last = depth + 1 == len(self._segments)
        leaving = block if last else Block(self._weights, f"{block.prefix}leaves/")
        flat = block.op("Squeeze", score, block.integers(1))  # (1,), as OpenVINO wants conditions
        answers = [
            logits if last else leaving.op("Identity", logits),
            leaving.op("Identity", block.integers(exit_index)),
            flat if last else leaving.op("Identity", flat),
        ]
        if last:
            return block, answers
        leaves = self._leaves(block, flat, exit_index)
        return block, self._if(block, leaves, (leaving, answers), self._one_row(depth + 1, crossing, seen))

    def _row_by_stages(self) -> tuple[Block, list[Value]]:
        """As :meth:`_one_row`, with the branches one behind the other."""
        top, crossing, seen = Block(self._weights, ""), list(self._entry), list[Value]()
        answers: list[Value] = []
        for depth, segment in enumerate(self._segments):
            block, logits, score, crossing, seen = self._scored(depth, crossing, seen)
            flat = block.op("Squeeze", score, block.integers(1))
            made = [logits, block.op("Identity", block.integers(segment.exit_index)), flat]
            if depth + 1 < len(self._segments):
                made.append(block.op("Not", self._leaves(block, flat, segment.exit_index)))
            if depth == 0:
                top, answers = block, made
                continue
            passed = Block(self._weights, f"{block.prefix}passed/")
            same = [passed.op("Identity", value) for value in answers[: len(made)]]
            answers, behind = self._stage_if(top, answers[3], (block, made), (passed, same), [*crossing, *seen])
            crossing, seen = ([behind.get(value, value) for value in values] for values in (crossing, seen))
        return top, answers

    def _any_rows(self) -> tuple[Block, list[Value]]:
        block, packed = self._rows_by_stages() if self._is_chain else self._packed(0, self._entry)
        widths = block.integers(self.description.num_classes, 1, 1)
        logits, column, exit_index = block.ops("Split", packed, widths, outputs=3, axis=1)
        flat = [block.op("Squeeze", value, block.integers(1)) for value in (exit_index, column)]
        score = block.op("Neg", flat[1]) if self._negated else flat[1]
        dtypes = _dtype(self.description.logits_dtype), INT64, FLOAT
        return block, [
            value if dtype == width else block.op("Cast", value, to=dtype)
            for value, dtype, width in zip((logits, flat[0], score), dtypes, [_dtype(self._width)] * 3, strict=True)
        ]

    @property
    def _width(self) -> str:
        """The dtype of what is packed: float32, which holds all of it exactly, or float64 where the logits need it."""
        return "float64" if self.description.logits_dtype == "float64" else "float32"

    def _packed(self, depth: int, values: Sequence[Value], seen: Sequence[Value] = ()) -> tuple[Block, Value]:
        """Logits, score or its negative, and exit index of any number of rows, ``(n, K + 2)``, from a segment on."""
        block, packed, kept = self._packed_stage(depth, values, seen)
        if kept is None:
            return block, packed
        deeper, answers = self._packed(depth + 1, kept.crossing, kept.seen)
        (answered,) = self._if(block, kept.somebody, (deeper, [answers]), self._nobody(block))
        return block, block.op("ScatterND", packed, kept.places, answered)

    def _rows_by_stages(self) -> tuple[Block, Value]:
        """As :meth:`_packed`, with the branches one behind the other."""
        top, packed, kept = self._packed_stage(0, self._entry, ())
        for depth in range(1, len(self._segments)):
            assert kept is not None
            block, answers, further = self._packed_stage(depth, kept.crossing, kept.seen)
            made, crossing, seen = [answers], list[Value](), list[Value]()
            nobody, none = self._nobody(block)
            if further is not None:
                made += [further.somebody, block.op("Gather", kept.places, further.rows, axis=0)]
                none += [
                    nobody.op("Identity", kept.somebody),
                    nobody.op("ConstantOfShape", nobody.integers(0, 1), value=_zero(INT64)),
                ]
                crossing, seen = further.crossing, further.seen
            made, behind = self._stage_if(top, kept.somebody, (block, made), (nobody, none), [*crossing, *seen])
            packed = top.op("ScatterND", packed, kept.places, made[0])
            if further is not None:
                crossing, seen = ([behind.get(value, value) for value in values] for values in (crossing, seen))
                kept = _Kept(made[1], made[2], further.rows, crossing, seen)
        return top, packed

    def _packed_stage(
        self, depth: int, values: Sequence[Value], seen: Sequence[Value]
    ) -> tuple[Block, Value, _Kept | None]:
        """A segment with the answers of all its rows, ``(n, K + 2)``, and the rows that it has go on."""
        block, logits, score, crossing, seen = self._scored(depth, values, seen)
        exit_index = self._segments[depth].exit_index
        both = block.op("Concat", block.cast(logits, self._width), block.cast(score, self._width), axis=1)
        packed = block.op("Pad", both, block.integers(0, 0, 0, 1), block.constant(np.array(exit_index, self._width)))
        if depth + 1 == len(self._segments):
            return block, packed, None
        stays = block.op("Not", self._leaves(block, score, exit_index))
        index = block.op("NonZero", block.op("Squeeze", stays, block.integers(1)))  # (1, number that stays)
        somebody = block.op("Cast", block.op("Size", index), to=ir.DataType.BOOL)
        rows = block.op("Squeeze", index, block.integers(0))
        going_on = [
            value if dim is None else block.op("Gather", value, rows, axis=dim)
            for value, dim in zip(crossing, self._segments[depth].row_dims, strict=True)
        ]
        self._ranks |= {made: self._rank(value) for made, value in zip(going_on, crossing, strict=True)}
        seen = [block.op("Gather", value, rows, axis=0) for value in seen]
        return block, packed, _Kept(somebody, block.op("Transpose", index), rows, going_on, seen)

    def _nobody(self, block: Block) -> tuple[Block, list[Value]]:
        """The answers of no rows."""
        nobody = Block(self._weights, f"{block.prefix}nobody/")
        # OpenVINO reads an initialiser without rows as a scalar.
        width = nobody.integers(0, self.description.num_classes + 2)
        return nobody, [nobody.op("ConstantOfShape", width, value=_zero(_dtype(self._width)))]

    def _stage_if(
        self,
        top: Block,
        condition: Value,
        stage: tuple[Block, list[Value]],
        passed: tuple[Block, list[Value]],
        going_on: Sequence[Value],
    ) -> tuple[list[Value], dict[Value, Value]]:
        """A branch with a stage, and one with what stands for its answers where the stage is passed by: the answers
        behind both, and what stands there for those of the values going on that the stage makes."""
        (block, made), (around, answers) = stage, passed
        own = set(block.nodes)
        carried = [value for value in dict.fromkeys(going_on) if value.producer() in own]
        outputs = [
            value if value.producer() in own and value not in carried else block.op("Identity", value) for value in made
        ]
        none = [  # which nobody reads
            around.op("ConstantOfShape", around.integers(*[1] * self._rank(value)), value=_zero(_dtype_of(value)))
            for value in carried
        ]
        values = self._if(top, condition, (block, [*outputs, *carried]), (around, [*answers, *none]))
        for value, inside in zip(values, [*made, *carried], strict=True):
            value.type = inside.type
        behind = dict(zip(carried, values[len(made) :], strict=True))
        self._ranks |= {value: self._rank(inside) for inside, value in behind.items()}
        return values[: len(made)], behind

    def _rank(self, value: Value) -> int:
        """How many dimensions a tensor has that goes to a later stage."""
        if value in self._ranks:
            return self._ranks[value]
        return 2 if value.shape is None else len(value.shape)  # what a score has to have seen is (n, 1)

    def _if(
        self, block: Block, condition: Value, then: tuple[Block, list[Value]], otherwise: tuple[Block, list[Value]]
    ) -> list[Value]:
        branches = {
            name: ir.Graph([], outputs, nodes=branch.nodes, name=f"{branch.prefix}{name}")
            for name, (branch, outputs) in (("then_branch", then), ("else_branch", otherwise))
        }
        return list(block.ops("If", condition, outputs=len(then[1]), **branches))

    @property
    def _kinds(self) -> list[Kind]:
        """Dtype and shape of logits, exit index and score."""
        rows, classes = self.description.batch or BATCH, self.description.num_classes
        return [(_dtype(self.description.logits_dtype), (rows, classes)), (INT64, (rows,)), (FLOAT, (rows,))]

    def _to_bytes(
        self,
        block: Block,
        inputs: Sequence[Value],
        outputs: Sequence[tuple[str, Value, Kind]],
        initializers: Sequence[Value] = (),
    ) -> bytes:
        answers = []
        for name, value, (dtype, shape) in outputs:
            answer = value if value.producer() in block.nodes else block.op("Identity", value)
            answer.name, answer.type, answer.shape = name, ir.TensorType(dtype), ir.Shape(shape)
            answers.append(answer)
        graph = ir.Graph(
            inputs,
            answers,
            nodes=block.nodes,
            initializers=initializers,
            opset_imports={"": OPSET},
            name="model",
        )
        place_weights(graph, self._weights, self._is_chain)
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="cet")
        model.metadata_props[KEY] = self.description.to_json()
        RemoveUnusedNodesPass()(model)
        content: bytes = ir.to_proto(model).SerializeToString()
        return content


def _dtype(name: str) -> ir.DataType:
    """What ONNX calls a dtype of NumPy."""
    return ir.DataType.from_numpy(np.dtype(name))


def _dtype_of(value: Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _zero(dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)


def _rearranges(node: ir.Node) -> bool | None:
    return True if node.op_type in ("Concat", "Gather", "Transpose", "Unsqueeze") else None


class _Kept(NamedTuple):
    """The rows that go on behind a segment."""

    somebody: Value
    """Whether there are any."""
    places: Value
    """``(m, 1)``: which they are, of the rows around the branch that answers them."""
    rows: Value
    """``(m,)``: which they are, of the rows of the segment."""
    crossing: list[Value]
    seen: list[Value]
