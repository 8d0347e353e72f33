"""Checks a program against the backbone that it was cut from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cet.partition.inputs import EXAMPLE_ROWS, InputFormat
from cet.partition.stages import CutError, Program, logits_of


def verify(
    program: Program,
    backbone: nn.Module,
    exits: Sequence[str],
    input_format: InputFormat,
    inputs: Sequence[Any],
    expected: Tensor,
) -> None:
    """Run the stages beside the backbone: all rows, and each row alone from each cut on.

    Args:
        program: the stages.
        backbone: for errors.
        exits: for errors.
        input_format: the format of the inputs.
        inputs: of ``EXAMPLE_ROWS`` rows.
        expected: the backbone's logits for them.

    Raises:
        CutError: when they disagree, which they do when the backbone mixes the rows of a batch or writes to values
            that cross an exit.
    """
    inputs = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    sizes = program.input_sizes(inputs)
    values: Sequence[Any] = program.entry_values(inputs)
    *early, last = program.stages
    dims: Sequence[int | None] = [0 if input_format.is_batched[index] else None for index in program.entry]
    name = type(backbone).__name__
    _verify_single_rows(program, name, 0, "", values, dims, sizes, expected)
    for k, stage in enumerate(early):
        _, *values = stage.run(EXAMPLE_ROWS, *sizes, *values)
        _verify_single_rows(program, name, k + 1, f" behind exit {exits[k]!r}", values, stage.row_dims, sizes, expected)
    _compare(name, last.run(EXAMPLE_ROWS, *sizes, *values), expected, "run in one piece")


def _verify_single_rows(
    program: Program,
    name: str,
    start: int,
    where: str,
    values: Sequence[Any],
    dims: Sequence[int | None],
    sizes: list[int],
    expected: Tensor,
) -> None:
    for row in range(EXAMPLE_ROWS):
        alone: Sequence[Any] = [
            value if dim is None else value.narrow(dim, row, 1) for value, dim in zip(values, dims, strict=True)
        ]
        alone = [value.clone() if isinstance(value, Tensor) else value for value in alone]  # stages may write to them
        try:
            for stage in program.stages[start:-1]:
                _, *alone = stage.run(1, *sizes, *alone)
            logits = program.stages[-1].run(1, *sizes, *alone)
        except RuntimeError as error:
            raise CutError(
                f"{name} fails for one row{where} ({str(error).splitlines()[0]}); its code must work for any number "
                "of rows"
            ) from error
        _compare(name, logits, expected[row : row + 1], f"when a row goes on alone{where}")


def refuse_mixed_rows(backbone: nn.Module, input_format: InputFormat, inputs: Sequence[Any], reason: str) -> None:
    """Run a backbone that cannot be cut on all rows and on each alone, unless it is random.

    Raises:
        ValueError: when a row's logits depend on the other rows.
    """

    def logits(chosen: slice) -> Tensor:
        rows = [
            value[chosen].clone() if batched else value.clone() if isinstance(value, Tensor) else value
            for value, batched in zip(inputs, input_format.is_batched, strict=True)
        ]
        args, kwargs = input_format.unflatten(rows)
        return logits_of(backbone(*args, **kwargs))

    together = logits(slice(None))
    if not is_close(logits(slice(None)), together):
        return
    alone = torch.cat([logits(slice(row, row + 1)) for row in range(EXAMPLE_ROWS)])
    if not is_close(alone, together):
        raise ValueError(
            f"the rows of a batch depend on each other, perhaps because {reason}; let each row be answered alone"
        )


def is_close(got: Tensor, expected: Tensor) -> bool:
    """Whether two answers differ by rounding at most, judged by the largest of the expected."""
    if got.shape != expected.shape:
        return False
    scale = float(expected.float().abs().nan_to_num(0, 0, 0).max().clamp(min=0.1)) if expected.numel() else 1.0
    tolerance = scale * min(64 * torch.finfo(expected.dtype).eps ** 0.75, 0.125)
    return torch.allclose(got.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)


def _compare(name: str, got: Tensor, expected: Tensor, when: str) -> None:
    if not is_close(got, expected):
        raise CutError(
            f"the stages of {name} answer otherwise than the backbone {when}, as they do where it mixes rows, changes "
            "values in place across an exit, is random or keeps state; let each row depend on itself alone"
        )
