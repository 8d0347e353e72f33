"""Labelled batches: what a loader may yield, and what labels may be.

The loss, calibration, the Lightning module and the recipes share one rule. A batch is

- a pair ``(x, y)``, where ``x`` is a tensor, a tuple of positional inputs or a dict of keyword inputs;
- a longer tuple, such as ``(x, mask, y)``: the last item is ``y``, all others are positional inputs;
- a dict, or any other mapping, as the collators of Hugging Face make them: ``labels``, ``label`` or ``y`` is ``y``, all
  other entries are keyword inputs;
- anything else with ``batch_fn(batch)``, which returns a pair ``(x, y)``.

``y`` holds one class index per row, -100 for a row without a label; see :func:`class_indices` for what else is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = Any
BatchFn = Callable[[Any], tuple[Inputs, Any]]

UNLABELLED = -100
"""The label of a row that has none."""

LABEL_KEYS = ("labels", "label", "y")


def call(function: Callable[..., Any], x: Inputs) -> Any:
    """A model, or a method of one, called with the inputs of one batch."""
    args, kwargs = as_call(x)
    return function(*args, **kwargs)


def as_call(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that the inputs of one batch are."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x) if isinstance(x, tuple | list) else (x,)), {}


def split_batch(batch: Any, batch_fn: BatchFn | None = None) -> tuple[Inputs, Any]:
    """Inputs and labels of one batch, by the rule of this module; neither is checked yet.

    Args:
        batch: what a loader yields.
        batch_fn: takes the batch apart instead: ``batch_fn(batch) -> (x, y)``.

    Returns:
        ``x``, a plain dict where it is a mapping, and ``y``.

    Raises:
        TypeError: for a batch that the rule does not cover.
    """
    if batch_fn is not None:
        _check_batch_fn(batch_fn)
        batch = batch_fn(batch)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"batch_fn returns {_kind(batch)}; return a pair (x, y)")
        x, y = batch
    elif isinstance(batch, Mapping):
        x, y = _split_mapping(dict(batch))
    elif isinstance(batch, tuple | list) and len(batch) >= 2:
        x, y = batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]
    else:
        raise TypeError(f"a batch is {_kind(batch)} without labels; {_FIX}")
    return dict(x) if isinstance(x, Mapping) else x, y


def class_indices(x: Inputs, y: Any, num_classes: int | None, whose: str = "") -> Tensor:
    """The labels of a batch as class indices, ``(B,)`` int64.

    These are taken: integers ``(B,)`` of any size and booleans; one-hot rows ``(B, K)``; and, for two classes, 0 and 1
    of any dtype and of shape ``(B,)`` or ``(B, 1)``, as binary cross-entropy takes them. The values of int64 labels
    ``(B,)`` on a GPU are not looked at, because that would wait for the device, nor are those in a graph that
    ``torch.compile`` records; those of other labels are.

    Args:
        x: the inputs, of which at least one tensor has ``B`` rows.
        y: the labels.
        num_classes: ``K``; None when it is not known.
        whose: put before the names in errors, such as ``"the loader's "``.

    Raises:
        TypeError: for inputs without a tensor, and for labels that name no class, such as regression targets, soft
            labels and several labels per row.
        ValueError: for labels of another length than the inputs, or out of range.
    """
    lengths = _lengths(x, whose)
    if not isinstance(y, Tensor) or y.is_complex():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{whose}y is {got}; give class indices as an int64 tensor")
    num_rows = y.shape[0] if y.ndim and y.shape[0] in lengths else lengths[0]  # the first tensor may be a shared one
    if y.ndim == 2 and y.shape[0] == num_rows and y.shape[1] > 1 and num_classes in (None, y.shape[1]):
        return _from_one_hot(y, whose)
    if y.shape == (num_rows, 1) and num_classes == 2:
        y = y.squeeze(1)
    if y.shape != (num_rows,):
        fix = f"give shape ({num_rows},)"
        if y.shape == (num_rows, 1):
            fix += ", y.squeeze(1)"
        elif y.ndim > 1:
            fix += ", one class per sample: cet does no segmentation and no tagging"
        raise ValueError(f"{whose}y has shape {tuple(y.shape)} for {num_rows} rows of x; {fix}")
    if y.is_floating_point():
        _check_whole(y, num_classes, whose)
    indices: Tensor = y.long()
    if torch.compiler.is_dynamo_compiling():  # a graph holds no values
        return indices
    if num_classes is not None and (y.device.type == "cpu" or indices is not y):
        outside = indices[(indices != UNLABELLED) & ((indices < 0) | (indices >= num_classes))]
        if outside.numel():
            raise ValueError(
                f"{whose}y holds the label {int(outside[0])} for {num_classes} classes; give labels in "
                f"[0, {num_classes}), or {UNLABELLED} for a row without one"
            )
    return indices


def check_batch(x: Inputs, y: Any, num_classes: int | None, whose: str = "") -> int:
    """The number of rows of a batch whose labels must be class indices already; see :func:`class_indices`.

    Raises:
        TypeError: for inputs without a tensor, and labels that are not int64.
        ValueError: for labels of another shape than ``(B,)``, or out of range.
    """
    if class_indices(x, y, num_classes, whose) is not y:
        raise TypeError(f"{whose}y is {y.dtype} {tuple(y.shape)}; give class indices (B,) as an int64 tensor")
    return len(y)


def read_batches(
    loader: Iterable[Any], num_classes: int | None, batch_fn: BatchFn | None = None
) -> Iterator[tuple[Inputs, Tensor]]:
    """The batches of a loader: inputs as the loader gives them, and labels as class indices on the CPU.

    Args:
        loader: yields batches, see :func:`split_batch`. Nothing is read before the first batch is asked for.
        num_classes: ``K``; None when it is not known.
        batch_fn: see :func:`split_batch`.

    Raises:
        TypeError: at once, for a loader that is no iterable of batches.
        TypeError, ValueError: when a batch comes that :func:`split_batch` or :func:`class_indices` refuses.
    """
    _check_loader(loader)
    if batch_fn is not None:
        _check_batch_fn(batch_fn)
    return _read(loader, num_classes, batch_fn)


def _read(loader: Iterable[Any], num_classes: int | None, batch_fn: BatchFn | None) -> Iterator[tuple[Inputs, Tensor]]:
    for batch in loader:
        x, y = split_batch(batch, batch_fn)
        if isinstance(y, int | float) or (isinstance(y, Tensor) and y.ndim == 0):
            raise TypeError(
                f"the loader yields single samples, y is {type(y).__name__} without a batch dimension; give "
                "torch.utils.data.DataLoader(dataset, batch_size=64)"
            )
        try:
            y = class_indices(x, y.cpu() if isinstance(y, Tensor) else y, num_classes, "the loader's ")
        except (TypeError, ValueError) as error:
            if batch_fn is None and isinstance(batch, tuple | list) and len(batch) > 2:
                hint = f"the last of {len(batch)} items is taken for y, for another order give batch_fn"
                raise type(error)(f"{error}; {hint}") from None
            raise
        yield x, y


_FIX = "make the loader yield (x, y) or a dict with 'labels', or give batch_fn, batch -> (x, y)"


def _split_mapping(batch: dict[Any, Any]) -> tuple[Inputs, Any]:
    present = [key for key in LABEL_KEYS if key in batch]
    keys = f"dict with the keys {', '.join(map(repr, batch))}"
    if not present:
        raise TypeError(f"a batch is {keys} without labels; {_FIX}")
    if len(present) > 1:
        raise TypeError(f"a batch has both {' and '.join(map(repr, present))}; give batch_fn, batch -> (x, y)")
    if len(batch) == 1:
        raise TypeError(f"a batch is {keys} without inputs; {_FIX}")
    y = batch.pop(present[0])
    return batch, y


def _check_batch_fn(batch_fn: Any) -> None:
    if not callable(batch_fn):
        raise TypeError(f"batch_fn is {batch_fn!r}; give a function batch -> (x, y), or None")


def _check_loader(loader: Any) -> None:
    fix = "give an iterable of batches, such as"
    if isinstance(loader, tuple | list) and len(loader) > 1 and all(isinstance(item, Tensor) for item in loader):
        raise TypeError(f"loader is one batch; {fix} [(x, y)]")
    # A dataset may have items without being Iterable.
    iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, str | bytes | Tensor | Mapping):
        is_plain = loader is None or isinstance(loader, str | bytes | int | float)
        got = repr(loader) if is_plain else f"a {type(loader).__name__}"
        raise TypeError(f"loader is {got}; {fix} a torch.utils.data.DataLoader")


def _lengths(x: Inputs, whose: str) -> list[int]:
    """The first dimensions of the tensors in ``x``."""
    leaves = pytree.tree_leaves(dict(x) if isinstance(x, Mapping) else x)
    lengths = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not lengths:
        raise TypeError(f"{whose}x is {type(x).__name__} without a tensor; give a tensor, a tuple or a dict of tensors")
    return lengths


def _from_one_hot(y: Tensor, whose: str) -> Tensor:
    """Class indices of ``(B, K)`` labels, each row of which must have a single 1 and zeros."""
    is_one = y == 1
    labels_per_row = is_one.sum(dim=1)
    is_binary = bool((is_one | (y == 0)).all())
    if is_binary and bool((labels_per_row == 1).all()):
        return is_one.int().argmax(dim=1)
    own_loss = "or compute a loss of your own from the logits that the model gives in train mode"
    if is_binary and bool((labels_per_row > 1).any()):
        raise TypeError(
            f"{whose}y holds several labels per row; multi-label samples have no one class to leave with: give one "
            f"class index per row, {own_loss}"
        )
    if is_binary:
        raise TypeError(
            f"{whose}y holds a row without a label; give class indices (B,), with {UNLABELLED} for a row without one"
        )
    if y.is_floating_point() and torch.allclose(y.float().sum(dim=1), torch.ones(len(y), device=y.device), atol=1e-2):
        raise TypeError(f"{whose}y holds soft labels; give the most likely class, y.argmax(dim=1), {own_loss}")
    raise TypeError(f"{whose}y has shape {tuple(y.shape)} but is not one-hot; give class indices (B,), {own_loss}")


def _check_whole(y: Tensor, num_classes: int | None, whose: str) -> None:
    """Floating-point labels may only be 0 and 1 of two classes; other whole numbers are class indices by mistake."""
    fraction = y[y != y.round()]  # NaN is one too
    if fraction.numel():
        raise TypeError(
            f"{whose}y holds {fraction[0].item():.6g}, which is no class index; cet does no regression: give class "
            "indices as an int64 tensor, such as torch.bucketize(y, boundaries)"
        )
    if num_classes != 2 or not bool(((y == 0) | (y == 1) | (y == UNLABELLED)).all()):
        raise TypeError(f"{whose}y is {y.dtype}; give class indices by y.long()")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{name} of {len(value)}" if isinstance(value, tuple | list) else name
