"""Sizes in an exported graph: which dimension is the batch, and how other sizes follow from those of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from cet.partition.export import compile_guards, guards_of
from cet.partition.inputs import EXAMPLE_ROWS, InputFormat
from cet.partition.stages import CutError


class Sizes:
    """The symbols of an exported graph.

    Args:
        program: the graph.
        input_of: which of the inputs each placeholder is.
        input_format: the format of the inputs.
        backbone_name: for errors.

    Raises:
        CutError: when the graph holds for one number of rows only.
    """

    def __init__(
        self,
        program: ExportedProgram,
        input_of: Mapping[fx.Node, int],
        input_format: InputFormat,
        backbone_name: str,
    ) -> None:
        self._rows: set[sympy.Symbol] = set()
        dependent: list[tuple[int, int, sympy.Expr]] = []
        varying: dict[sympy.Symbol, tuple[int, int]] = {}
        for node, index in input_of.items():
            for dim, size in enumerate(node.meta["val"].shape):
                symbol, batched = expression_of(size), dim == 0 and input_format.is_batched[index]
                if batched and not isinstance(symbol, sympy.Symbol):
                    raise CutError(
                        f"{backbone_name} takes {symbol} rows of {input_format.names[index]} only, as its code fixes "
                        "the size of the batch; read it from x.shape[0], or use -1 in reshape"
                    )
                if batched:
                    self._rows.add(symbol)
                elif isinstance(symbol, sympy.Symbol) and symbol not in varying:
                    varying[symbol] = (index, dim)
                elif symbol.free_symbols:
                    dependent.append((index, dim, symbol))
        self._varying = {symbol: where for symbol, where in varying.items() if symbol not in self._rows}
        self._names = {symbol: f"size_{index}_{dim}" for symbol, (index, dim) in self._varying.items()}
        if dependent and any(expression.free_symbols & self._rows for *_, expression in dependent):
            raise CutError(f"{backbone_name} takes inputs with a size that depends on the number of rows; pad it")
        guards = guards_of(program)
        self._refuse_dependence_on_rows(guards, backbone_name)
        example = dict.fromkeys(self._rows, sympy.Integer(EXAMPLE_ROWS))
        conditions = dict.fromkeys(guard.xreplace(example) for guard in guards)
        self._guards = [condition for condition in conditions if condition.free_symbols]
        for index, dim, expression in dependent:  # a size that the code has found to follow from another
            symbol = sympy.Symbol(f"size_{index}_{dim}", integer=True)
            self._names[symbol] = symbol.name
            self._guards.append(sympy.Eq(symbol, expression, evaluate=False))
        self._guarded = (*self._varying.values(), *((index, dim) for index, dim, _ in dependent))
        for guard in self._guards:
            if not guard.free_symbols <= self._names.keys():
                raise CutError(f"{backbone_name} tests sizes that do not follow from those of its inputs ({guard})")

    def _refuse_dependence_on_rows(self, guards: list[sympy.Basic], backbone_name: str) -> None:
        """Refuse code that tests the number of rows: a row's answer would depend on how many others there are."""
        for guard in guards:
            if guard.free_symbols and guard.free_symbols <= self._rows:
                for number in (2, 3, 4, 5, 8, 16, 33, 64, 100, 256, 1000, 4096):
                    if guard.xreplace(dict.fromkeys(self._rows, sympy.Integer(number))) is sympy.false:
                        raise CutError(
                            f"{backbone_name} computes otherwise for other numbers of rows, such as {number}; let each "
                            "row depend on itself alone"
                        )

    @property
    def varying(self) -> tuple[tuple[int, int], ...]:
        """The (input, dimension) of each size that may vary besides the batch."""
        return tuple(self._varying.values())

    @property
    def names(self) -> list[str]:
        """The names of these sizes in generated code."""
        return [self._names[symbol] for symbol in self._varying]

    @property
    def guarded(self) -> tuple[tuple[int, int], ...]:
        """The (input, dimension) of each size that :meth:`guard` takes."""
        return self._guarded

    def guard(self) -> Callable[..., bool] | None:
        """Whether the graph holds for the sizes that are :attr:`guarded`; None where it always does."""
        return compile_guards(self._guards, self._names)

    def source(self, value: torch.SymInt) -> str | None:
        """Python source of a size in terms of ``n``, the number of rows, and the sizes that vary."""
        expression = expression_of(value)
        if not expression.free_symbols <= self._rows | self._varying.keys():
            return None
        names = dict.fromkeys(self._rows, "n") | {symbol: self._names[symbol] for symbol in self._varying}
        symbols = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
        return f"({PythonPrinter().doprint(expression.xreplace(symbols))})"

    def row_dim(self, node: fx.Node) -> int | None:
        """The dimension of a tensor that is the batch, if one is and no other depends on it."""
        shape = node.meta["val"].shape
        dims = [dim for dim, size in enumerate(shape) if self.has_rows(size)]
        if len(dims) == 1 and expression_of(shape[dims[0]]) in self._rows:
            return dims[0]
        return None

    def has_rows(self, size: int | torch.SymInt) -> bool:
        """Whether a size depends on the number of rows."""
        return bool(expression_of(size).free_symbols & self._rows)

    def shape(self, node: fx.Node) -> str:
        """The shape of a value, with ``B`` for the batch."""
        batch = dict.fromkeys(self._rows, sympy.Symbol("B"))
        sizes = [str(expression_of(size).xreplace(batch)) for size in node.meta["val"].shape]
        return "(" + ", ".join(sizes) + ")"

    def fixed(self, value: Tensor) -> tuple[int | None, ...]:
        """The shape of an input, with None for sizes that may vary."""
        return tuple(None if expression_of(size).free_symbols else int(size) for size in value.shape)


def expression_of(size: Any) -> sympy.Expr:
    """A size as an expression in the symbols of the input sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
