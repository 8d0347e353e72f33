"""Labelled batches ``(x, y)``, as the loss and calibration take them.

``x`` is a tensor, a tuple of positional inputs or a dict of keyword inputs; ``y`` holds class indices, -100 for a row
without a label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cet.ops.consistent_exit_loss import UNLABELLED

Inputs = Any


def call(function: Callable[..., Any], x: Inputs) -> Any:
    """A model, or a method of one, called with the inputs of one batch."""
    if isinstance(x, Mapping):
        return function(**x)
    return function(*x) if isinstance(x, tuple | list) else function(x)


def check_batch(x: Inputs, y: Any, num_classes: int | None, whose: str = "") -> int:
    """The number of rows of a batch, after its labels were checked.

    Labels on a GPU are checked for type and shape only: a look at their values would wait for the device.

    Args:
        x: the inputs.
        y: the labels.
        num_classes: the labels' upper bound; None when not known.
        whose: put before the names in errors, such as ``"the loader's "``.

    Raises:
        TypeError: for inputs without a tensor, and labels that are not int64.
        ValueError: for labels of another length than the inputs, or out of range.
    """
    leaves = pytree.tree_leaves(dict(x) if isinstance(x, Mapping) else x)
    rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    if rows is None:
        raise TypeError(f"{whose}x is {type(x).__name__} without a tensor; give a tensor, a tuple or a dict of tensors")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{whose}y is {got}; give class indices as an int64 tensor")
    if y.shape != (rows,):
        raise ValueError(f"{whose}y has shape {tuple(y.shape)} for {rows} rows of x; give shape ({rows},)")
    if num_classes is not None and y.device.type == "cpu":
        outside = y[(y != UNLABELLED) & ((y < 0) | (y >= num_classes))]
        if outside.numel():
            raise ValueError(
                f"{whose}y holds the label {int(outside[0])} for {num_classes} classes; give labels in "
                f"[0, {num_classes}), or {UNLABELLED} for a row without one"
            )
    return rows
