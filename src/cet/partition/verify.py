"""Checks a program against the backbone that it was cut from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cet.partition.fingerprint import ExitHook
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
        backbone: whose precision counts, and whose name errors say.
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
    _verify_single_rows(program, backbone, 0, "", values, dims, sizes, expected)
    for k, stage in enumerate(early):
        _, *values = stage.run(EXAMPLE_ROWS, *sizes, *values)
        where = f" behind exit {exits[k]!r}"
        _verify_single_rows(program, backbone, k + 1, where, values, stage.row_dims, sizes, expected)
    _compare(backbone, last.run(EXAMPLE_ROWS, *sizes, *values), expected, "run in one piece")


def _verify_single_rows(
    program: Program,
    backbone: nn.Module,
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
                f"{type(backbone).__name__} fails for one row{where} ({str(error).splitlines()[0]}); its code must "
                "work for any number of rows"
            ) from error
        _compare(backbone, logits, expected[row : row + 1], f"when a row goes on alone{where}")


class DependentRowsError(CutError):
    """A row's answer depends on the other rows of its batch, or on chance."""


class ObservedError(CutError):
    """A backbone answers otherwise when it is asked what its exits return."""


class _Onlooker(ExitHook):
    """A hook that does nothing."""

    def __call__(self, *_: Any) -> None: ...


def refuse_mixed_rows(
    backbone: nn.Module, input_format: InputFormat, inputs: Sequence[Any], reason: str, *, may_be_random: bool
) -> None:
    """Run a backbone on all rows and on each alone.

    Raises:
        DependentRowsError: when a row's logits depend on the other rows, or differ from call to call.
    """

    def logits(chosen: slice) -> Tensor:
        return _logits(backbone, input_format, inputs, chosen)

    together = logits(slice(None))
    dtype = coarsest_dtype(backbone)
    if not is_close(logits(slice(None)), together, dtype):
        if may_be_random:
            return
        raise DependentRowsError(
            f"{type(backbone).__name__} answers otherwise each time, as it is random or keeps state; let each row "
            "depend on itself alone"
        )
    alone = torch.cat([logits(slice(row, row + 1)) for row in range(EXAMPLE_ROWS)])
    if not is_close(alone, together, dtype):
        raise DependentRowsError(
            f"the rows of a batch depend on each other, perhaps because {reason}; let each row depend on itself alone"
        )


def refuse_observed(
    backbone: nn.Module, exits: Sequence[str], input_format: InputFormat, inputs: Sequence[Any]
) -> None:
    """Run a backbone with and without hooks on its exits.

    Raises:
        ObservedError: when its logits differ, unless they differ from call to call.
    """

    def logits() -> Tensor:
        return _logits(backbone, input_format, inputs, slice(None))

    with ExitStack() as hooks:
        for path in exits:
            hooks.callback(backbone.get_submodule(path).register_forward_hook(_Onlooker()).remove)
        observed = logits()
    expected = logits()
    dtype = coarsest_dtype(backbone)
    if not is_close(observed, expected, dtype) and is_close(logits(), expected, dtype):
        raise ObservedError(
            f"{type(backbone).__name__} answers otherwise when its exits are observed by hooks, as "
            "nn.TransformerEncoderLayer does with an adapter or a replaced submodule, which its fused kernel passes "
            "over; call torch.backends.mha.set_fastpath_enabled(False)"
        )


def _logits(backbone: nn.Module, input_format: InputFormat, inputs: Sequence[Any], chosen: slice) -> Tensor:
    rows = [
        value[chosen].clone() if batched else value.clone() if isinstance(value, Tensor) else value
        for value, batched in zip(inputs, input_format.is_batched, strict=True)
    ]
    args, kwargs = input_format.unflatten(rows)
    return logits_of(backbone(*args, **kwargs))


def _by_stages(program: Program, inputs: Sequence[Any]) -> Tensor:
    sizes, values = program.input_sizes(inputs), program.entry_values(inputs)
    for stage in program.stages[:-1]:
        values = list(stage.run(EXAMPLE_ROWS, *sizes, *values)[1:])
    logits: Tensor = program.stages[-1].run(EXAMPLE_ROWS, *sizes, *values)
    return logits


def answers_alike(
    program: Program, backbone: nn.Module, input_format: InputFormat, inputs: Sequence[Any], dtype: torch.dtype
) -> bool:
    """Whether stages and backbone agree in their logits in the caller's mode, which computes in ``dtype``."""
    expected = _logits(backbone, input_format, inputs, slice(None))
    try:
        got = _by_stages(program, [value.clone() if isinstance(value, Tensor) else value for value in inputs])
    except RuntimeError:
        return False
    return is_close(got, expected, dtype)


def has_same_gradients(program: Program, backbone: nn.Module, input_format: InputFormat, inputs: Sequence[Any]) -> bool:
    """Whether stages and backbone agree in their logits and in the gradients of inputs and parameters."""

    def answer(run: Callable[[Sequence[Any]], Tensor]) -> list[Tensor | None]:
        given = [
            value.detach().clone().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value
            for value in inputs
        ]
        # Of values that do not change what is given, even where the backbone changes its inputs in place.
        logits = run([value.clone() if isinstance(value, Tensor) else value for value in given])
        sources = [v for v in (*given, *backbone.parameters()) if isinstance(v, Tensor) and v.requires_grad]
        if not logits.requires_grad:
            return [logits, *[None] * len(sources)]
        weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
        return [logits, *torch.autograd.grad((logits * weights).sum(), sources, allow_unused=True)]

    def by_backbone(given: Sequence[Any]) -> Tensor:
        args, kwargs = input_format.unflatten(given)
        return logits_of(backbone(*args, **kwargs))

    try:
        with torch.enable_grad():
            pairs = list(zip(answer(partial(_by_stages, program)), answer(by_backbone), strict=True))
    except RuntimeError:  # of a backbone without gradients, who asks for them is told by itself
        return False
    for got, expected in pairs:
        if got is None or expected is None:
            other = expected if got is None else got
            if other is not None and bool(other.any()):
                return False
        elif not is_close(got.detach(), expected.detach(), coarsest_dtype(backbone)):
            return False
    return True


def coarsest_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype among the parameters that rounds most; float64 where there is none."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def is_close(got: Tensor, expected: Tensor, computed_in: torch.dtype = torch.float64) -> bool:
    """Whether two answers differ by rounding at most, judged by the largest of the expected, and by the dtype that they
    were computed in if that rounds more than their own."""
    if got.shape != expected.shape:
        return False
    scale = float(expected.float().abs().nan_to_num(0, 0, 0).max().clamp(min=0.1)) if expected.numel() else 1.0
    rounding = max(torch.finfo(expected.dtype).eps, torch.finfo(computed_in).eps)
    tolerance = scale * min(64 * rounding**0.75, 0.125)
    return torch.allclose(got.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)


def _compare(backbone: nn.Module, got: Tensor, expected: Tensor, when: str) -> None:
    if not is_close(got, expected, coarsest_dtype(backbone)):
        raise CutError(
            f"the stages of {type(backbone).__name__} answer otherwise than the backbone {when}, as they do where it "
            "mixes rows, changes values in place across an exit, is random or keeps state; let each row depend on "
            "itself alone"
        )
