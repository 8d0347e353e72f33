"""The gate: logits of an exit, a score per row, and whether the row leaves.

Sums, softmax and scores are in float32, whatever the dtype of the features or logits, so that a policy means the same
for a model in half precision. A row whose logits hold a NaN or +Inf has a NaN score, every comparison with NaN is
false, and so it stays.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.backend import (
    is_tracing,
    is_transforming,
    kernels_for,
    needs_grad,
    no_tensor,
    runs_on_triton,
    traced_backend,
    triton_kernels,
)
from cet.ops.definitions import SCORE_NAMES, Layout, Pool, ScoreName, check_mask, pool_features

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels compute with, and the number by which they know it."""

_SCORES = {name: number for number, name in enumerate(SCORE_NAMES)}
_LEAST_TEMPERATURE, _LARGEST_TEMPERATURE = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
_MAX_ROWS = 2**31 - 1  # what the kernels of every device can count


def score_reference(logits: Tensor, score: ScoreName, temperature: float) -> Tensor:
    """The definition of :func:`exit_score`."""
    scaled = logits.float()
    if temperature < 1:  # then finite logits may overflow; what they are less than the largest is all that counts
        scaled = scaled - scaled.detach().amax(dim=1, keepdim=True)
    scaled = scaled / temperature
    if score == "entropy":
        log_p = torch.log_softmax(scaled, dim=1)
        # A class ruled out by a logit of -Inf adds nothing, to the gradient neither.
        entropies: Tensor = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=1)
        return entropies
    probabilities = torch.softmax(scaled, dim=1)
    if score == "confidence":
        return probabilities.amax(dim=1)
    top = probabilities.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def gate_reference(logits: Tensor, score: ScoreName, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition of :func:`gate`."""
    scores = score_reference(logits.detach(), score, temperature)
    return scores, scores <= threshold if score == "entropy" else scores >= threshold


def _gate_cpp(
    kernels: Any, logits: Tensor, score: ScoreName, threshold: float, temperature: float
) -> tuple[Tensor, Tensor]:
    scores = logits.new_empty(logits.shape[0], dtype=torch.float32)
    leaves = logits.new_empty(logits.shape[0], dtype=torch.bool)
    kernels.gate(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.shape,
        logits.stride(),
        _SCORES[score],
        threshold,
        temperature,
        scores.data_ptr(),
        leaves.data_ptr(),
        torch.get_num_threads(),
    )
    return scores, leaves


def _gate(logits: Tensor, score: ScoreName, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    if runs_on_triton("gate", (logits,), DTYPES):
        decided: tuple[Tensor, Tensor] = triton_kernels("exit_gate").gate(logits, score, threshold, temperature)
        return decided
    kernels = kernels_for("gate", (logits,), DTYPES)
    if kernels is None:
        return gate_reference(logits, score, threshold, temperature)
    return _gate_cpp(kernels, logits, score, threshold, temperature)


@torch.library.custom_op("cet::gate", mutates_args=())
def _gate_op(logits: Tensor, score: str, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    return _gate(logits, cast(ScoreName, score), threshold, temperature)


@_gate_op.register_fake
def _(logits: Tensor, score: str, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=torch.float32), logits.new_empty((rows,), dtype=torch.bool)


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
        return score_reference(logits, score, temperature)
    return gate(logits, score=score, threshold=0.0, temperature=temperature)[0]


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
        The scores ``(B,)`` float32, through which no gradient flows (:func:`exit_score` has one), and the flags
        ``(B,)`` bool, true where the row leaves.

    Raises:
        ValueError: for another shape, an unknown score, a NaN threshold or a temperature that is not positive and
            finite.
        TypeError: for logits that are not of a floating dtype.
    """
    if not isinstance(logits, Tensor):
        raise no_tensor("gate", "logits", logits)
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.shape[0] > _MAX_ROWS:
        raise ValueError(
            f"gate: logits have shape {tuple(logits.shape)}; give (B, K) with at least 2 classes, at most 2^31 - 1 rows"
        )
    if not logits.is_floating_point():
        raise TypeError(f"gate: logits are {logits.dtype}; give a floating dtype")
    check_decision("gate", score, threshold, temperature)
    if not is_tracing():
        return _gate(logits, score, threshold, temperature)
    if traced_backend(logits.device.type) == "reference":
        return gate_reference(logits, score, threshold, temperature)
    decided: tuple[Tensor, Tensor] = _gate_op(logits.detach(), score, threshold, temperature)
    return decided


def exit_gate_reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of :func:`exit_gate`."""
    logits = F.linear(pool_features(features, layout, pool), weight, bias)
    return logits, *gate_reference(logits, score, threshold, temperature)


def _exit_gate_cpp(
    kernels: Any,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = features.shape[0]
    if not prefers_gemm(rows, weight):
        leaves = features.new_empty(rows, dtype=torch.bool)
        logits, scores, _ = fused_cpp(
            kernels, features, weight, bias, layout, pool, score, threshold, temperature, leaves=leaves
        )
        return logits, scores, leaves
    pooled = features
    if features.ndim > 2:
        pooled = features.new_empty((rows, weight.shape[1]))
        kernels.pool(*_located(features, layout, pool), pooled.data_ptr(), torch.get_num_threads())
    logits = F.linear(pooled, weight, bias)
    return logits, *_gate_cpp(kernels, logits, score, threshold, temperature)


def prefers_gemm(rows: int, weight: Tensor) -> bool:
    """Whether torch's matrix product, which blocks for the caches, beats dot products on the way (measured).

    In bfloat16 torch multiplies by instructions of their own, four times as fast as in float32.
    """
    return rows >= 16 and weight.numel() >= (1 << 17 if weight.dtype is torch.bfloat16 else 1 << 22)


def fused_cpp(
    kernels: Any,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
    *,
    leaves: Tensor | None = None,
    order: Tensor | None = None,
    survivors: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Logits and scores in one pass over the features, and which rows leave in one of two forms, or both.

    The flags are written to ``leaves``, ``(B,)`` bool. The indices of the rows that stay, then those of the others, are
    written to ``order``, ``(B,)`` int64, and the last result is how many stay. With ``survivors`` too, in rows of the
    same layout, the rows that stay are moved there while they are in cache, unless it has room for fewer.
    """
    rows, classes = features.shape[0], weight.shape[0]
    weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    logits = features.new_empty(rows, classes)  # sizes as numbers: a tuple takes longer to parse
    scores = features.new_empty(rows, dtype=torch.float32)
    count = kernels.exit_gate(
        *_located(features, layout, pool),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        classes,
        logits.data_ptr(),
        _SCORES[score],
        threshold,
        temperature,
        scores.data_ptr(),
        0 if leaves is None else leaves.data_ptr(),
        0 if order is None else order.data_ptr(),
        0 if survivors is None else survivors.data_ptr(),
        0 if survivors is None else survivors.shape[0],
        torch.get_num_threads(),
    )
    return logits, scores, count


def _located(features: Tensor, layout: Layout, pool: Pool) -> tuple[Any, ...]:
    """What the kernels take to find the features."""
    dtype = DTYPES[features.dtype]
    return features.data_ptr(), dtype, features.shape, features.stride(), layout == "channels_last", pool == "mean"


def _exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (features, weight) if bias is None else (features, weight, bias)
    if runs_on_triton("exit_gate", tensors, DTYPES):
        if needs_grad(tensors) or torch.is_autocast_enabled(features.device.type):
            logits = F.linear(pool_features(features, layout, pool), weight, bias)
            return logits, *_gate(logits.detach(), score, threshold, temperature)
        gated: tuple[Tensor, Tensor, Tensor] = triton_kernels("exit_gate").exit_gate(
            features, weight, bias, layout, pool, score, threshold, temperature
        )
        return gated
    kernels = kernels_for("exit_gate", tensors, DTYPES)
    if kernels is None:
        return exit_gate_reference(features, weight, bias, layout, pool, score, threshold, temperature)
    if needs_grad(tensors) or torch.is_autocast_enabled("cpu"):
        logits = F.linear(pool_features(features, layout, pool), weight, bias)
        return logits, *_gate_cpp(kernels, logits, score, threshold, temperature)
    return _exit_gate_cpp(kernels, features, weight, bias, layout, pool, score, threshold, temperature)


@torch.library.custom_op("cet::exit_gate", mutates_args=())
def _exit_gate_op(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    pool: str,
    score: str,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    switches = cast(Layout, layout), cast(Pool, pool), cast(ScoreName, score)
    return _exit_gate(features, weight, bias, *switches, threshold, temperature)


@_exit_gate_op.register_fake
def _(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    pool: str,
    score: str,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = features.shape[0]
    return (
        features.new_empty((rows, weight.shape[0])),
        features.new_empty((rows,), dtype=torch.float32),
        features.new_empty((rows,), dtype=torch.bool),
    )


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
        Logits ``(B, K)`` in the dtype of the features, and the scores and flags of :func:`gate` for them.

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
    if is_tracing():
        if traced_backend(features.device.type) != "reference" and not needs_grad((features, weight, bias)):
            answer: tuple[Tensor, Tensor, Tensor] = _exit_gate_op(
                features, weight, bias, layout, pool, score, threshold, temperature
            )
            return answer
        return exit_gate_reference(features, weight, bias, layout, pool, score, threshold, temperature)
    return _exit_gate(features, weight, bias, layout, pool, score, threshold, temperature)


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
    if len(shape) < 2 or shape[0] > _MAX_ROWS:
        raise ValueError(
            f"exit_gate: features have shape {tuple(shape)}; give (B, C, ...) or (B, ..., C) with at most 2^31 - 1 rows"
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
    if score not in _SCORES:
        raise ValueError(f"{op}: score {score!r} is unknown; choose one of {', '.join(SCORE_NAMES)}")
    if math.isnan(threshold):
        raise ValueError(f"{op}: threshold is NaN; give a number, infinite to let all rows leave or stay")
    if not _LEAST_TEMPERATURE <= temperature <= _LARGEST_TEMPERATURE:
        raise ValueError(f"{op}: temperature is {temperature}; give a positive, finite number, in the range of float32")
