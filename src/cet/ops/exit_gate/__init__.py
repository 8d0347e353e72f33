"""The gate: logits of an exit, a score per row, and whether the row leaves."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.backend import is_tracing, is_transforming, needs_grad, no_tensor, traced_backend
from cet.ops.definitions import MAX_ROWS, SCORE_NAMES, SCORES, Layout, Pool, ScoreName, check_mask, pool_features
from cet.ops.exit_gate import cpp, triton
from cet.ops.exit_gate.definition import (
    DTYPES,
    exit_gate_definition,
    gate_definition,
    score_definition,
)
from cet.ops.registration import AUTOCAST, GRADIENT, MASKED, Choice, Operation, explained_by

__all__ = ["exit_gate", "exit_score", "gate"]

_LEAST_TEMPERATURE, _LARGEST_TEMPERATURE = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max

BY_PYTORCH = "PyTorch's operations, then the gate's kernel"
NOT_FUSED = "there is nothing to pool, or so many classes that PyTorch's matrix product is faster"
BY_GEMM = "pooling kernel, PyTorch's matrix product, then the gate's kernel"

GATE = Operation("gate", definition=gate_definition, kernels={"cpp": cpp.gate, "triton": triton.gate}, dtypes=DTYPES)
GATE.record_as(
    "(Tensor logits, str score, float threshold, float temperature) -> (Tensor, Tensor)",
    fake=lambda logits, *_: (
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.bool),
    ),
)


def _choose(features: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Choice:
    """What runs :func:`exit_gate`."""
    tensors = (features, weight) if bias is None else (features, weight, bias)
    choice = EXIT_GATE.dispatch(tensors)
    if choice.backend != "reference":
        if torch.is_grad_enabled() and needs_grad(tensors):
            return choice.but(BY_PYTORCH, GRADIENT)
        if torch.is_autocast_enabled("cpu" if choice.backend == "cpp" else features.device.type):
            return choice.but(BY_PYTORCH, AUTOCAST)
        if choice.backend == "triton" and not triton.fuses(features, weight, pool):
            return choice.but(BY_PYTORCH, NOT_FUSED)
    return choice


def _run_exit_gate(
    features: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, pool: Pool, *decision: Any
) -> tuple[Tensor, Tensor, Tensor]:
    choice = _choose(features, weight, bias, pool)
    gated: tuple[Tensor, Tensor, Tensor]
    if choice.way is BY_PYTORCH:
        logits = F.linear(pool_features(features, layout, pool), weight, bias)
        gated = logits, *GATE.run[GATE.dispatch((logits,)).backend](logits.detach(), *decision)
    else:
        gated = EXIT_GATE.run[choice.backend](features, weight, bias, layout, pool, *decision)
    return gated


EXIT_GATE = Operation(
    "exit_gate",
    definition=exit_gate_definition,
    kernels={"cpp": cpp.exit_gate, "triton": triton.exit_gate},
    dtypes=DTYPES,
)
EXIT_GATE.record_as(
    "(Tensor features, Tensor weight, Tensor? bias, str layout, str pool, str score, float threshold, "
    "float temperature) -> (Tensor, Tensor, Tensor)",
    run=_run_exit_gate,
    fake=lambda features, weight, *_: (
        features.new_empty((features.shape[0], weight.shape[0])),
        features.new_empty(features.shape[:1], dtype=torch.float32),
        features.new_empty(features.shape[:1], dtype=torch.bool),
    ),
)


def _explain_gate(logits: Tensor, score: ScoreName, threshold: float, temperature: float) -> Choice:
    _check_logits(logits)
    check_decision("gate", score, threshold, temperature)
    return GATE.dispatch((logits,))


def _explain_exit_score(logits: Tensor, score: ScoreName, temperature: float) -> Choice:
    if needs_grad((logits,)) or is_transforming():
        reason = GRADIENT if needs_grad((logits,)) else "torch.func and tangents go through PyTorch's operations"
        return Choice("exit_score", "reference", "definition", (reason,))
    return _explain_gate(logits, score, 0.0, temperature)


def _explain_exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
    mask: Tensor | None,
) -> Choice:
    check_head(features, weight, bias, layout, pool)
    check_decision("exit_gate", score, threshold, temperature)
    if mask is not None:
        check_mask("exit_gate", features, layout, pool, mask)
    choice = _choose(features, weight, bias, pool)
    if choice.backend == "cpp" and choice.way is not BY_PYTORCH and cpp.prefers_gemm(features.shape[0], weight):
        choice = choice.but(BY_GEMM, "the weight is large, and its matrix product is faster than the fused kernel")
    return choice if mask is None else choice.but(choice.way, MASKED)


@explained_by(_explain_exit_score)
def exit_score(logits: Tensor, score: ScoreName = "entropy", temperature: float = 1.0) -> Tensor:
    """Score every row of ``logits``: to the bit what :func:`gate` compares, unless a gradient is needed.

    Args:
        logits: ``(B, K)``, any floating dtype, ``K >= 2``.
        score: ``"entropy"`` in nats, ``"confidence"`` or ``"margin"``, see :class:`cet.ExitPolicy`.
        temperature: divides the logits.

    Returns:
        ``(B,)`` float32, differentiable.
    """
    if needs_grad((logits,)) or is_transforming():
        return score_definition(logits, score, temperature)
    return gate(logits, score=score, threshold=0.0, temperature=temperature)[0]


@explained_by(_explain_gate)
def gate(
    logits: Tensor, *, score: ScoreName = "entropy", threshold: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Decide which rows leave.

    Args:
        logits: ``(B, K)``, any floating dtype and strides, ``K >= 2``; kernels take float32, bfloat16 and float16.
        score: which score, see :func:`exit_score`.
        threshold: rows leave when ``entropy <= threshold``, or ``confidence >= threshold``, or
            ``margin >= threshold``; compared in float32.
        temperature: divides the logits.

    Returns:
        The scores ``(B,)`` float32, through which no gradient flows (:func:`exit_score` has one), and the
        exit mask ``(B,)`` bool, true where the row leaves.

    Raises:
        ValueError: for another shape, an unknown score, a NaN threshold or a temperature that is not positive and
            finite.
        TypeError: for logits that are not of a floating dtype.
    """
    _check_logits(logits)
    check_decision("gate", score, threshold, temperature)
    decided: tuple[Tensor, Tensor]
    if not is_tracing():
        decided = GATE.run[GATE.dispatch((logits,)).backend](logits, score, threshold, temperature)
    elif traced_backend(logits.device.type) == "reference":
        decided = gate_definition(logits, score, threshold, temperature)
    else:
        decided = GATE.recorded(logits.detach(), score, threshold, temperature)
    return decided


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise no_tensor("gate", "logits", logits)
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.shape[0] > MAX_ROWS:
        raise ValueError(
            f"gate: logits have shape {tuple(logits.shape)}; give (B, K) with at least 2 classes, at most 2^30 rows"
        )
    if not logits.is_floating_point():
        raise TypeError(f"gate: logits are {logits.dtype}; give a floating dtype")


@explained_by(_explain_exit_gate)
def exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: Layout = "channels_first",
    pool: Pool = "mean",
    score: ScoreName = "entropy",
    threshold: float,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool the features of an exit, classify them, and decide which rows leave.

    Where a gradient is needed the logits are computed by PyTorch's operations, on every backend; so they are under
    autocast.

    Args:
        features: ``(B, C, ...)`` or ``(B, ..., C)``, any floating dtype and strides; ``(B, C)`` is not pooled. Kernels
            take float32, bfloat16 and float16.
        weight: ``(K, C)``, ``K >= 2``, in the dtype of the features.
        bias: ``(K,)`` in that dtype, or None.
        layout: ``"channels_first"`` or ``"channels_last"``.
        pool: ``"mean"`` over all positions, or ``"first"``, the first position of features ``(B, T, C)``.
        score: which score, see :func:`exit_score`.
        threshold: see :func:`gate`.
        temperature: divides the logits for the score; those returned are as they are.
        mask: the weights of the positions, see :func:`cet.ops.definitions.pool_features`. Masked features are pooled by
            PyTorch's operations, on every backend.

    Returns:
        Logits ``(B, K)`` in the dtype of the features, and the scores and exit mask of :func:`gate` for them.

    Raises:
        ValueError: for shapes, devices or switches that do not fit, a NaN threshold or a temperature that is not
            positive and finite.
        TypeError: for dtypes that differ or are not floating.
    """
    check_head(features, weight, bias, layout, pool)
    check_decision("exit_gate", score, threshold, temperature)
    if mask is not None:
        check_mask("exit_gate", features, layout, pool, mask)
        features = pool_features(features, layout, pool, mask)
    if not is_tracing():
        return _run_exit_gate(features, weight, bias, layout, pool, score, threshold, temperature)
    gated: tuple[Tensor, Tensor, Tensor]
    if traced_backend(features.device.type) == "reference" or needs_grad((features, weight, bias)):
        gated = exit_gate_definition(features, weight, bias, layout, pool, score, threshold, temperature)
    else:
        gated = EXIT_GATE.recorded(features, weight, bias, layout, pool, score, threshold, temperature)
    return gated


def check_head(features: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, pool: Pool) -> None:
    """Refuse features and a head that do not fit each other."""
    if layout != "channels_first" and layout != "channels_last":
        raise ValueError(f"exit_gate: layout {layout!r} is unknown; choose channels_first or channels_last")
    if pool != "mean" and pool != "first":
        raise ValueError(f"exit_gate: pool {pool!r} is unknown; choose mean or first")
    if not isinstance(features, Tensor):
        raise no_tensor("exit_gate", "features", features)
    if not isinstance(weight, Tensor):
        raise no_tensor("exit_gate", "weight", weight)
    if not (bias is None or isinstance(bias, Tensor)):
        raise no_tensor("exit_gate", "bias", bias)
    shape = features.shape
    if len(shape) < 2 or shape[0] > MAX_ROWS:
        raise ValueError(
            f"exit_gate: features have shape {tuple(shape)}; give (B, C, ...) or (B, ..., C) with at most 2^30 rows"
        )
    if pool == "first" and len(shape) > 2 and (len(shape) != 3 or layout != "channels_last" or shape[1] == 0):
        raise ValueError(
            f"exit_gate: pool 'first' takes the first token of (B, T, C) features in layout channels_last, got shape "
            f"{tuple(shape)} in layout {layout}; use pool='mean'"
        )
    channels = shape[-1 if layout == "channels_last" else 1]
    weight_shape = weight.shape
    if len(weight_shape) != 2 or weight_shape[0] < 2 or weight_shape[1] != channels:
        raise ValueError(
            f"exit_gate: weight has shape {tuple(weight_shape)} for features of {channels} channels; "
            f"give (K, {channels}) with at least 2 classes"
        )
    if bias is not None and bias.shape != weight_shape[:1]:
        raise ValueError(
            f"exit_gate: bias has shape {tuple(bias.shape)} for {weight_shape[0]} classes; give ({weight_shape[0]},)"
        )
    dtype, device = features.dtype, features.device
    if not dtype.is_floating_point:
        raise TypeError(f"exit_gate: features are {dtype}; give a floating dtype")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"exit_gate: {name} is {tensor.dtype} but features are {dtype}; cast one of them")
        if tensor.device != device:
            raise ValueError(f"exit_gate: {name} is on {tensor.device} but features on {device}; move one")


def check_decision(op: str, score: ScoreName, threshold: float, temperature: float) -> None:
    """Refuse a decision that has no meaning."""
    if score not in SCORES:
        raise ValueError(f"{op}: score {score!r} is unknown; choose one of {', '.join(SCORE_NAMES)}")
    if math.isnan(threshold):
        raise ValueError(f"{op}: threshold is NaN; give a number, infinite to let all rows leave or go on")
    if not _LEAST_TEMPERATURE <= temperature <= _LARGEST_TEMPERATURE:
        raise ValueError(f"{op}: temperature is {temperature}; give a positive, finite number, in the range of float32")
