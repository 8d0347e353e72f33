"""The whole exit step: gate and compaction, reading the features once where they are what is compacted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cet.ops.backend import is_tracing, needs_grad
from cet.ops.compact import Compaction, check_rows, compact, cpp, triton
from cet.ops.compact.cpp import KEPT_MEMORY
from cet.ops.compact.definition import split_order
from cet.ops.definitions import Layout, Pool, ScoreName, check_mask, pool_features
from cet.ops.exit_gate import check_decision, check_head, exit_gate
from cet.ops.exit_gate import triton as triton_gate
from cet.ops.exit_gate.cpp import fused, prefers_gemm
from cet.ops.exit_gate.definition import DTYPES
from cet.ops.registration import AUTOCAST, GRADIENT, MASKED, Choice, Operation, explained_by

_MUCH_ROOM = 8

TWO_STEPS = "exit_gate, then compact"


def _two_steps(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    own: int | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Compaction]:
    logits, scores, exit_mask = exit_gate(
        features, weight, bias, layout=layout, pool=pool, score=score, threshold=threshold, temperature=temperature
    )
    return logits, scores, compact(exit_mask, tensors, dims)


def _on_triton(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    _own: int | None,
    *gate: Any,
) -> tuple[Tensor, Tensor, Compaction]:
    gathering = triton.Gathering(features.shape[0], tensors, dims)
    logits, scores, row_order = triton_gate.exit_gate_and_order(features, weight, bias, *gate, moves=gathering.moves)
    return logits, scores, gathering.finish(row_order)


def _on_cpp(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    own: int | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Compaction]:
    if own is not None and not (dims[own] == 0 and _moves_on_the_way(features, pool)):
        own = None
    rows = features.shape[0]
    kept_rows = None if own is None else _room_for_kept_rows(features)
    order = features.new_empty(rows, dtype=torch.int64)
    logits, scores, num_kept = fused(
        features, weight, bias, layout, pool, score, threshold, temperature, order=order, kept_rows=kept_rows
    )
    kept, exited = split_order(order, num_kept)
    if num_kept == rows:
        return logits, scores, Compaction(kept, exited, list(tensors))
    if own is None or kept_rows is None or num_kept > kept_rows.shape[0]:
        return logits, scores, Compaction(kept, exited, cpp.gather_rows(tensors, dims, kept))
    others = [i for i in range(len(tensors)) if i != own]
    moved = cpp.gather_rows([tensors[i] for i in others], [dims[i] for i in others], kept) if others else []
    first = kept_rows[:num_kept]
    # Few rows do not hold on to the memory of many.
    moved.insert(own, first.clone() if _MUCH_ROOM * num_kept <= kept_rows.shape[0] else first)
    return logits, scores, Compaction(kept, exited, moved)


EXIT_STEP = Operation("exit_step", definition=_two_steps, kernels={"cpp": _on_cpp, "triton": _on_triton})


def _choose(
    features: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], own: int | None
) -> Choice:
    """Whether gate and compaction run as one step; ``own`` is where the features are among the tensors."""
    head = (weight,) if bias is None else (weight, bias)
    choice = EXIT_STEP.dispatch((*head, *tensors) if own is not None else (features, *head, *tensors))
    backend = choice.backend
    if backend == "reference":
        return choice
    if features.dtype not in DTYPES:
        return _TWO_STEPS["reference"].but(TWO_STEPS, f"features are {features.dtype}, which no kernel takes")
    if torch.is_grad_enabled() and needs_grad((features, *head, *(tensors if backend == "triton" else ()))):
        return _TWO_STEPS[backend].but(TWO_STEPS, GRADIENT)
    if torch.is_autocast_enabled("cpu" if backend == "cpp" else features.device.type):
        return _TWO_STEPS[backend].but(TWO_STEPS, AUTOCAST)
    if backend == "cpp" and prefers_gemm(features.shape[0], weight):
        return _TWO_STEPS[backend].but(TWO_STEPS, "the weight is large, and its matrix product is faster alone")
    return choice


_TWO_STEPS = {backend: Choice("exit_step", backend, TWO_STEPS) for backend in EXIT_STEP.run}


def _explain(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    dims: Sequence[int] | None,
    *,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
    mask: Tensor | None,
) -> Choice:
    check_head(features, weight, bias, layout, pool)
    check_decision("exit_step", score, threshold, temperature)
    check_rows("exit_step", features.shape[0], features.device, tensors, dims or (0,) * len(tensors))
    if mask is None:
        return _choose(features, weight, bias, tensors, _index_of(features, tensors))
    check_mask("exit_step", features, layout, pool, mask)
    choice = _choose(features, weight, bias, tensors, None)
    return choice.but(choice.way, MASKED)


@explained_by(_explain)
def exit_step(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    dims: Sequence[int] | None = None,
    *,
    layout: Layout = "channels_first",
    pool: Pool = "mean",
    score: ScoreName = "entropy",
    threshold: float,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Compaction]:
    """:func:`cet.ops.exit_gate`, then :func:`cet.ops.compact` of ``tensors`` by its exit mask.

    Where the features themselves are one of ``tensors``, each row is moved right after its gate, while it is in cache;
    their new tensor may then be a part of one with room for up to eight times as many rows. Masked features are not
    moved on the way.

    Returns:
        Logits ``(B, K)``, scores ``(B,)`` float32, and what :func:`cet.ops.compact` returns.

    Raises:
        ValueError, TypeError: as these two do.
    """
    check_head(features, weight, bias, layout, pool)
    check_decision("exit_step", score, threshold, temperature)
    if mask is not None:
        check_mask("exit_step", features, layout, pool, mask)
        features = pool_features(features, layout, pool, mask)
    if dims is None:
        dims = (0,) * len(tensors)
    check_rows("exit_step", features.shape[0], features.device, tensors, dims)
    own = _index_of(features, tensors)
    run: Any = _two_steps
    if not is_tracing():
        choice = _choose(features, weight, bias, tensors, own)
        if choice.way is not TWO_STEPS:
            run = EXIT_STEP.run[choice.backend]
    step: tuple[Tensor, Tensor, Compaction] = run(
        features, weight, bias, tensors, dims, own, layout, pool, score, threshold, temperature
    )
    return step


def _index_of(features: Tensor, tensors: Sequence[Tensor]) -> int | None:
    for index, tensor in enumerate(tensors):
        if tensor is features:
            return index
    return None


def _moves_on_the_way(features: Tensor, pool: Pool) -> bool:
    """Whether each row of the features is one piece of memory, and moving it right after its gate pays."""
    if features.shape[0] == 1:
        return False  # it leaves, or stays where it is
    if pool == "first" and features.ndim > 2:
        return False  # the rest of the row is not in cache
    return features.is_contiguous() or (
        features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    )


def _room_for_kept_rows(features: Tensor) -> Tensor:
    """Memory for all rows; where kept memory has room for half of them or more, only for so many.

    Fresh memory would cost more than moving the rows afterwards, if more should be kept.
    """
    rows = features.shape[0]
    size = features.numel() * features.element_size()
    if KEPT_MEMORY < size <= 2 * KEPT_MEMORY:
        features = features[: rows * KEPT_MEMORY // size]
    return torch.empty_like(features)
