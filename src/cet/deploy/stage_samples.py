"""What stages take of samples, by which the scales of int8 are set, and which samples are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from cet.data.batches import as_call
from cet.deploy.check import parts_of
from cet.deploy.description import ExportError, reason_of
from cet.deploy.segments import ExportedStages
from cet.deploy.stage_modules import StageModule

Taken = Sequence[tuple[Tensor, ...]]
"""The tensors that each stage takes, in the order of its inputs."""


@torch.no_grad()
def taken_of(
    modules: Sequence[StageModule], stages: ExportedStages, batches: Iterable[Any], rows: int | None
) -> Iterator[Taken]:
    """What float32 stages, one after the other, take of these inputs of calls where no row leaves.

    Args:
        modules: the stages.
        stages: that they were made from.
        batches: the inputs of calls.
        rows: how many the stages take at once at most.

    Raises:
        ExportError: where the model fails on a batch, or answers with what is not finite.
    """
    for given in calls_of(stages, batches, rows):
        values = dict(zip(stages.input_format.names, given, strict=True))
        with blaming_samples():
            taken = [_taken(module, values) for module in modules]
        yield taken


def _taken(stage: StageModule, values: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that a stage takes; those that it makes are put among the values."""
    given = tuple(values[name].detach().cpu() for name in stage.entry.inputs)
    answers = stage.module(*given)
    logits, *others = answers if isinstance(answers, tuple) else (answers,)
    refuse_not_finite(logits, stage.title)
    values.update(zip(stage.entry.outputs, others[1:], strict=True))
    return given


def calls_of(stages: ExportedStages, batches: Iterable[Any], rows: int | None) -> Iterator[list[Any]]:
    """The tensors of these inputs of calls, in calls of at most so many rows."""
    for x in batches:
        args, kwargs = as_call(x)
        yield from parts_of(stages.input_format.flatten(args, kwargs), stages.input_format.is_batched, rows)


@contextmanager
def blaming_samples() -> Iterator[None]:
    """Where the model fails within, say that the samples are to blame."""
    try:
        yield
    except RuntimeError as error:
        raise ExportError(
            f"the model fails on a batch of quantize ({reason_of(error)}); give samples that it takes"
        ) from error


def refuse_not_finite(logits: Tensor, title: str) -> None:
    """One infinity would set the scale of all."""
    if not logits.isfinite().all():
        raise ExportError(
            f"{title} answers a batch of quantize with values that are not finite; leave such samples out"
        )


def refuse_nothing_to_quantise(what: Sequence[str]) -> NoReturn:
    """Say that there is nothing to quantise.

    Raises:
        ExportError: always.
    """
    raise ExportError(f"the stages hold none of {', '.join(what)}, so there is nothing to quantise; leave quantize out")
