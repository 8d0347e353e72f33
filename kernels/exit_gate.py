"""Pool, linear layer, softmax statistics, score, exit mask and order of the rows.

Three ways through, by shape:

* features with positions to pool: one program per row reads it once and keeps its pooled channels and logits in
  registers (:func:`exit_gate_kernel`), where there are rows enough to fill the device or a row is small;
* otherwise programs share rows: they pool blocks of channels (:func:`pool_kernel`), then
* blocks of pooled rows are multiplied with the head (:func:`head_kernel`), which also scores them where one block holds
  all classes; else :func:`gate_kernel` does, as it does for logits that are given.

Whichever kernel scores also orders the rows, in the program that comes last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cet.kernels import launch
from cet.kernels.compact import SCAN_BLOCK, write_order
from cet.kernels.launch import alignment, block_size, on_device_of
from cet.kernels.scores import exits, merge_stats, score_of, softmax_stats

_MAX_CLASSES = 128  # whose logits, and their block of the weight, fit in registers
_CLASS_BLOCK = 4096  # logits whose statistics are taken at once
_TILE = 4096  # features that a program has in flight
_SMALL_ROW = 1 << 14  # features that one program reads in a few steps
_MANY_ROWS = 256  # that fill the device, one program each


@triton.jit
def multiple_of(extent, ALIGN: tl.constexpr):
    """The extent, a multiple of ``ALIGN``, in a form that shows the compiler that it is."""
    return extent // ALIGN * ALIGN


@triton.jit
def decide(stats, decision, o_row, m_row, CLASSES: tl.constexpr, SCORE: tl.constexpr):
    """Writes scores and exit mask of some rows; how many of them are kept."""
    threshold, temperature = threshold_and_temperature(decision)
    b_score = score_of(stats, temperature, CLASSES, SCORE)
    b_exits = exits(b_score, threshold, SCORE)
    tl.store(decision.scores_ptr + o_row, b_score, mask=m_row)
    tl.store(decision.exit_mask_ptr + o_row, b_exits, mask=m_row)
    return tl.sum((m_row & (b_exits == 0)).to(tl.int32), axis=0)


@triton.jit
def threshold_and_temperature(decision):
    threshold = decision.threshold
    temperature = decision.temperature
    if decision.rule_ptr is not None:
        threshold = tl.load(decision.rule_ptr)
        temperature = tl.load(decision.rule_ptr + 1)
    return threshold, temperature


@triton.jit
def valid_rows(decision, rows):
    """How many rows are there; the others are padding."""
    valid = rows
    if decision.count_ptr is not None:
        valid = tl.load(decision.count_ptr)
    return valid


@triton.jit
def finish(decision, rows, num_kept, BLOCK: tl.constexpr):
    """The program that comes last orders all rows by the flags that the others have written.

    Each program adds one ticket, in the upper half of a word, and its number of kept rows, in the lower. The flags of a
    program are written by all its threads; the barrier orders them before the addition, which one thread does and
    which releases them to the device. Whoever gets the last ticket acquires, through the chain of additions, what all
    others released. Its other threads get the result through shared memory, behind a barrier, so their loads of the
    flags come later too. The ticket is left at zero.
    """
    if decision.order_ptr is not None:
        tl.debug_barrier()
        arrived = tl.atomic_add(decision.ticket_ptr, (1 << 32) + num_kept.to(tl.int64), sem="acq_rel", scope="gpu")
        if arrived >> 32 == tl.num_programs(0) - 1:
            num_kept += (arrived & 0xFFFFFFFF).to(tl.int32)
            tl.store(decision.num_kept_ptr, num_kept.to(decision.num_kept_ptr.dtype.element_ty))
            tl.store(decision.ticket_ptr, tl.zeros([], tl.int64))
            write_order(decision.exit_mask_ptr, decision.order_ptr, rows, valid_rows(decision, rows), num_kept, BLOCK)


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    logits_ptr,
    decision,
    rows,
    s_row,
    s_class,
    CLASSES: tl.constexpr,
    SCORE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Scores ``ROWS`` rows of logits, by blocks of classes where there are many."""
    _, temperature = threshold_and_temperature(decision)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < valid_rows(decision, rows)
    b_lowest = tl.full([ROWS], float("-inf"), tl.float32)
    b_zero = tl.zeros([ROWS], tl.float32)
    stats = b_lowest, b_lowest, b_zero, b_zero
    for i_class in range(0, CLASSES, BLOCK_K):
        o_class = i_class + tl.arange(0, BLOCK_K)
        o_logit = o_row[:, None] * multiple_of(s_row, ALIGN) + o_class.to(tl.int64)[None, :] * s_class
        mask = m_row[:, None] & (o_class < CLASSES)[None, :]
        b_logits = tl.load(logits_ptr + o_logit, mask=mask, other=float("-inf")).to(tl.float32)
        stats = merge_stats(stats, softmax_stats(b_logits, temperature, SCORE), temperature)
    num_kept = decide(stats, decision, o_row, m_row, CLASSES, SCORE)
    finish(decision, rows, num_kept, BLOCK_SCAN)


@triton.jit
def mean_over_positions(
    row_ptr,
    shape,
    o_channel,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Means ``(BLOCK_C,)`` of some channels of a row; 0 for excess channels."""
    channels = shape.channels
    inner = shape.inner
    s_channel = shape.s_channel
    s_inner = shape.s_inner
    if CHANNELS_LAST:
        channels = multiple_of(channels, ALIGN)
        s_inner = multiple_of(s_inner, ALIGN)
    else:
        inner = multiple_of(inner, ALIGN)
        s_channel = multiple_of(s_channel, ALIGN)
    b_sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for _ in range(shape.outer):
        for i_inner in range(0, inner, BLOCK_P):
            o_inner = i_inner + tl.arange(0, BLOCK_P)
            o_feature = o_channel.to(tl.int64)[:, None] * s_channel + o_inner.to(tl.int64)[None, :] * s_inner
            mask = (o_channel < channels)[:, None] & (o_inner < inner)[None, :]
            b_sums += tl.load(row_ptr + o_feature, mask=mask, other=0.0).to(tl.float32)
        row_ptr += multiple_of(shape.s_outer, ALIGN)
    return tl.sum(b_sums, axis=1) / (shape.outer * inner)


@triton.jit
def write_logits(b_logits, bias_ptr, logits_ptr, o_row, m_row, o_class, CLASSES: tl.constexpr):
    """Adds the bias, and writes; what was written, as float32 with -Inf in excess columns."""
    m_class = o_class < CLASSES
    if bias_ptr is not None:
        b_logits += tl.load(bias_ptr + o_class, mask=m_class, other=0.0).to(tl.float32)[None, :]
    b_logits = b_logits.to(logits_ptr.dtype.element_ty)
    o_logit = o_row[:, None] * CLASSES + o_class[None, :]
    tl.store(logits_ptr + o_logit, b_logits, mask=m_row[:, None] & m_class[None, :])
    return tl.where(m_class[None, :], b_logits.to(tl.float32), float("-inf"))


@triton.jit(do_not_specialize=["rows"])
def exit_gate_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    decision,
    shape,
    rows,
    CLASSES: tl.constexpr,
    SCORE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Pools one row, multiplies it with the head and decides."""
    i_row = tl.program_id(0).to(tl.int64)
    num_kept = tl.zeros([], tl.int32)
    if i_row < valid_rows(decision, rows):
        o_class = tl.arange(0, BLOCK_K)
        b_logits = tl.zeros([BLOCK_K], tl.float32)
        for i_channel in range(0, shape.channels, BLOCK_C):
            o_channel = i_channel + tl.arange(0, BLOCK_C)
            row_ptr = features_ptr + i_row * multiple_of(shape.s_row, ALIGN)
            b_pooled = mean_over_positions(row_ptr, shape, o_channel, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_P)
            o_weight = o_class[:, None] * shape.channels + o_channel[None, :]
            m_weight = (o_class < CLASSES)[:, None] & (o_channel < shape.channels)[None, :]
            b_weight = tl.load(weight_ptr + o_weight, mask=m_weight, other=0.0).to(tl.float32)
            b_logits += tl.sum(b_weight * b_pooled[None, :], axis=1)
        o_row = i_row + tl.arange(0, 1)
        m_row = o_row < rows
        b_written = write_logits(b_logits[None, :], bias_ptr, logits_ptr, o_row, m_row, o_class, CLASSES)
        _, temperature = threshold_and_temperature(decision)
        num_kept = decide(softmax_stats(b_written, temperature, SCORE), decision, o_row, m_row, CLASSES, SCORE)
    finish(decision, rows, num_kept, BLOCK_SCAN)


@triton.jit
def pool_kernel(
    features_ptr,
    pooled_ptr,
    shape,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Pools ``BLOCK_C`` channels of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ptr = features_ptr + i_row * multiple_of(shape.s_row, ALIGN)
    b_pooled = mean_over_positions(row_ptr, shape, o_channel, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_P)
    o_pooled = i_row * shape.channels + o_channel
    tl.store(pooled_ptr + o_pooled, b_pooled.to(pooled_ptr.dtype.element_ty), mask=o_channel < shape.channels)


@triton.jit(do_not_specialize=["rows"])
def head_kernel(
    pooled_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    decision,
    rows,
    channels,
    s_row,
    s_channel,
    CLASSES: tl.constexpr,
    SCORE: tl.constexpr,
    ALIGN: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Multiplies ``ROWS`` pooled rows with ``BLOCK_K`` classes of the head, and decides if those are all."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_class = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_row = o_row < valid_rows(decision, rows)
    channels = multiple_of(channels, ALIGN)
    b_logits = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for i_channel in range(0, channels, BLOCK_C):
        o_channel = i_channel + tl.arange(0, BLOCK_C)
        m_channel = o_channel < channels
        o_pooled = o_row[:, None] * multiple_of(s_row, ALIGN) + o_channel.to(tl.int64)[None, :] * s_channel
        b_pooled = tl.load(pooled_ptr + o_pooled, mask=m_row[:, None] & m_channel[None, :], other=0.0)
        o_weight = o_class.to(tl.int64)[None, :] * channels + o_channel[:, None]
        m_weight = (o_class < CLASSES)[None, :] & m_channel[:, None]
        b_weight = tl.load(weight_ptr + o_weight, mask=m_weight, other=0.0)
        b_logits = tl.dot(b_pooled.to(OPERAND), b_weight.to(OPERAND), b_logits, input_precision="ieee")
    b_written = write_logits(b_logits, bias_ptr, logits_ptr, o_row, m_row, o_class, CLASSES)
    if CLASSES <= BLOCK_K:
        _, temperature = threshold_and_temperature(decision)
        num_kept = decide(softmax_stats(b_written, temperature, SCORE), decision, o_row, m_row, CLASSES, SCORE)
        finish(decision, rows, num_kept, BLOCK_SCAN)


class _Decision(NamedTuple):
    """What every kernel that decides takes; with ``order_ptr`` None the rows are not ordered."""

    scores_ptr: Tensor
    exit_mask_ptr: Tensor
    threshold: float
    temperature: float
    order_ptr: Tensor | None = None
    num_kept_ptr: Tensor | None = None
    ticket_ptr: Tensor | None = None
    count_ptr: Tensor | None = None
    rule_ptr: Tensor | None = None


class _Shape(NamedTuple):
    """Features ``(rows, channels, outer, inner)``; the positions are the last two."""

    channels: int
    outer: int
    inner: int
    s_row: int
    s_channel: int
    s_outer: int
    s_inner: int

    def alignment(self, itemsize: int) -> int:
        if self.s_channel == 1:
            return alignment(itemsize, self.channels, self.s_inner, self.s_outer, self.s_row)
        return alignment(itemsize, self.inner if self.s_inner == 1 else 1, self.s_channel, self.s_outer, self.s_row)

    def blocks(self, most_channels: int) -> tuple[int, int]:
        """Blocks of channels and positions: a tile, with runs of 128 where memory is contiguous."""
        if self.s_channel == 1:
            block_c = block_size(self.channels, max(32, min(128, most_channels)))
            return block_c, block_size(self.inner, _TILE // block_c)
        block_p = block_size(self.inner, max(128, _TILE // most_channels))
        return block_size(self.channels, min(_TILE // block_p, most_channels)), block_p


def _as_shape(features: Tensor, layout: str) -> tuple[Tensor, _Shape]:
    """The features, copied where their positions are more than two dimensions in memory, and their shape."""
    channel = 1 if layout == "channels_first" else features.ndim - 1
    spans: list[tuple[int, int]] = []
    positions = [dim for dim in range(1, features.ndim) if dim != channel and features.shape[dim] != 1]
    for dim in sorted(positions, key=features.stride):
        size, stride = features.shape[dim], features.stride(dim)
        if spans and stride == spans[-1][0] * spans[-1][1]:
            spans[-1] = spans[-1][0] * size, spans[-1][1]
        else:
            spans.append((size, stride))
    if len(spans) > 2:
        return _as_shape(features.contiguous(), layout)
    (inner, s_inner), (outer, s_outer) = (*spans, (1, 0), (1, 0))[:2]
    strides = features.stride(0), features.stride(channel), s_outer, s_inner
    return features, _Shape(features.shape[channel], outer, inner, *strides)


def gate_into(logits: Tensor, score: str, decision: _Decision) -> None:
    rows, classes = logits.shape
    if rows == 0:
        return
    block_k = block_size(classes, _CLASS_BLOCK)
    row_block = max(1, 512 // block_k)
    with on_device_of(logits):
        gate_kernel[(triton.cdiv(rows, row_block),)](
            logits,
            decision,
            rows,
            *logits.stride(),
            CLASSES=classes,
            SCORE=score,
            ALIGN=alignment(logits.element_size(), logits.stride(0)),
            ROWS=row_block,
            BLOCK_K=block_k,
            BLOCK_SCAN=SCAN_BLOCK,
        )


def _is_row_resident(rows: int, shape: _Shape, classes: int) -> bool:
    positions = shape.outer * shape.inner
    # Every row reads the weight again, from a cache; that must not outweigh its features.
    if classes > min(_MAX_CLASSES, max(32, positions)):
        return False
    return rows >= _MANY_ROWS or shape.channels * positions <= _SMALL_ROW


def exit_gate_into(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    pool: str,
    score: str,
    logits: Tensor,
    decision: _Decision,
) -> None:
    rows, classes = logits.shape
    if rows == 0:
        return
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if features.ndim > 2 and pool == "first":
        features = features[:, 0]
    if features.ndim > 2:
        features, shape = _as_shape(features, layout)
        if _is_row_resident(rows, shape, classes):
            _exit_gate_rows_into(features, shape, weight, bias, score, logits, decision)
            return
        features = _pooled(features, shape)
    _head_into(features, weight, bias, score, logits, decision)
    if classes > _MAX_CLASSES:
        gate_into(logits, score, decision)


def _exit_gate_rows_into(
    features: Tensor,
    shape: _Shape,
    weight: Tensor,
    bias: Tensor | None,
    score: str,
    logits: Tensor,
    decision: _Decision,
) -> None:
    rows, classes = logits.shape
    block_k = block_size(classes, _MAX_CLASSES)
    block_c, block_p = shape.blocks(most_channels=min(64, _TILE // block_k))
    warps = 4 if block_c * block_p >= 1024 else 1
    with on_device_of(features):
        exit_gate_kernel[(rows,)](
            features,
            weight,
            bias,
            logits,
            decision,
            shape,
            rows,
            CLASSES=classes,
            SCORE=score,
            CHANNELS_LAST=shape.s_channel == 1,
            ALIGN=shape.alignment(features.element_size()),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            BLOCK_K=block_k,
            BLOCK_SCAN=SCAN_BLOCK // 4 * warps,
            num_warps=warps,
        )


def _pooled(features: Tensor, shape: _Shape) -> Tensor:
    rows = features.shape[0]
    pooled = features.new_empty(rows, shape.channels)
    block_c, block_p = shape.blocks(most_channels=64 if rows >= _MANY_ROWS else 8)
    with on_device_of(features):
        pool_kernel[(rows, triton.cdiv(shape.channels, block_c))](
            features,
            pooled,
            shape,
            CHANNELS_LAST=shape.s_channel == 1,
            ALIGN=shape.alignment(features.element_size()),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
    return pooled


def _head_into(
    pooled: Tensor, weight: Tensor, bias: Tensor | None, score: str, logits: Tensor, decision: _Decision
) -> None:
    (rows, channels), classes = pooled.shape, weight.shape[0]
    block_k = block_size(classes, _MAX_CLASSES if classes <= _MAX_CLASSES else 64, smallest=16)
    # float32 is multiplied without tensor cores, which takes more registers.
    row_block, block_c = (16, 16) if pooled.dtype is torch.float32 else (32, 32)
    # NumPy, which interprets, has no bfloat16.
    operand = torch.float32 if launch.is_interpreted() else pooled.dtype
    with on_device_of(pooled):
        head_kernel[(triton.cdiv(rows, row_block), triton.cdiv(classes, block_k))](
            pooled,
            weight,
            bias,
            logits,
            decision,
            rows,
            channels,
            *pooled.stride(),
            CLASSES=classes,
            SCORE=score,
            ALIGN=alignment(pooled.element_size(), pooled.stride(0), channels),
            OPERAND=_OPERANDS[operand],
            ROWS=row_block,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            BLOCK_SCAN=SCAN_BLOCK,
        )


_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _new_decision(like: Tensor, threshold: float = 0.0, temperature: float = 1.0) -> _Decision:
    """With new outputs for as many rows."""
    scores = like.new_empty(like.shape[:1], dtype=torch.float32)
    exit_mask = like.new_empty(like.shape[:1], dtype=torch.bool)
    return _Decision(scores, exit_mask, float(threshold), float(temperature))


def _new_logits(features: Tensor, weight: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], weight.shape[0])


def gate(logits: Tensor, score: str, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """:func:`cet.ops.gate`: scores and exit mask."""
    decision = _new_decision(logits, threshold, temperature)
    gate_into(logits, score, decision)
    return decision.scores_ptr, decision.exit_mask_ptr


def exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    pool: str,
    score: str,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cet.ops.exit_gate`: logits, scores and exit mask."""
    logits, decision = _new_logits(features, weight), _new_decision(features, threshold, temperature)
    exit_gate_into(features, weight, bias, layout, pool, score, logits, decision)
    return logits, decision.scores_ptr, decision.exit_mask_ptr


def exit_gate_and_order(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    pool: str,
    score: str,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, scores, the rows ``(B,)`` int64, the kept ones first, and how many are kept, 0-d int64 on the device."""
    logits, decision = _new_logits(features, weight), _new_decision(features, threshold, temperature)
    order = features.new_empty(features.shape[0], dtype=torch.int64)
    num_kept, ticket = features.new_zeros(2, dtype=torch.int64)
    decision = decision._replace(order_ptr=order, num_kept_ptr=num_kept, ticket_ptr=ticket)
    exit_gate_into(features, weight, bias, layout, pool, score, logits, decision)
    return logits, decision.scores_ptr, order, num_kept


def _padded(like: Tensor, rule: Tensor, count: Tensor, num_kept: Tensor) -> tuple[_Decision, Tensor]:
    """The decision on as many padded rows, and the order that it writes."""
    order = num_kept.new_empty(like.shape[0])
    ticket = num_kept.new_zeros((), dtype=torch.int64)
    decision = _new_decision(like)._replace(order_ptr=order, num_kept_ptr=num_kept, ticket_ptr=ticket)
    return decision._replace(count_ptr=count, rule_ptr=rule), order


def padded_gate(logits: Tensor, rule: Tensor, count: Tensor, num_kept: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """:func:`cet.ops.padded.padded_gate`: scores and order."""
    decision, order = _padded(logits, rule, count, num_kept)
    gate_into(logits, score, decision)
    return decision.scores_ptr, order


def padded_exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: Tensor,
    count: Tensor,
    num_kept: Tensor,
    layout: str,
    pool: str,
    score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cet.ops.padded.padded_exit_gate`: logits, scores and order."""
    logits, (decision, order) = _new_logits(features, weight), _padded(features, rule, count, num_kept)
    exit_gate_into(features, weight, bias, layout, pool, score, logits, decision)
    return logits, decision.scores_ptr, order
