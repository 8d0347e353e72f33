"""Models at work on labelled data, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.data.batches import call

Batch = tuple[Any, Tensor]
"""Inputs, a tensor, a tuple or a dict of tensors ``(B, ...)``, and labels ``(B,)`` int64."""


class DataError(ValueError):
    """A model cannot run the data."""

    exit_code = 21


def batches_of(data: Batch, size: int) -> list[Batch]:
    """Cut into batches of exactly ``size``; a shorter rest is left out.

    Raises:
        DataError: when there are fewer samples than that.
    """
    rows = data[1].shape[0]
    if rows < size:
        raise DataError(f"the data hold {rows} samples, too few for a batch of {size}; give more, or a smaller batch")

    def rows_from(start: int) -> Batch:
        batch: Batch = pytree.tree_map_only(Tensor, lambda leaf: leaf[start : start + size], data)
        return batch

    return [rows_from(start) for start in range(0, rows - size + 1, size)]


def batches_for(model: nn.Module, data: Batch, size: int, *, model_name: str, data_name: str) -> list[Batch]:
    """As :func:`batches_of`, on the model's device; each runs once, so that data that do not fit are refused at once.

    Args:
        model: in eval mode.
        data: what to cut.
        size: rows of a batch.
        model_name: of the model in errors, such as ``"--model mynet:build"``.
        data_name: of the data, such as ``"--data mynet:test_set"``.

    Raises:
        DataError: when there are too few samples, and when the model fails on them or answers with NaN: a sample whose
            score is NaN leaves at no early exit.
    """
    device = device_of(model)
    batches = batches_of(pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), data), size)
    for x, _ in batches:
        try:
            with torch.no_grad():
                answer = call(model, x)
        except (Exception, SystemExit) as error:  # whatever the user's own model raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(
                f"{model_name} cannot run what {data_name} gives, {_described(x)}; give what the model takes ({reason})"
            ) from error
        if any(isinstance(leaf, Tensor) and leaf.isnan().any() for leaf in pytree.tree_leaves(answer)):
            raise DataError(
                f"{model_name} answers with NaN to what {data_name} gives, {_described(x)}; give data without NaN"
            )
    return batches


def runner(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], None]:
    """A function that runs the model over all batches, without gradients."""

    @torch.no_grad()
    def run() -> None:
        for x, _ in batches:
            call(model, x)

    return run


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are; the CPU if it has none."""
    weight = next(model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def _described(x: Any) -> str:
    """Shapes and dtypes of inputs, such as ``x (32, 6) float32``."""
    return ", ".join(
        f"x{pytree.keystr(path)} {tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        for path, leaf in pytree.tree_leaves_with_path(x)
        if isinstance(leaf, Tensor)
    )
