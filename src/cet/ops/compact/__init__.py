"""Compaction: the rows that go on are moved together in their order, those that leave are written to the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cet.ops.backend import is_tracing, needs_grad, no_tensor, traced_backend
from cet.ops.compact import cpp, triton
from cet.ops.compact.definition import (
    Compaction,
    RowOrder,
    compact_definition,
    gather_definition,
    memory_order,
    scatter_rows_definition,
)
from cet.ops.definitions import MAX_ROWS
from cet.ops.registration import GRADIENT, Choice, Operation, explained_by

__all__ = ["Compaction", "RowOrder", "compact", "memory_order", "scatter_rows"]


COMPACT = Operation("compact", definition=compact_definition, kernels={"cpp": cpp.compact, "triton": triton.compact})


def _choose_compact(exit_mask: Tensor, tensors: Sequence[Tensor]) -> Choice:
    choice = COMPACT.dispatch((exit_mask, *tensors))
    if choice.backend == "triton" and needs_grad(tensors):
        return Choice("compact", "reference", "definition").but("definition", GRADIENT)
    return choice


def _recorded_compact(exit_mask: Tensor, tensors: list[Tensor], dims: list[int]) -> list[Tensor]:
    """Indices and tensors in one list, of memory that they share neither with each other nor with what is given."""
    choice = _choose_compact(exit_mask, tensors)
    if choice.backend == "cpp":
        kept, exited, moved = cpp.compact(exit_mask, tensors, dims, may_alias=False)
    else:
        kept, exited, moved = COMPACT.run[choice.backend](exit_mask, tensors, dims)
    return [kept, exited.clone(), *moved]


def _fake_compact(exit_mask: Tensor, tensors: list[Tensor], dims: list[int]) -> list[Tensor]:
    context = torch.library.get_ctx()
    kept, exited = (exit_mask.new_empty((context.new_dynamic_size(),), dtype=torch.int64) for _ in range(2))
    torch._check(kept.shape[0] + exited.shape[0] == exit_mask.shape[0])  # type: ignore[no-untyped-call]
    return [kept, exited, *(gather_definition(tensor, dim, kept) for tensor, dim in zip(tensors, dims, strict=True))]


COMPACT.record_as(
    "(Tensor exit_mask, Tensor[] tensors, SymInt[] dims) -> Tensor[]", run=_recorded_compact, fake=_fake_compact
)


def _explain_compact(exit_mask: Tensor, tensors: Sequence[Tensor], dims: Sequence[int] | None) -> Choice:
    _check_exit_mask(exit_mask)
    check_rows("compact", exit_mask.shape[0], exit_mask.device, tensors, dims or (0,) * len(tensors))
    choice = _choose_compact(exit_mask, tensors)
    return choice.but(choice.way, GRADIENT) if choice.backend == "cpp" and needs_grad(tensors) else choice


@explained_by(_explain_compact)
def compact(exit_mask: Tensor, tensors: Sequence[Tensor], dims: Sequence[int] | None = None) -> Compaction:
    """Keep the rows that do not leave, in their order.

    The outputs keep the memory layout of the inputs (a channels-last tensor stays channels-last, a transposed one
    transposed), because later operations may rely on it, as ``view`` does, or be faster with it, as convolutions are.
    Where all rows are kept, an eager call may return the tensors themselves. Gradients flow through the tensors; where
    they are needed, PyTorch's operations move the rows.

    Args:
        exit_mask: ``(B,)`` bool, true for the rows that leave.
        tensors: any number of tensors of any dtype with ``B`` rows each.
        dims: for each tensor the dimension that holds the rows; 0 for all when not given.

    Raises:
        ValueError: when a tensor has another number of rows or is on another device than ``exit_mask``, or ``dims``
            does not name a dimension of each tensor.
        TypeError: for an exit mask of another dtype.
    """
    if dims is None:
        dims = (0,) * len(tensors)
    _check_exit_mask(exit_mask)
    check_rows("compact", exit_mask.shape[0], exit_mask.device, tensors, dims)
    compaction: Compaction
    if not is_tracing():
        compaction = COMPACT.run[_choose_compact(exit_mask, tensors).backend](exit_mask, tensors, dims)
    elif traced_backend(exit_mask.device.type) != "reference" and not needs_grad(tensors):
        kept, exited, *moved = COMPACT.recorded(exit_mask, list(tensors), list(dims))
        compaction = Compaction(kept, exited, moved)
    else:
        compaction = compact_definition(exit_mask, tensors, dims)
    return compaction


def _check_exit_mask(exit_mask: Tensor) -> None:
    if not isinstance(exit_mask, Tensor):
        raise no_tensor("compact", "exit_mask", exit_mask)
    if exit_mask.dtype is not torch.bool:
        raise TypeError(f"compact: exit_mask is {exit_mask.dtype}; give bool")
    if exit_mask.ndim != 1 or exit_mask.shape[0] > MAX_ROWS:
        raise ValueError(f"compact: exit_mask has shape {tuple(exit_mask.shape)}; give (B,), at most 2^30 rows")


def check_rows(op: str, rows: int, device: torch.device, tensors: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Refuse tensors that do not hold so many rows where ``dims`` names a dimension."""
    if len(dims) != len(tensors):
        raise ValueError(f"{op}: {len(dims)} dims for {len(tensors)} tensors; give one per tensor")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise no_tensor(op, f"tensors[{index}]", tensor)
        dim = dims[index]
        if not 0 <= dim < tensor.ndim or tensor.shape[dim] != rows:
            raise ValueError(
                f"{op}: tensors[{index}] has shape {tuple(tensor.shape)}, whose dimension {dim} does not hold {rows} "
                "rows; give tensors with one row per sample, and in dims, counted from 0, where they are"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: tensors[{index}] is on {tensor.device}, the exit mask on {device}; move one")


SCATTER_ROWS = Operation(
    "scatter_rows",
    definition=scatter_rows_definition,
    kernels={"cpp": cpp.scatter_rows, "triton": triton.scatter_rows},
)


def _choose_scatter(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> Choice:
    tensors = (output, rows, index) if positions is None else (output, rows, index, positions)
    choice = SCATTER_ROWS.dispatch(tensors)
    if choice.backend == "reference":
        return choice
    reason = None
    if not all(tensor.is_contiguous() for tensor in tensors):
        reason = "a tensor is not contiguous"
    elif rows.dtype != output.dtype:
        reason = f"rows are {rows.dtype} and output is {output.dtype}"
    elif output.is_inference() and not torch.is_inference_mode_enabled():
        reason = "output is a tensor of the inference mode, which PyTorch refuses to change outside"
    elif needs_grad((output, rows)):
        reason = GRADIENT
    return choice if reason is None else Choice("scatter_rows", "reference", "definition").but("definition", reason)


def _scatter_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    backend = _choose_scatter(output, rows, index, positions).backend
    SCATTER_ROWS.run[backend](output, rows, index, positions)
    if backend != "reference" and not output.is_inference():
        increment_version(output)


SCATTER_ROWS.record_as(
    "(Tensor(a!) output, Tensor rows, Tensor index, Tensor? positions) -> ()",
    run=_scatter_rows,
    fake=lambda *_: None,
    mutates=("output",),
)


def _explain_scatter_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> Choice:
    _check_scatter(output, rows, index, positions)
    return _choose_scatter(output, rows, index, positions)


@explained_by(_explain_scatter_rows)
def scatter_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None = None) -> None:
    """Write finished rows to the output: ``output[positions[index]] = rows[index]``.

    Args:
        output: ``(B, ...)``, changed in place; gradients flow through it.
        rows: ``(n, ...)``, cast to the dtype of ``output``.
        index: ``(m,)`` int64 in ``[0, n)``, the rows to write, each at most once.
        positions: ``(n,)`` int64 in ``[0, B)``, where each of ``rows`` belongs; ``None`` where that is its own index.

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: for indices that are not int64.
        IndexError: for an index or a position out of range, before anything is written. On a GPU, where looking would
            wait for it, Triton's kernel leaves such a row out, and PyTorch's operation ends in a device-side assertion.
    """
    _check_scatter(output, rows, index, positions)
    if not is_tracing():
        if rows.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
            rows = rows.clone()  # or some would be overwritten before they are read
        _scatter_rows(output, rows, index, positions)
    elif traced_backend(output.device.type) != "reference" and not needs_grad((output, rows)):
        SCATTER_ROWS.recorded(output, rows, index, positions)
    else:
        scatter_rows_definition(output, rows, index, positions)


def _check_scatter(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    for name, given in (("output", output), ("rows", rows), ("index", index)):
        if not isinstance(given, Tensor):
            raise no_tensor("scatter_rows", name, given)
    if rows.shape[1:] != output.shape[1:]:
        raise ValueError(
            f"scatter_rows: rows are {tuple(rows.shape)}, output is {tuple(output.shape)}; give rows of its shape"
        )
    for name, tensor in (("index", index), ("positions", positions)):
        if tensor is not None and tensor.dtype is not torch.int64:
            raise TypeError(f"scatter_rows: {name} is {tensor.dtype}; give int64")
    if positions is not None and positions.shape != rows.shape[:1]:
        raise ValueError(
            f"scatter_rows: positions are {tuple(positions.shape)} for {rows.shape[0]} rows; give one per row"
        )
