"""What :func:`cet.load_exported` returns: an exported model that is called like the model itself. Imports no torch."""

from __future__ import annotations

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cet.deploy.description import BATCH, Description, Input
from cet.model.output import ExitOutput
from cet.thresholds import as_numbers, check_thresholds

Array = npt.NDArray[Any]
Thresholds = tuple[float | None, ...]

_AS_NAMES = "give the entries of a dict by name, as in predict(**batch)"


class LoadedModel(ABC):
    """An exported model.

    Attributes:
        description: what the file says of itself.
        exit_names: of all exits, shallow first, the final one included.
        class_labels: a name for each class, or None.
    """

    def __init__(self, description: Description) -> None:
        self.description = description
        self.exit_names = description.exits
        self.class_labels = description.class_labels
        self._thresholds = description.thresholds
        self._dtypes = [np.dtype(given.dtype) for given in description.inputs]
        plain = [given.name for given in description.inputs] == list(description.parameters)[: len(description.inputs)]
        self._num_plain = len(description.inputs) if plain else -1

    @abstractmethod
    def run(self, arrays: Sequence[Array], thresholds: Thresholds) -> tuple[Array, Array, Array]:
        """Logits, exit indices and scores of at least one row, whose inputs have been checked."""

    def predict(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Answer every row of a batch, as :meth:`cet.EarlyExit.predict` does.

        Args:
            args, kwargs: what the backbone's forward takes, as NumPy arrays or tensors, of the dtypes and sizes of
                :attr:`description`.

        Returns:
            Logits ``(B, K)``, exit index ``(B,)`` int64 and score ``(B,)`` float32: tensors where the first input is
            one, else arrays.

        Raises:
            TypeError, ValueError: for other inputs than the file takes, naming the input and the rule.
        """
        return self.answer(self._bind(args, kwargs) if kwargs or len(args) != self._num_plain else args)

    def exit_answers(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, Any], ...]:
        """Logits ``(B, K)`` and scores ``(B,)`` of all ``E`` exits, as :meth:`cet.EarlyExit.exit_answers` gives them:
        the batch is answered once per exit, by a file for one row each row by itself. Both are NaN where a score is.

        Raises:
            ValueError: of a file that was not exported with ``thresholds="input"``.
        """
        if not self.description.thresholds_are_input:
            raise ValueError("exits cannot be asked one by one in this file; export with thresholds='input'")
        given = self._bind(args, kwargs)
        if rows := self._rows_one_by_one(given):
            join = np.concatenate if type(given[0]) is np.ndarray else sys.modules["torch"].cat
            by_exit = zip(*(self._exit_answers(row) for row in rows), strict=True)
            return tuple((join([logits for logits, _ in at]), join([score for _, score in at])) for at in by_exit)
        return self._exit_answers(given)

    def _rows_one_by_one(self, given: Sequence[Any]) -> list[list[Any]]:
        """The calls for each row, where a file for one is given several."""
        shapes = [tuple(getattr(value, "shape", ())) for value in given]
        of_rows = [
            expected.shape[:1] == (1,) and len(shape) == len(expected.shape) and shape[0] > 1
            for expected, shape in zip(self.description.inputs, shapes, strict=True)
        ]
        counts = {shape[0] for shape, several in zip(shapes, of_rows, strict=True) if several}
        if self.description.batch != 1 or len(counts) != 1:
            return []
        return [
            [value[row : row + 1] if several else value for value, several in zip(given, of_rows, strict=True)]
            for row in range(counts.pop())
        ]

    def _exit_answers(self, given: Sequence[Any]) -> tuple[tuple[Any, Any], ...]:
        always, num_early = math.inf if self.description.is_low_when_sure else -math.inf, len(self.exit_names) - 1
        answers = []
        for k in range(num_early + 1):
            forced = tuple(always if index == k else None for index in range(num_early))
            answer = self.answer(given, forced)
            passed_by = answer.exit_index != k
            answer.logits[passed_by], answer.score[passed_by] = math.nan, math.nan
            answers.append((answer.logits, answer.score))
        return tuple(answers)

    def answer(self, given: Sequence[Any], thresholds: Thresholds | None = None) -> ExitOutput:
        """Answer a batch whose tensors are given one by one, in the order of the file's inputs.

        Args:
            given: the tensors.
            thresholds: for this call, of a file whose thresholds are an input; the model's own when not given.
        """
        arrays = [
            value if type(value) is np.ndarray else _to_array(expected, value)
            for expected, value in zip(self.description.inputs, given, strict=True)
        ]
        rows = self._check(arrays)
        if rows == 0:
            answers = (
                np.empty((0, self.description.num_classes), self.description.logits_dtype),
                np.empty(0, np.int64),
                np.empty(0, np.float32),
            )
        else:
            answers = self.run(arrays, self._thresholds if thresholds is None else thresholds)
        if type(given[0]) is not np.ndarray:
            torch = sys.modules["torch"]
            return ExitOutput(*(torch.from_numpy(answer) for answer in answers))
        return ExitOutput(*cast(Any, answers))

    @property
    def num_classes(self) -> int:
        """``K``."""
        return self.description.num_classes

    @property
    def num_exits(self) -> int:
        """``E``, the final exit counted."""
        return len(self.exit_names)

    @property
    def thresholds(self) -> Thresholds:
        """When samples leave: one number per early exit, None for a closed one. They can be assigned where the file was
        exported with ``thresholds="input"``."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: Sequence[float | None]) -> None:
        if not self.description.thresholds_are_input:
            raise ValueError("the thresholds are part of this file; export the model with thresholds='input'")
        chosen = as_numbers("thresholds", thresholds, optional=True)
        if len(chosen) != len(self.exit_names) - 1:
            raise ValueError(
                f"{len(chosen)} thresholds were given but the model has {len(self.exit_names) - 1} early exits; give "
                "one each, None for a closed one"
            )
        if self.description.own_is_low is None:
            check_thresholds(self.description.score, chosen)
        self._thresholds = chosen

    def _threshold_array(self, thresholds: Thresholds) -> Array:
        """``(E - 1,)`` float32, with numbers at which no sample leaves where an exit is closed."""
        closed = -math.inf if self.description.is_low_when_sure else math.inf
        with np.errstate(over="ignore"):  # to infinity
            return np.array([closed if threshold is None else threshold for threshold in thresholds], np.float32)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors of a call, in the order of the file's inputs."""
        known = self.description
        given: dict[str, Any] = {}
        for name, value in _by_parameter(known.parameters, args, kwargs):
            given |= dict(_leaves(name, value))
        tensors = []
        for expected in known.inputs:
            if expected.name not in given:
                fix = f"give {', '.join(tensor.name for tensor in known.inputs)}"
                if args and isinstance(args[0], Mapping):
                    fix = _AS_NAMES
                raise TypeError(f"{expected.name} is missing; {fix}")
            tensors.append(given.pop(expected.name))
        for name, value in given.items():
            if name in known.constants:
                if value != known.constants[name]:
                    raise ValueError(
                        f"{name} is {value!r} but the file was exported with {known.constants[name]!r}; export the "
                        "model again with another example"
                    )
            elif name not in known.ignored and value is not None:
                raise TypeError(
                    f"{name} is no input of this file, which takes {', '.join(t.name for t in known.inputs)}; leave it "
                    "out, or export the model again with an example that has it"
                )
        return tensors

    def _check(self, arrays: Sequence[Array]) -> int:
        """Refuse what the file does not take; returns the number of rows."""
        sizes: dict[str, int] = {}
        for array, expected, dtype in zip(arrays, self.description.inputs, self._dtypes, strict=True):
            if array.dtype != dtype:
                raise TypeError(f"{expected.name} is {array.dtype} but the file takes {dtype}; convert it")
            if array.ndim != len(expected.shape):
                raise _other_shape(expected, array)
            for size, wanted in zip(array.shape, expected.shape, strict=True):
                if isinstance(wanted, str):
                    if sizes.setdefault(wanted, size) != size:
                        raise ValueError(
                            f"{expected.name} has shape {array.shape}, where another input has {sizes[wanted]} for the "
                            f"same size {wanted}; give both the same"
                        )
                elif size != wanted:
                    raise _other_shape(expected, array)
        for name, (least, largest) in self.description.ranges.items():
            size = sizes[name]
            if size < least or (largest is not None and size > largest):
                raise ValueError(
                    f"size {name} is {size}, and the model takes from {least} to {largest or 'any'}; pad or cut it"
                )
        return sizes.get(BATCH, 1)


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Refuse a path where no file is.

    Raises:
        FileNotFoundError: then.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)} is no file; give the path that cet.export wrote")


def _other_shape(expected: Input, array: Array) -> ValueError:
    shape = ", ".join(map(str, expected.shape))
    fix = ""
    fits = [isinstance(size, str) or size == n for size, n in zip(expected.shape[1:], array.shape[1:], strict=False)]
    if expected.shape[:1] == (1,) and array.ndim == len(expected.shape) and all(fits):
        fix = " for one row at a time; export with batch='dynamic' for more"
    return ValueError(f"{expected.name} has shape {array.shape} but the file takes ({shape}){fix or '; reshape it'}")


def _to_array(expected: Input, value: Any) -> Array:
    """A tensor's memory as an array."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{expected.name} is a masked array, whose mask would be lost; fill it")
    if isinstance(value, np.ndarray):
        return value
    if type(value).__module__.partition(".")[0] != "torch" or not hasattr(value, "detach"):
        fix = _AS_NAMES if isinstance(value, Mapping) else "give a NumPy array or a tensor"
        raise TypeError(f"{expected.name} is {type(value).__name__}; {fix}")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != expected.dtype:
        raise TypeError(f"{expected.name} is {dtype} but the file takes {expected.dtype}; convert it")
    if value.is_meta or value.is_nested or str(value.layout) != "torch.strided":
        kind = "on the meta device" if value.is_meta else f"nested or {str(value.layout).removeprefix('torch.')}"
        raise TypeError(f"{expected.name} is {kind}; give a dense tensor that holds numbers")
    return cast(Array, value.detach().cpu().resolve_neg().numpy())


def _by_parameter(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The arguments of a call by the names of the parameters."""
    for index, value in enumerate(args):
        name = parameters[index] if index < len(parameters) else ""
        if name.startswith("*"):
            yield name[1:], tuple(args[index:])
            break
        if not name or name in kwargs:
            problem = f"{name} is given twice" if name else f"{len(args)} inputs are given by position"
            raise TypeError(f"{problem}; the model takes {', '.join(parameters)}")
        yield name, value
    yield from kwargs.items()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a nested argument holds, under the names that the description has for it."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _leaves(f"{name}[{key!r}]", value[key])
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(f"{name}[{index}]", part)
    else:
        yield name, value
