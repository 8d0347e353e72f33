"""The inputs of a backbone: one canonical order for positional, keyword and dict inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

EXAMPLE_ROWS = 3
"""How many rows are kept of an example: more than two, so that the batch is seldom taken for another dimension."""

_AS_NAMES = "give the entries of a dict by name, as in model(**batch)"
_DENSE = "give dense tensors, padded to one size with a mask where rows differ in length"

Call = tuple[tuple[Any, ...], dict[str, Any]]


class OtherInputsError(TypeError):
    """A call has other inputs than the example had."""


class InputFormat:
    """What the backbone is called with, learned from one example call.

    A call is flattened to *inputs*: its tensors and constants in the order of the backbone's signature, whether they
    were given by position or by name. Tensors with as many rows as the batch hold one row per sample; all other inputs
    are common to all rows.

    Args:
        backbone: the module whose ``forward`` signature orders the inputs.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, with ``B >= 2`` rows.

    Raises:
        TypeError, ValueError: when the example does not fit the signature, holds no tensor, or has fewer than two rows.
    """

    def __init__(self, backbone: nn.Module, example_inputs: Any) -> None:
        self._signature = inspect.signature(backbone.forward)
        self._origin = "example_inputs"
        self._given = _as_call(example_inputs)
        arguments = self._arguments(*self._given)
        inputs, self._structure = pytree.tree_flatten(arguments)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        for value in tensors:
            if value.is_nested or value.layout is not torch.strided:
                raise TypeError(f"example_inputs holds {_kind_of(value)}; {_DENSE}")
        if not tensors or tensors[0].ndim == 0:
            raise TypeError("example_inputs holds no batch; its first tensor must have one row per sample")
        rows = tensors[0].shape[0]
        if rows < 2:
            raise ValueError(f"example_inputs has {rows} rows; give at least 2, so that the batch can be told apart")
        self.names = _names(arguments)
        self.is_batched = [isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows for value in inputs]
        self.batch_size = min(rows, EXAMPLE_ROWS)
        self.example = [
            value.detach()[: self.batch_size].clone() if batched else value
            for value, batched in zip(inputs, self.is_batched, strict=True)
        ]
        self._example_arguments = pytree.tree_unflatten(self.example, self._structure)
        weight = next(backbone.parameters(), None)
        self._weight_dtype = None if weight is None else weight.dtype
        # Most calls are a few positional tensors, one per value: those need no look at the signature.
        args, kwargs = self.unflatten(inputs)
        self._num_plain_args = -1 if kwargs or not all(isinstance(a, Tensor) for a in args) else len(args)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """The inputs of one call, checked for structure and for one common number of rows.

        Raises:
            OtherInputsError, a TypeError: when the call has other inputs than the example had.
            ValueError: when a constant differs from the example's or tensors disagree on the number of rows.
        """
        inputs: Sequence[Any] = args
        if kwargs or len(args) != self._num_plain_args:
            arguments = self._arguments(args, kwargs)
            inputs, structure = pytree.tree_flatten(arguments)
            if structure != self._structure:
                fix = _AS_NAMES if args and isinstance(args[0], Mapping) else "give the same inputs"
                raise OtherInputsError(
                    f"the model was called with {_describe(arguments)} but example_inputs had "
                    f"{_describe(self._example_arguments)}; {fix}"
                )
        self._check(inputs)
        return inputs

    def variant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InputFormat | None:
        """The format of a call that leaves optional inputs out or adds some; None where it differs in another way."""
        arguments = self._arguments(args, kwargs)
        known = self._example_arguments
        common = arguments.keys() & known.keys()
        if any(pytree.tree_structure(arguments[name]) != pytree.tree_structure(known[name]) for name in common):
            return None
        batched = dict(zip(self.names, self.is_batched, strict=True))
        example = dict(zip(self.names, self.example, strict=True))
        inputs, structure = pytree.tree_flatten(arguments)
        names = _names(arguments)
        rows = {value.shape[0] for name, value in zip(names, inputs, strict=True) if batched.get(name)}
        if len(rows) != 1 or structure == self._structure:
            return None
        variant = copy.copy(self)
        variant._structure, variant.names, variant._num_plain_args = structure, names, -1
        variant._origin = "the first call with such inputs"
        variant.is_batched = [
            batched.get(name, isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] in rows)
            for name, value in zip(names, inputs, strict=True)
        ]
        if any(name not in example for name in names):  # all of one call, or their sizes might not fit together
            example = dict(zip(names, variant._first_rows(inputs, example), strict=True))
        variant.example = [example[name] for name in names]
        variant._example_arguments = pytree.tree_unflatten(variant.example, structure)
        return variant

    def _first_rows(self, inputs: Sequence[Any], example: Mapping[str, Any]) -> Iterator[Any]:
        """As many rows of a call as the example has, in the dtypes that they would have had when it was given."""
        pairs = [(value, example.get(name)) for name, value in zip(self.names, inputs, strict=True)]
        of_weights = {value.dtype for value, known in pairs if _has_dtype(known, self._weight_dtype)}
        for (value, _), batched in zip(pairs, self.is_batched, strict=True):
            if isinstance(value, Tensor):
                dtype = self._weight_dtype if value.dtype in of_weights else value.dtype
                with torch.inference_mode(False):  # of a tensor that is made within it no gradient can be taken later
                    if batched:
                        value = value[torch.arange(self.batch_size, device=value.device).clamp(max=len(value) - 1)]
                    value = value.detach().to(dtype, copy=True)
            yield value

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those names that the backbone's forward does not take."""
        parameters = self._signature.parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return []
        return [name for name in names if name not in parameters]

    def without_cache(self) -> dict[str, Any]:
        """The keyword that keeps a model of Hugging Face transformers from returning its keys and values too."""
        given = self._example_arguments
        return {"use_cache": False} if "use_cache" in self._signature.parameters and "use_cache" not in given else {}

    def unflatten(self, inputs: Sequence[Any]) -> Call:
        """The call ``(args, kwargs)`` that has these inputs."""
        bound = self._signature.bind_partial()
        bound.arguments.update(pytree.tree_unflatten(list(inputs), self._structure))
        return bound.args, bound.kwargs

    def num_rows(self, inputs: Sequence[Any]) -> int:
        """Rows of a call that :meth:`flatten` returned."""
        rows: int = inputs[self.is_batched.index(True)].shape[0]
        return rows

    def device(self, inputs: Sequence[Any]) -> torch.device:
        """Where the rows of such a call are."""
        device: torch.device = inputs[self.is_batched.index(True)].device
        return device

    def example_for(self, weight: Tensor | None) -> list[Any]:
        """The example's inputs on the device of ``weight``; those that had the dtype of the weights when the example
        was given are in the dtype of ``weight``."""
        if weight is None or weight.is_meta:  # weights that are offloaded come where the input is
            return self.example
        return [
            value.to(weight.device, weight.dtype if value.dtype == self._weight_dtype else value.dtype)
            if isinstance(value, Tensor)
            else value
            for value in self.example
        ]

    def unlike(self, inputs: Sequence[Any], weight: Tensor | None) -> str | None:
        """The first input whose dtype, or else whose sizes, are not the example's, and what to give instead."""
        example = self.example_for(weight)
        for name, value, known in zip(self.names, inputs, example, strict=True):
            if isinstance(value, Tensor) and value.dtype != known.dtype:
                return f"{name} is {_name_of(value.dtype)} but was {_name_of(known.dtype)} in example_inputs"
        for name, value, known in zip(self.names, inputs, example, strict=True):
            if isinstance(value, Tensor) and value.shape[1:] != known.shape[1:]:
                return f"{name} has shape {tuple(value.shape)} but had {tuple(known.shape)} in example_inputs"
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> InputFormat:
        return self  # nothing in it ever changes

    def to_dict(self) -> dict[str, Any]:
        """Structure, shapes and dtypes of the example inputs, and their constants, in a form that JSON can hold."""
        args, kwargs = self._given
        return {
            "args": [_to_json(value, self._weight_dtype) for value in args],
            "kwargs": {name: _to_json(value, self._weight_dtype) for name, value in kwargs.items()},
        }

    @staticmethod
    def example_from(description: Mapping[str, Any], weight: Tensor | None) -> Any:
        """Inputs of the structure and shapes that :meth:`to_dict` described, noise and ones for integers, for weights
        of the dtype and on the device of ``weight``."""
        kwargs = {name: _from_json(value, weight) for name, value in description["kwargs"].items()}
        return kwargs or tuple(_from_json(value, weight) for value in description["args"])

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The inputs of a call of any kind, by name."""
        arguments = self._arguments(args, kwargs)
        return zip(_names(arguments), pytree.tree_leaves(arguments), strict=True)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Inputs by parameter name, in the order of the signature, without those that equal their default."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            fix = f"; {_AS_NAMES}" if args and isinstance(args[0], Mapping) else ""
            raise TypeError(f"the inputs do not fit the backbone's forward{self._signature}: {error}{fix}") from None
        parameters = self._signature.parameters
        return {
            name: _in_key_order(value)
            for name, value in bound.arguments.items()
            if value is not parameters[name].default
        }

    def _check(self, inputs: Sequence[Any]) -> None:
        rows = None
        for index, (value, example, batched) in enumerate(zip(inputs, self.example, self.is_batched, strict=True)):
            if isinstance(example, Tensor):
                if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_nested):
                    raise TypeError(f"{self.names[index]} is {_kind_of(value)}; {_DENSE}")
                if not isinstance(value, Tensor) or value.ndim != example.ndim:
                    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                    fix = _AS_NAMES if isinstance(value, Mapping) else "give a tensor with as many dimensions"
                    raise TypeError(
                        f"{self.names[index]} has {got} but had shape {tuple(example.shape)} in {self._origin}; {fix}"
                    )
                if batched:
                    rows = value.shape[0] if rows is None else rows
                    if value.shape[0] != rows:
                        raise ValueError(
                            f"{self.names[index]} has {value.shape[0]} rows where other inputs have {rows}; "
                            "give every input one row per sample"
                        )
            elif isinstance(value, Tensor) or (value != example and (value == value or example == example)):  # NaN
                raise ValueError(
                    f"{self.names[index]} is {value!r} but was {example!r} in {self._origin}, where the stages were "
                    "cut with it as a constant; make another cet.EarlyExit for other constants"
                )


def _has_dtype(value: Any, dtype: torch.dtype | None) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def _names(arguments: Mapping[str, Any]) -> list[str]:
    paths: list[Any] = [path for path, _ in pytree.tree_flatten_with_path(arguments)[0]]
    return [f"{path[0].key}{pytree.keystr(path[1:])}" for path in paths]


def _in_key_order(value: Any) -> Any:
    """The order of a dict's keys means nothing, but makes another pytree."""
    return {key: _in_key_order(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def _kind_of(tensor: Tensor) -> str:
    return "a nested tensor" if tensor.is_nested else f"a tensor with layout {tensor.layout}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copied(inputs: Sequence[Any]) -> list[Any]:
    """The inputs with every tensor cloned."""
    return [value.clone() if isinstance(value, Tensor) else value for value in inputs]


def _as_call(inputs: Any) -> Call:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise TypeError(
        f"example_inputs is {type(inputs).__name__}; give a tuple of positional inputs or a dict of keyword inputs"
    )


def _describe(arguments: Mapping[str, Any]) -> str:
    def kind(value: Any) -> str:
        return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    return ", ".join(f"{name}={kind(value)}" for name, value in arguments.items()) or "no inputs"


def _to_json(value: Any, weight_dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        dtype = "of the weights" if value.dtype == weight_dtype else _name_of(value.dtype)
        # Integers may index a table, and the example tells whether it has more than one row.
        fill = int(value.max() > 0) if value.numel() and not value.is_complex() else 0
        return {"tensor": list(value.shape), "dtype": dtype, "fill": fill}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_to_json(v, weight_dtype) for v in value]}
    if isinstance(value, dict):
        return {"dict": {key: _to_json(v, weight_dtype) for key, v in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"example_inputs holds a {type(value).__name__}, which no checkpoint can describe; use plain values"
    )


def _from_json(value: Any, weight: Tensor | None) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        of_weights = value["dtype"] == "of the weights"
        dtype = weight.dtype if weight is not None and of_weights else getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['dtype']} is no dtype")
        noise = torch.randn(value["tensor"]) if dtype.is_floating_point else torch.full(value["tensor"], value["fill"])
        return noise.to(None if weight is None else weight.device, dtype)
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _from_json(v, weight) for key, v in content.items()}
    return {"list": list, "tuple": tuple}[kind](_from_json(v, weight) for v in content)
