"""Cuts a backbone into stages at its exits.

The backbone is exported with a dynamic batch dimension (``torch.export``) and its graph is cut behind the outputs of
each exit's submodule. What crosses a cut is known with its symbolic shape, so it is clear which values hold one row
per sample and must be compacted with the batch, and which are common to all rows. Sizes never cross a cut: every size
is an expression in the number of rows and the sizes of the inputs, and each stage evaluates it for the rows it has.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils._sympy.printers import PythonPrinter

from cet.partition.codegen import StageWriter
from cet.partition.inputs import InputFormat
from cet.partition.stages import CutError, Stage, StagedProgram, logits_of


def cut(
    backbone: nn.Module,
    exits: Sequence[str],
    inputs: InputFormat,
    leaves: Sequence[Any],
    varying: frozenset[tuple[int, int]] = frozenset(),
) -> StagedProgram:
    """Export ``backbone`` and cut it behind each of ``exits``.

    Args:
        backbone: any module that ``torch.export`` takes, in eval mode; its parameters stay its own.
        exits: submodule paths in the order of execution.
        inputs: the format of the backbone's inputs.
        leaves: inputs as :meth:`InputFormat.flatten` gives them, with at least two rows.
        varying: the (leaf, dimension) pairs, besides the batch, whose size should be allowed to vary.

    Raises:
        CutError: when the backbone cannot be exported or cut, naming the exit or the value and the rule.
    """
    program = _export(backbone, exits, inputs, leaves, varying)
    return _Cutter(backbone, exits, inputs, leaves, program).cut()


class _Logits(nn.Module):
    """The logits of the backbone as a function of the tensors among its inputs, so that nothing else is computed."""

    def __init__(self, backbone: nn.Module, inputs: InputFormat, leaves: Sequence[Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self._inputs = inputs
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        leaves = [next(given) if t else c for t, c in zip(self._is_tensor, self._constants, strict=True)]
        args, kwargs = self._inputs.unflatten(leaves)
        return logits_of(self.backbone(*args, **kwargs))


_PREFIX = "backbone."
_END = torch.iinfo(torch.int64).max


def _export(
    backbone: nn.Module,
    exits: Sequence[str],
    inputs: InputFormat,
    leaves: Sequence[Any],
    varying: frozenset[tuple[int, int]],
) -> ExportedProgram:
    tensors, shapes = [], []
    for index, (leaf, batched) in enumerate(zip(leaves, inputs.is_batched, strict=True)):
        if isinstance(leaf, Tensor):
            dims = {dim: Dim.AUTO for i, dim in varying if i == index}
            tensors.append(leaf.clone())
            shapes.append({**dims, 0: Dim.AUTO} if batched else dims)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                _Logits(backbone, inputs, leaves).eval(),
                tuple(tensors),
                dynamic_shapes=(tuple(shapes),),
                preserve_module_call_signature=tuple(_PREFIX + path for path in exits),
                strict=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CutError(
            f"torch.export cannot trace {type(backbone).__name__} ({reason}); "
            "give its stages explicitly as cet.Stages(...)"
        ) from error


class _Cutter:
    """The passes from an exported program to stages."""

    def __init__(
        self,
        backbone: nn.Module,
        exits: Sequence[str],
        inputs: InputFormat,
        leaves: Sequence[Any],
        program: ExportedProgram,
    ) -> None:
        self.backbone = backbone
        self.exits = exits
        self.inputs = inputs
        self.leaves = leaves
        self.program = program
        self.nodes = _nodes_without_identities(program.graph)
        self.order = {node: position for position, node in enumerate(program.graph.nodes)}
        self.leaf_of: dict[fx.Node, int] = {}
        """Which leaf of the inputs a placeholder is."""
        self.namespace: dict[str, Any] = {}
        """Globals of the generated code: the parameter and buffer dictionaries of submodules, and constants."""
        self.expressions: dict[fx.Node, str] = {}
        """Source of the values that are read or evaluated where they are used: weights and sizes."""
        self.rows: set[sympy.Symbol] = set()
        """The symbols of the batch size."""
        self.sizes: dict[sympy.Symbol, tuple[int, int]] = {}
        """The symbols of input sizes that vary besides the batch, with their (leaf, dimension)."""

    def cut(self) -> StagedProgram:
        self._bind_placeholders()
        self._name_symbols()
        self._express_sizes()
        cuts = self._cuts()
        features = [self._feature(path) for path in self.exits]
        logits = self._logits()
        stage_of = self._assign_stages(cuts, [*features, logits])
        if stage_of.get(logits) != len(cuts):
            raise CutError(
                f"nothing is computed behind exit {self.exits[-1]!r}, which gives the logits themselves; name an exit "
                "before it"
            )
        crossing = self._crossing(stage_of, len(cuts))
        self._refuse_shared_writes(stage_of, crossing)
        stages = self._write(stage_of, crossing, [*features, logits])
        weight_now = _first_weight(self.backbone)
        weight = weight_now()
        return StagedProgram(
            stages=tuple(stages),
            entry=tuple(self.leaf_of[node] for node in crossing[0]),
            sizes=tuple(self.sizes.values()),
            shapes=self._shapes(),
            weight=weight_now,
            dtype=None if weight is None else weight.dtype,
            device=None if weight is None else weight.device,
        )

    def _bind_placeholders(self) -> None:
        """Inputs become arguments; weights become look-ups in the dictionaries of the submodules that own them."""
        owners: dict[tuple[str, str], str] = {}
        leaves = (index for index, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor))
        for spec in self.program.graph_signature.input_specs:
            node = self.nodes.get(spec.arg.name)
            if spec.kind is InputKind.USER_INPUT:
                leaf = next(leaves)
                if node is not None and isinstance(spec.arg, TensorArgument):
                    self.leaf_of[node] = leaf
                continue
            assert node is not None
            assert spec.target is not None
            path, _, name = spec.target.removeprefix(_PREFIX).rpartition(".")
            if spec.kind is InputKind.PARAMETER or spec.kind is InputKind.BUFFER:
                kind = "_parameters" if spec.kind is InputKind.PARAMETER else "_buffers"
                owner = owners.setdefault((path, kind), f"{kind[1].upper()}{len(owners)}")
                self.namespace[owner] = getattr(self.backbone.get_submodule(path), kind)
                self.expressions[node] = f"{owner}[{name!r}]"
            else:
                self.expressions[node] = constant = f"CONSTANT_{len(self.namespace)}"
                self.namespace[constant] = self.program.constants[spec.target]

    def _name_symbols(self) -> None:
        for node, leaf in self.leaf_of.items():
            for dim, size in enumerate(node.meta["val"].shape):
                batched = dim == 0 and self.inputs.is_batched[leaf]
                symbol = _expression(size)
                if isinstance(symbol, sympy.Symbol):
                    if batched:
                        self.rows.add(symbol)
                    else:
                        self.sizes.setdefault(symbol, (leaf, dim))
                elif batched:
                    raise CutError(
                        f"{type(self.backbone).__name__} takes {symbol} rows of {self.inputs.names[leaf]} only, as its "
                        "code fixes the size of the batch; read it from x.shape[0], or use -1 in reshape"
                    )
        self.sizes = {s: where for s, where in self.sizes.items() if s not in self.rows}

    def _express_sizes(self) -> None:
        known = self.rows | self.sizes.keys()
        names = {s: sympy.Symbol("n", integer=True) for s in self.rows}
        names |= {s: sympy.Symbol(self._size_name(s), integer=True) for s in self.sizes}
        for node in self.order:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and node not in self.leaf_of:
                expression = _expression(value)
                if expression.free_symbols <= known:
                    self.expressions[node] = f"({PythonPrinter().doprint(expression.xreplace(names))})"

    def _size_name(self, symbol: sympy.Symbol) -> str:
        leaf, dim = self.sizes[symbol]
        return f"size_{leaf}_{dim}"

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
        calls = [e for e in self.program.module_call_graph if e.fqn.partition("@")[0] == _PREFIX + path]
        if len(calls) > 1:
            raise CutError(
                f"exit {path!r} is called {len(calls)} times in one forward pass, so it does not say where to leave; "
                "name a submodule that is called once"
            )
        signature = calls[0].signature if calls else None
        names = [out.name for out in signature.outputs if isinstance(out, TensorArgument)] if signature else []
        nodes = [self.nodes[name] for name in names if name in self.nodes]
        if not nodes:
            raise CutError(
                f"exit {path!r} returns no tensor in the forward pass of {type(self.backbone).__name__}; "
                "name a submodule that is called once and returns its features"
            )
        return nodes

    def _feature(self, path: str) -> fx.Node:
        """The first tensor that the exit returns."""
        feature = self._outputs(path)[0]
        if self._row_dim(feature) != 0:
            raise CutError(
                f"exit {path!r} gives features of shape {self._shape(feature)}, where the batch is not first; "
                "name a submodule that returns (B, ...)"
            )
        return feature

    def _logits(self) -> fx.Node:
        (output,) = (node for node in self.order if node.op == "output")
        (logits,) = output.args[0]
        assert isinstance(logits, fx.Node)
        return logits

    def _assign_stages(self, cuts: list[int], results: list[fx.Node]) -> dict[fx.Node, int]:
        """The stage of each node that is needed: operations run where the backbone runs them.

        A part of a tuple is taken in the stage that made the tuple, so that only tensors cross.
        """
        needed = self._needed(results)
        stage_of: dict[fx.Node, int] = {}
        for node in self.order:
            if node not in needed or node in self.expressions:
                continue
            if node in self.leaf_of:
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
            if _writes(node):
                for argument in node.all_input_nodes:
                    for viewed in _views(argument):
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
        """For each stage the values it takes: those made before it that it or a later stage uses."""
        last_use: dict[fx.Node, int] = {}
        for node, stage in stage_of.items():
            for argument in node.all_input_nodes:
                if argument in stage_of:
                    last_use[argument] = max(stage, last_use.get(argument, -1))
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
                if stage >= index and _writes(node)
                for argument in node.all_input_nodes
                for root in _views(argument)
            }
            seen: dict[fx.Node, fx.Node] = {}
            for node in taken:
                for root in _views(node):
                    other = seen.setdefault(root, node)
                    if other is not node and root in written:
                        raise CutError(
                            f"{_origin(other)} and {_origin(node)} share memory across exit "
                            f"{self.exits[index - 1]!r} and are changed in place behind it; change a copy instead"
                        )

    def _write(
        self, stage_of: dict[fx.Node, int], crossing: list[list[fx.Node]], results: list[fx.Node]
    ) -> list[Stage]:
        sizes = [self._size_name(symbol) for symbol in self.sizes]
        stages = []
        for index, taken in enumerate(crossing):
            handed_on = crossing[index + 1] if index + 1 < len(crossing) else []
            row_dims = tuple(self._row_dim_at_cut(node, self.exits[index]) for node in handed_on)
            writer = StageWriter(f"stage_{index}", self.expressions, self.namespace)
            body = [node for node, stage in stage_of.items() if stage == index]
            kept = {results[index], *handed_on}
            dying = _last_uses(body, [*taken, *body], kept)
            for node in body:
                if node.op == "get_attr":
                    self.namespace[node.name] = getattr(self.program.graph_module, str(node.target))
                    self.expressions[node] = node.name
                    continue
                writer.call(node)
                writer.forget(dying.get(node, []))
            last = index + 1 == len(crossing)
            run, source = writer.compile(
                ["n", *sizes, *(node.name for node in taken)],
                results[index] if last else [results[index], *handed_on],
            )
            stages.append(Stage(run, row_dims, source))
        return stages

    def _row_dim_at_cut(self, node: fx.Node, path: str) -> int | None:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and not self._has_rows(value):
            return None
        if not isinstance(value, Tensor):
            raise CutError(
                f"{_origin(node)} crosses exit {path!r} but is {type(value).__name__}, no tensor; "
                "name an exit before it is computed or after its last use"
            )
        dim = self._row_dim(node)
        if dim is None and any(self._has_rows(size) for size in value.shape):
            raise CutError(
                f"{_origin(node)} crosses exit {path!r} with shape {self._shape(node)}, where no dimension is the "
                "batch alone; reshape it to (B, ...) or name an exit where it is not in use"
            )
        return dim

    def _row_dim(self, node: fx.Node) -> int | None:
        """The dimension of a tensor that is the batch, if one is and no other depends on it."""
        shape = node.meta["val"].shape
        dims = [dim for dim, size in enumerate(shape) if self._has_rows(size)]
        if len(dims) == 1 and _expression(shape[dims[0]]) in self.rows:
            return dims[0]
        return None

    def _has_rows(self, size: int | torch.SymInt) -> bool:
        return bool(_expression(size).free_symbols & self.rows)

    def _shape(self, node: fx.Node) -> str:
        """The shape of a value with ``B`` for the batch."""
        names = dict.fromkeys(self.rows, sympy.Symbol("B"))
        sizes = [str(_expression(size).xreplace(names)) for size in node.meta["val"].shape]
        return "(" + ", ".join(sizes) + ")"

    def _shapes(self) -> tuple[tuple[torch.dtype, tuple[int | None, ...]] | None, ...]:
        shapes: list[tuple[torch.dtype, tuple[int | None, ...]] | None] = [None] * len(self.leaves)
        for node, leaf in self.leaf_of.items():
            value = node.meta["val"]
            sizes = tuple(None if _expression(size).free_symbols else int(size) for size in value.shape)
            shapes[leaf] = (value.dtype, sizes)
        return tuple(shapes)


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression in the symbols of the input sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _nodes_without_identities(graph: fx.Graph) -> dict[str, fx.Node]:
    """All nodes by name, after operations that return their input as it is were taken out of the graph; their names
    then mean that input."""
    nodes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if _is_identity(node):
            (source,) = node.all_input_nodes
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            nodes[node.name] = source
        else:
            nodes[node.name] = node
    return nodes


def _is_identity(node: fx.Node) -> bool:
    """Dropout that is off, and the slice ``[:]``."""
    if node.target is torch.ops.aten.dropout.default:
        return node.args[2] is False
    return node.target is torch.ops.aten.slice.Tensor and node.args[2:] in ((0, _END), (0, _END, 1))


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """A value and all that it is a view of."""
    yield node
    schema = getattr(node.target, "_schema", None)
    if node.op == "call_function" and schema is not None:
        for argument, described in zip(node.args, schema.arguments, strict=False):
            if isinstance(argument, fx.Node) and described.alias_info is not None:
                yield from _views(argument)


def _last_uses(body: list[fx.Node], values: list[fx.Node], kept: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node of ``body`` the values that nothing after it uses."""
    last: dict[fx.Node, fx.Node] = {}
    for node in body:
        last[node] = node
        for argument in node.all_input_nodes:
            last[argument] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value in values:
        if value not in kept and value in last and value.op != "get_attr":
            dying.setdefault(last[value], []).append(value)
    return dying


def _origin(node: fx.Node) -> str:
    """A value's name, and the submodule that computed it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    where = paths[-1].removeprefix("backbone").lstrip(".") if paths else ""
    return f"value {node.name!r}" + (f" of submodule {where!r}" if where else "")


def _first_weight(module: nn.Module) -> Callable[[], Tensor | None]:
    for submodule in module.modules():
        for name in submodule._parameters:
            if submodule._parameters[name] is not None:
                parameters = submodule._parameters
                return lambda: parameters.get(name)
    return lambda: None
