"""Cuts a backbone into stages at its exits.

The backbone is exported with a dynamic batch dimension (``torch.export``) and its graph is cut behind the outputs of
each exit's submodule. What crosses a cut is known with its symbolic shape, so it is clear which values hold one row
per sample and must be compacted with the batch, and which are common to all rows. Sizes never cross a cut: every size
is an expression in the number of rows and the sizes of the inputs, and each stage evaluates it for the rows it has.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from cet.partition.codegen import StageWriter
from cet.partition.export import PREFIX, export, names_of
from cet.partition.graph import drop_identities, last_uses, origin, views, writes
from cet.partition.inputs import InputFormat
from cet.partition.masks import drop_open_masks
from cet.partition.sizes import Sizes
from cet.partition.stages import CutError, Program, Stage
from cet.partition.verify import DependentRowsError

_ALONG_A_DIMENSION = {
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
    "sort",
    "argsort",
    "topk",
    "flip",
    "roll",
}
_CREATING = ("new_", "zeros", "ones", "full", "empty")  # these take no more than dtype and device from a tensor


def cut(
    backbone: nn.Module,
    traced: nn.Module,
    exits: Sequence[str],
    input_format: InputFormat,
    inputs: Sequence[Any],
    masks: Sequence[int | None],
    *,
    dynamic: bool,
) -> Program:
    """Export ``traced`` and cut it behind each of ``exits``.

    Args:
        backbone: the module whose parameters the stages read.
        traced: a private copy of it, in eval mode, that ``torch.export`` takes.
        exits: submodule paths in the order of execution.
        input_format: the format of the backbone's inputs.
        inputs: inputs as :meth:`InputFormat.flatten` gives them, with at least two rows.
        masks: for each exit which of the inputs its head takes beside the features, if any.
        dynamic: whether the sizes of the inputs, besides the batch, may vary where the code allows it.

    Raises:
        CutError: when the backbone cannot be exported or cut, naming the exit or the value and the rule.
    """
    program = export(traced, exits, input_format, inputs, dynamic=dynamic)
    return _Cutter(backbone, exits, input_format, inputs, masks, program).cut()


class _Cutter:
    """The passes from an exported program to stages."""

    def __init__(
        self,
        backbone: nn.Module,
        exits: Sequence[str],
        input_format: InputFormat,
        inputs: Sequence[Any],
        masks: Sequence[int | None],
        program: ExportedProgram,
    ) -> None:
        self.backbone = backbone
        self.exits = exits
        self.inputs = inputs
        self.program = program
        self.nodes = drop_identities(program.graph)
        drop_open_masks(program.graph)
        self.order = {node: position for position, node in enumerate(program.graph.nodes)}
        self.input_of: dict[fx.Node, int] = {}
        """Which of the inputs a placeholder is."""
        self.namespace: dict[str, Any] = {}
        """Globals of the generated code: the parameter and buffer dictionaries of submodules, and constants."""
        self.expressions: dict[fx.Node, str] = {}
        """Source of the values that are read or evaluated where they are used: weights and sizes."""
        self._bind_placeholders()
        self.sizes = Sizes(program, self.input_of, input_format, type(backbone).__name__)
        placeholder = {index: node for node, index in self.input_of.items()}
        self.masks = [None if index is None else placeholder[index] for index in masks]

    def cut(self) -> Program:
        self._express_sizes()
        cuts = self._cuts()
        features = [self._feature(path) for path in self.exits]
        logits = self._logits()
        masks = [mask for mask in self.masks if mask is not None]
        stage_of = self._assign_stages(cuts, [*features, logits, *masks])
        if stage_of.get(logits) != len(cuts):
            raise CutError(
                f"nothing is computed behind exit {self.exits[-1]!r}, which gives the logits themselves; name an exit "
                "before it"
            )
        self._refuse_probabilities(logits)
        self._refuse_reductions_over_rows(stage_of)
        self._refuse_scans_over_rows(stage_of)
        crossing = self._crossing(stage_of, len(cuts))
        self._refuse_shared_writes(stage_of, crossing)
        shapes: list[tuple[torch.dtype, tuple[int | None, ...]] | None] = [None] * len(self.inputs)
        for node, index in self.input_of.items():
            value = node.meta["val"]
            shapes[index] = (value.dtype, self.sizes.fixed(value))
        return Program(
            stages=tuple(self._write(stage_of, crossing, [*features, logits])),
            entry=tuple(self.input_of[node] for node in crossing[0]),
            sizes=self.sizes.varying,
            shapes=tuple(shapes),
            guard=self.sizes.guard(),
            guarded=self.sizes.guarded,
        )

    def _bind_placeholders(self) -> None:
        """Inputs become arguments; weights become look-ups in the dictionaries of the submodules that own them."""
        owners: dict[tuple[str, str], str] = {}
        named = _places_of_weights(self.backbone)
        tensors = (index for index, value in enumerate(self.inputs) if isinstance(value, Tensor))
        for spec in self.program.graph_signature.input_specs:
            node = self.nodes.get(spec.arg.name)
            if spec.kind is InputKind.USER_INPUT:
                index = next(tensors)
                if node is not None and isinstance(spec.arg, TensorArgument):
                    self.input_of[node] = index
                continue
            assert node is not None
            assert spec.target is not None
            path, _, name = spec.target.removeprefix(PREFIX).rpartition(".")
            kind = {InputKind.PARAMETER: "_parameters", InputKind.BUFFER: "_buffers"}.get(spec.kind, "")
            if not kind:  # a weight that code reached by another way than its submodule is one of its submodule's still
                path, kind, name = named.get(_place(self.program.constants[spec.target]), ("", "", ""))
            if kind:
                owner = owners.setdefault((path, kind), f"{kind[1].upper()}{len(owners)}")
                self.namespace[owner] = getattr(self.backbone.get_submodule(path), kind)
                self.expressions[node] = f"{owner}[{name!r}]"
            else:
                self.expressions[node] = constant = f"CONSTANT_{len(self.namespace)}"
                self.namespace[constant] = self.program.constants[spec.target]

    def _express_sizes(self) -> None:
        for node in self.order:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and node not in self.input_of:
                source = self.sizes.source(value)
                if source is not None:
                    self.expressions[node] = source

    def _cuts(self) -> list[int]:
        """Position in the graph of the last output of each exit."""
        cuts: list[int] = []
        for path in self.exits:
            outputs = self._outputs(path)
            position = max(self.order[node] for node in outputs)
            if cuts and position < cuts[-1]:
                raise CutError(
                    f"exit {path!r} is computed before exit {self.exits[len(cuts) - 1]!r}; "
                    "name exits in the order of execution"
                )
            if cuts and position == cuts[-1]:
                raise CutError(
                    f"exit {path!r} gives what exit {self.exits[len(cuts) - 1]!r} gives, with nothing computed "
                    "between them; keep one of the two"
                )
            cuts.append(position)
        return cuts

    def _outputs(self, path: str) -> list[fx.Node]:
        paths = {PREFIX + name for name in names_of(self.backbone, path)}
        calls = [
            [
                self.nodes[out.name]
                for out in e.signature.outputs
                if isinstance(out, TensorArgument) and out.name in self.nodes
            ]
            for e in self.program.module_call_graph
            if e.signature is not None and e.fqn.partition("@")[0] in paths
        ]
        calls = [nodes for nodes in calls if nodes]
        if len(calls) > 1:
            raise CutError(
                f"exit {path!r} is called {len(calls)} times in one forward pass, so it does not say where to leave; "
                "name a submodule that is called once"
            )
        nodes = calls[0] if calls else []
        if not nodes:
            raise CutError(
                f"torch.export shows no call of exit {path!r} that returns a tensor: it returns none, is compiled, or "
                "is called within torch.autocast; name a submodule that is called outside of these and returns its "
                "features"
            )
        return nodes

    def _feature(self, path: str) -> fx.Node:
        """The first tensor that the exit returns."""
        feature = self._outputs(path)[0]
        if self.sizes.row_dim(feature) != 0:
            raise CutError(
                f"exit {path!r} gives features of shape {self.sizes.shape(feature)}, where the batch is not first; "
                "name a submodule that returns (B, ...)"
            )
        return feature

    def _logits(self) -> fx.Node:
        (output,) = (node for node in self.order if node.op == "output")
        (logits,) = output.args[0]
        assert isinstance(logits, fx.Node)
        return logits

    def _refuse_probabilities(self, logits: fx.Node) -> None:
        """Refuse what a sigmoid or a softmax gives; a single logit stands beside a zero that was added to it."""
        nodes = [logits]
        if logits.target is torch.ops.aten.cat.default:
            parts = logits.args[0]
            nodes += [part for part in parts if isinstance(part, fx.Node)] if isinstance(parts, (list, tuple)) else []
        for node in nodes:
            for function in ("sigmoid", "softmax"):
                if getattr(node.target, "__name__", "").partition(".")[0] == function:
                    raise CutError(
                        f"{type(self.backbone).__name__} ends in a {function}, where early exits return logits; leave "
                        "it out, and apply it to what the model returns"
                    )

    def _refuse_reductions_over_rows(self, stage_of: dict[fx.Node, int]) -> None:
        """Refuse values that are computed from all rows together, whatever use is made of them."""
        for node in stage_of:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or node.op != "call_function" or node in self.expressions:
                continue
            name = getattr(node.target, "__name__", "")
            if name.startswith(_CREATING) or any(self.sizes.has_rows(size) for size in value.shape):
                continue
            for source in node.all_input_nodes:
                shape = getattr(source.meta.get("val"), "shape", ())
                if source not in self.expressions and any(self.sizes.has_rows(size) for size in shape):
                    raise CutError(
                        f"{type(self.backbone).__name__} lets rows depend on each other where it mixes rows, in "
                        f"{origin(node)}; let each row depend on itself alone"
                    )

    def _refuse_scans_over_rows(self, stage_of: dict[fx.Node, int]) -> None:
        """Refuse what runs along the rows: a few rows would not always show that they depend on each other, as where
        only so many of a batch are let through."""
        for node in stage_of:
            if not isinstance(node.target, torch._ops.OpOverload) or node in self.expressions:
                continue
            if node.target.overloadpacket.__name__ not in _ALONG_A_DIMENSION:
                continue
            shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
            given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
            dims = given.get("dim", given.get("dims", node.kwargs.get("dim", node.kwargs.get("dims", -1))))
            if any(self.sizes.has_rows(shape[dim]) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])):
                raise DependentRowsError(
                    f"{type(self.backbone).__name__} lets rows depend on each other where it mixes rows by "
                    f"{node.target} along the batch, in {origin(node)}; let each row depend on itself alone"
                )

    def _assign_stages(self, cuts: list[int], results: list[fx.Node]) -> dict[fx.Node, int]:
        """The stage of each node that is needed: operations run where the backbone runs them.

        A part of a tuple is taken in the stage that made the tuple, so that only tensors cross.
        """
        needed = self._needed(results)
        stage_of: dict[fx.Node, int] = {}
        for node in self.order:
            if node not in needed or node in self.expressions:
                continue
            if node in self.input_of:
                stage_of[node] = -1
            elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
                stage_of[node] = stage_of[node.args[0]]
            else:
                stage_of[node] = sum(self.order[node] > position for position in cuts)
        return stage_of

    def _needed(self, results: list[fx.Node]) -> set[fx.Node]:
        """What the results depend on, operations that write to a needed tensor included."""
        needed: set[fx.Node] = set()
        pending = list(results)
        writers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.order:
            if writes(node):
                for argument in node.all_input_nodes:
                    for viewed in views(argument):
                        writers.setdefault(viewed, []).append(node)
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            if node not in self.expressions:
                pending += node.all_input_nodes
            pending += writers.get(node, [])
        return needed

    def _crossing(self, stage_of: dict[fx.Node, int], num_cuts: int) -> list[list[fx.Node]]:
        """For each stage the values it takes: those made before it that it or a later stage uses.

        The mask of an exit's head crosses the cut behind the exit, so that the head finds it there.
        """
        last_use: dict[fx.Node, int] = {}
        for node, stage in stage_of.items():
            for argument in node.all_input_nodes:
                if argument in stage_of:
                    last_use[argument] = max(stage, last_use.get(argument, -1))
        for index, mask in enumerate(self.masks):
            if mask is not None:
                last_use[mask] = max(index + 1, last_use.get(mask, -1))
        return [
            [node for node, made in stage_of.items() if made < stage <= last_use.get(node, -1)]
            for stage in range(num_cuts + 1)
        ]

    def _refuse_shared_writes(self, stage_of: dict[fx.Node, int], crossing: list[list[fx.Node]]) -> None:
        """Compaction copies what crosses a cut: two views of one tensor are two tensors behind it."""
        for index, taken in enumerate(crossing[1:], start=1):
            written = {
                root
                for node, stage in stage_of.items()
                if stage >= index and writes(node)
                for argument in node.all_input_nodes
                for root in views(argument)
            }
            seen: dict[fx.Node, fx.Node] = {}
            for node in taken:
                for root in views(node):
                    other = seen.setdefault(root, node)
                    if other is not node and root in written:
                        raise CutError(
                            f"{origin(other)} and {origin(node)} share memory across exit "
                            f"{self.exits[index - 1]!r} and are changed in place behind it; change a copy instead"
                        )

    def _write(
        self, stage_of: dict[fx.Node, int], crossing: list[list[fx.Node]], results: list[fx.Node]
    ) -> list[Stage]:
        sizes = self.sizes.names
        for node in stage_of:
            if node.op == "get_attr":  # the body of a block such as torch.autocast, or a constant
                self.namespace[node.name] = getattr(self.program.graph_module, str(node.target))
                self.expressions[node] = node.name
        stages = []
        for index, taken in enumerate(crossing):
            handed_on = crossing[index + 1] if index + 1 < len(crossing) else []
            row_dims = tuple(self._row_dim_at_cut(node, self.exits[index]) for node in handed_on)
            writer = StageWriter(f"stage_{index}", self.expressions, self.namespace)
            body = [node for node, stage in stage_of.items() if stage == index and node.op != "get_attr"]
            kept = {results[index], *handed_on}
            dying = last_uses(body, [*taken, *body], kept)
            for node in body:
                writer.call(node)
                writer.forget(dying.get(node, []))
            last = index + 1 == len(crossing)
            run, source = writer.compile(
                ["n", *sizes, *(node.name for node in taken)],
                results[index] if last else [results[index], *handed_on],
            )
            mask = None if last else self.masks[index]
            stages.append(Stage(run, row_dims, None if mask is None else handed_on.index(mask), source))
        return stages

    def _row_dim_at_cut(self, node: fx.Node, path: str) -> int | None:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and not self.sizes.has_rows(value):
            return None
        if not isinstance(value, Tensor):
            raise CutError(
                f"{origin(node)} crosses exit {path!r} but is {type(value).__name__}, no tensor; "
                "name an exit before it is computed or after its last use"
            )
        dim = self.sizes.row_dim(node)
        if dim is None and any(self.sizes.has_rows(size) for size in value.shape):
            raise CutError(
                f"{origin(node)} crosses exit {path!r} with shape {self.sizes.shape(node)}, where no dimension is the "
                "batch alone; reshape it to (B, ...) or name an exit where it is not in use"
            )
        return dim


def _places_of_weights(backbone: nn.Module) -> dict[Any, tuple[str, str, str]]:
    """The submodule, dictionary and name of each parameter and buffer, by its place in memory."""
    return {
        _place(tensor): (path, kind, name)
        for path, module in backbone.named_modules()
        for kind in ("_buffers", "_parameters")
        for name, tensor in getattr(module, kind).items()
        if tensor is not None and _place(tensor) is not None
    }


def _place(value: Any) -> Any:
    """What tells a tensor in memory from all others; None where it has no memory of its own."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.numel() == 0:
        return None
    try:
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    except RuntimeError:  # a subclass without storage
        return None
