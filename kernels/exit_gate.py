"""Pool, linear layer, softmax statistics, score, exit mask, and the places of the rows, whose kept ones move at once.

:func:`exit_gate_kernel` does all of it in one pass for heads of few classes. Small rows share a program, and large ones
are shared by programs, so that no program holds much: until the places of its rows are known the L2 cache must keep
them, and they are copied from there. Other heads are multiplied by PyTorch, and :func:`gate_kernel` takes the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cet.kernels import launch
from cet.kernels.compact import RowMove, copy_rows
from cet.kernels.launch import alignment, block_size, on_device_of
from cet.kernels.placing import arrives_last, kept_before, leave, state_size, take_turn, wait_for_place
from cet.kernels.scores import exits, merge_stats, score_of, softmax_stats

_MAX_CLASSES = 128  # whose logits, and their block of the weight, fit in registers
_CLASS_BLOCK = 4096  # logits whose statistics are taken at once
_TILE = 4096  # features that a program of a shared row has in flight
_TILE_BYTES = 1 << 14  # and one with rows of its own
_SHARE_BYTES = 1 << 16  # of a row, for one program
_ROWS_BYTES = 1 << 15  # of small rows, for one program: programs take turns one by one, at 2.4 ns each on an H200
_MAX_ROWS = 16
_PROGRAMS_PER_PROCESSOR = 8  # before a program takes more than one row
_MAX_SLICES = 16  # programs for a row; the smallest part of a GPU that cet is for runs as many at once


@triton.jit
def multiple_of(extent, ALIGN: tl.constexpr):
    """The extent, a multiple of ``ALIGN``, in a form that shows the compiler that it is."""
    return extent // ALIGN * ALIGN


@triton.jit
def rule_of(gate):
    """Threshold and temperature."""
    threshold = gate.threshold
    temperature = gate.temperature
    if gate.decision_ptr is not None:
        threshold = tl.load(gate.decision_ptr)
        temperature = tl.load(gate.decision_ptr + 1)
    return threshold, temperature


@triton.jit
def valid_rows(gate, rows):
    """How many rows are there; the others are padding."""
    valid = rows
    if gate.count_ptr is not None:
        valid = tl.load(gate.count_ptr)
    return valid


@triton.jit
def decide(stats, gate, o_row, m_row, CLASSES: tl.constexpr, SCORE: tl.constexpr):
    """Scores of some rows, and 1 for those that are kept."""
    threshold, temperature = rule_of(gate)
    b_score = score_of(stats, temperature, CLASSES, SCORE)
    b_exits = exits(b_score, threshold, SCORE)
    if gate.exit_mask_ptr is not None:
        tl.store(gate.exit_mask_ptr + o_row, b_exits, mask=m_row)
    return b_score, (m_row & (b_exits == 0)).to(tl.int32)


@triton.jit
def place(gate, i_block, o_row, m_row, b_kept, rows, valid, row_block, WINDOW: tl.constexpr):
    """Tells where the rows of a block go, and behind the last one how many are kept; the places of the kept ones."""
    b_place = tl.zeros(b_kept.shape, tl.int64)
    if gate.state_ptr is not None:
        num_kept = tl.sum(b_kept, axis=0)
        is_kept = num_kept if b_kept.shape[0] == 1 else 0
        before = kept_before(gate.state_ptr, i_block, num_kept, is_kept, WINDOW)
        b_place = before + tl.cumsum(b_kept, axis=0) - b_kept
        if gate.order_ptr is not None:
            b_place = tl.where(b_kept != 0, b_place, rows + o_row - b_place)
            tl.store(gate.order_ptr + b_place, o_row.to(gate.order_ptr.dtype.element_ty), mask=m_row)
        if gate.num_kept_ptr is not None:  # by itself: joined to what is known later, it would be asked later
            if i_block == tl.maximum(tl.cdiv(valid, row_block), 1) - 1:
                tl.store(gate.num_kept_ptr, (before + num_kept).to(gate.num_kept_ptr.dtype.element_ty))
    return b_place


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    logits_ptr,
    partials_ptr,
    gate,
    rows,
    s_row,
    s_class,
    CLASSES: tl.constexpr,
    SCORE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Scores ``ROWS`` rows of logits, by blocks of classes where there are many; several programs may share a row."""
    turn = take_turn(gate.state_ptr)
    i_block = turn // SLICES
    i_slice = (turn % SLICES).to(tl.int32) if SLICES > 1 else 0
    blocks = tl.cdiv(rows, ROWS)
    valid = valid_rows(gate, rows)
    o_row = i_block * ROWS + tl.arange(0, ROWS)
    m_row = o_row < valid
    if (i_block * ROWS < valid) | (i_block == 0):
        _, temperature = rule_of(gate)
        b_lowest = tl.full([ROWS], float("-inf"), tl.float32)
        b_zero = tl.zeros([ROWS], tl.float32)
        stats = b_lowest, b_lowest, b_zero, b_zero
        for i_class in range(i_slice * BLOCK_K, CLASSES, SLICES * BLOCK_K):
            o_class = i_class + tl.arange(0, BLOCK_K)
            o_logit = o_row[:, None] * multiple_of(s_row, ALIGN) + o_class.to(tl.int64)[None, :] * s_class
            mask = m_row[:, None] & (o_class < CLASSES)[None, :]
            b_logits = tl.load(logits_ptr + o_logit, mask=mask, other=float("-inf")).to(tl.float32)
            stats = merge_stats(stats, softmax_stats(b_logits, temperature, SCORE), temperature)
        is_last = True
        if SLICES > 1:
            tl.static_assert(ROWS == 1)
            for i_stat in tl.static_range(4):
                tl.store(partials_ptr + (o_row * 4 + i_stat) * SLICES + i_slice, stats[i_stat], mask=m_row)
            is_last = arrives_last(gate.state_ptr, blocks, i_block, SLICES)
        if is_last:
            if SLICES > 1:
                stats = b_lowest, b_lowest, b_zero, b_zero
                for i_other in tl.static_range(SLICES):
                    o_partial = o_row * 4 * SLICES + i_other
                    other = (
                        tl.load(partials_ptr + o_partial, mask=m_row, other=float("-inf")),
                        tl.load(partials_ptr + o_partial + SLICES, mask=m_row, other=float("-inf")),
                        tl.load(partials_ptr + o_partial + 2 * SLICES, mask=m_row, other=0.0),
                        tl.load(partials_ptr + o_partial + 3 * SLICES, mask=m_row, other=0.0),
                    )
                    stats = merge_stats(stats, other, temperature)
            b_score, b_kept = decide(stats, gate, o_row, m_row, CLASSES, SCORE)
            tl.store(gate.scores_ptr + o_row, b_score, mask=m_row)
            place(gate, i_block, o_row, m_row, b_kept, rows, valid, ROWS, WINDOW)
    leave(gate.state_ptr, blocks, WINDOW)


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
def partial_logits(
    row_ptr,
    weight_ptr,
    shape,
    i_slice,
    o_class,
    CLASSES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of one row ``(BLOCK_K,)``: the pooled features of every ``SLICES``-th block of channels times the head."""
    b_logits = tl.zeros([BLOCK_K], tl.float32)
    for i_channel in range(i_slice * BLOCK_C, shape.channels, SLICES * BLOCK_C):
        o_channel = i_channel + tl.arange(0, BLOCK_C)
        b_pooled = mean_over_positions(row_ptr, shape, o_channel, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_P)
        o_weight = o_class[:, None] * shape.channels + o_channel[None, :]
        m_weight = (o_class < CLASSES)[:, None] & (o_channel < shape.channels)[None, :]
        b_weight = tl.load(weight_ptr + o_weight, mask=m_weight, other=0.0).to(tl.float32)
        b_logits += tl.sum(b_weight * b_pooled[None, :], axis=1)
    return b_logits


@triton.jit
def answer(gate, o_row, m_row, b_logits, b_score, b_kept, o_class, CLASSES: tl.constexpr):
    """Writes logits and scores of some rows: where these are, or where those that leave belong, with their exit."""
    if gate.positions_ptr is not None:
        m_row &= b_kept == 0
        o_row = tl.load(gate.positions_ptr + o_row, mask=m_row, other=0).to(tl.int64)
        tl.store(gate.exits_ptr + o_row, tl.zeros(o_row.shape, tl.int64) + tl.load(gate.exit_index_ptr), mask=m_row)
    tl.store(gate.scores_ptr + o_row, b_score, mask=m_row)
    o_logit = o_row[:, None] * CLASSES + o_class[None, :]
    b_logits = b_logits.to(gate.logits_ptr.dtype.element_ty)
    tl.store(gate.logits_ptr + o_logit, b_logits, mask=m_row[:, None] & (o_class < CLASSES)[None, :])


@triton.jit(do_not_specialize=["rows", "row_block"])
def exit_gate_kernel(
    features_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,
    gate,
    shape,
    moves,
    rows,
    row_block,
    CLASSES: tl.constexpr,
    SCORE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    MOVES: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A program pools ``row_block`` rows, at most ``ROWS``, multiplies them with the head, decides and moves them; or
    ``SLICES`` programs share one row: the last decides, all move their part of it."""
    tl.static_assert(ROWS == 1 or SLICES == 1)
    turn = take_turn(gate.state_ptr)
    i_block = turn // SLICES
    i_slice = (turn % SLICES).to(tl.int32) if SLICES > 1 else 0
    blocks = tl.cdiv(rows, row_block)
    valid = valid_rows(gate, rows)
    i_first = i_block * row_block
    o_lane = tl.arange(0, ROWS)
    o_row = i_first + o_lane
    m_row = (o_lane < row_block) & (o_row < valid)
    b_kept = tl.zeros([ROWS], tl.int32)
    b_place = tl.zeros([ROWS], tl.int64)
    if i_first < valid:
        o_class = tl.arange(0, BLOCK_K)
        b_logits = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for i_lane in range(tl.minimum(row_block, valid - i_first).to(tl.int32)):
            row_ptr = features_ptr + (i_first + i_lane) * multiple_of(shape.s_row, ALIGN)
            b_partial = partial_logits(
                row_ptr,
                weight_ptr,
                shape,
                i_slice,
                o_class,
                CLASSES,
                CHANNELS_LAST,
                ALIGN,
                SLICES,
                BLOCK_C,
                BLOCK_P,
                BLOCK_K,
            )
            b_logits = tl.where((o_lane == i_lane)[:, None], b_partial[None, :], b_logits)
        is_last = True
        if SLICES > 1:
            o_partial = (i_first * SLICES) * BLOCK_K + o_class
            tl.store(partials_ptr + o_partial + i_slice * BLOCK_K, tl.sum(b_logits, axis=0))
            is_last = arrives_last(gate.state_ptr, blocks, i_block, SLICES)
        if is_last:
            if SLICES > 1:  # in one order, so that the sum is the same each time
                b_sum = tl.zeros([BLOCK_K], tl.float32)
                for i_other in tl.static_range(SLICES):
                    b_sum += tl.load(partials_ptr + o_partial + i_other * BLOCK_K)
                b_logits = b_sum[None, :]
            if bias_ptr is not None:
                b_logits += tl.load(bias_ptr + o_class, mask=o_class < CLASSES, other=0.0).to(tl.float32)[None, :]
            b_rounded = b_logits.to(features_ptr.dtype.element_ty)
            b_known = tl.where((o_class < CLASSES)[None, :], b_rounded.to(tl.float32), float("-inf"))
            _, temperature = rule_of(gate)
            stats = softmax_stats(b_known, temperature, SCORE)
            b_score, b_kept = decide(stats, gate, o_row, m_row, CLASSES, SCORE)
            b_place = place(gate, i_block, o_row, m_row, b_kept, rows, valid, row_block, WINDOW)
            answer(gate, o_row, m_row, b_rounded, b_score, b_kept, o_class, CLASSES)
        if MOVES > 0 and SLICES > 1:
            is_kept, i_place = wait_for_place(gate.state_ptr, i_block)
            b_kept = is_kept.to(tl.int32) + tl.zeros([ROWS], tl.int32)
            b_place = i_place + tl.zeros([ROWS], tl.int64)
    elif i_block == 0:  # of no rows none is kept
        if gate.num_kept_ptr is not None:
            tl.store(gate.num_kept_ptr, tl.zeros([], gate.num_kept_ptr.dtype.element_ty))
    leave(gate.state_ptr, blocks, WINDOW)
    if MOVES > 0:
        if tl.max(b_kept, axis=0) != 0:
            for i_move in tl.static_range(MOVES):
                copy_rows(moves[i_move], o_row, b_place, b_kept != 0, i_slice, SLICES, UNITS[i_move], WORDS[i_move])


class Gate(NamedTuple):
    """Where scores are written, how rows are decided and, with a state, where their order goes.

    With positions, logits and scores are those of rows that leave alone, and go there, as does the exit's index.
    """

    scores_ptr: Tensor
    threshold: float = 0.0
    temperature: float = 1.0
    logits_ptr: Tensor | None = None
    exit_mask_ptr: Tensor | None = None
    decision_ptr: Tensor | None = None
    count_ptr: Tensor | None = None
    state_ptr: Tensor | None = None
    order_ptr: Tensor | None = None
    num_kept_ptr: Tensor | None = None
    positions_ptr: Tensor | None = None
    exits_ptr: Tensor | None = None
    exit_index_ptr: Tensor | None = None


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

    def blocks(self, tile: int, most_channels: int, slices: int) -> tuple[int, int]:
        """Blocks of channels and positions: a tile, with runs of 128 where memory is contiguous. So many slices have a
        block of channels each, where these are few but not so few that their runs are short."""
        if self.s_channel == 1:
            block_c = block_size(self.channels, max(32, min(128, most_channels)))
            return block_c, block_size(self.inner, tile // block_c)
        most_channels = min(most_channels, _power_within(max(1, self.channels // slices)))
        block_p = block_size(self.inner, max(128, tile // most_channels))
        while block_p > 128 and block_p * triton.cdiv(self.inner, block_p) > self.inner * 9 // 8:
            block_p //= 2  # of which less would be masked
        return block_size(self.channels, min(tile // block_p, most_channels)), block_p


def _shape_of(sizes: Sequence[int], strides: Sequence[int], channel: int) -> _Shape | None:
    """Of features of such sizes, without that of the rows; ``None`` where their positions are more than two dimensions
    in memory."""
    spans: list[tuple[int, int]] = []
    positions = [dim for dim in range(1, len(strides)) if dim != channel and sizes[dim - 1] != 1]
    for dim in sorted(positions, key=strides.__getitem__):
        size, stride = sizes[dim - 1], strides[dim]
        if spans and stride == spans[-1][0] * spans[-1][1]:
            spans[-1] = spans[-1][0] * size, spans[-1][1]
        else:
            spans.append((size, stride))
    if len(spans) > 2:
        return None
    (inner, s_inner), (outer, s_outer) = (*spans, (1, 0), (1, 0))[:2]
    return _Shape(sizes[channel - 1], outer, inner, strides[0], strides[channel], s_outer, s_inner)


class _Plan(NamedTuple):
    """How features and a head are parted among programs: some rows for one, or some for one row."""

    shape: _Shape
    align: int
    rows: int
    slices: int
    block_c: int
    block_p: int
    block_k: int
    warps: int


@lru_cache(maxsize=4096)
def _plan(
    sizes: Sequence[int], strides: Sequence[int], itemsize: int, channel: int, classes: int, share: int, most: int
) -> _Plan | None:
    """For features as :func:`_shape_of` takes them, ``share`` bytes of a row for one of at most ``most`` programs."""
    shape = _shape_of(sizes, strides, channel)
    if shape is None:
        return None
    block_k = block_size(classes, _MAX_CLASSES)
    size = max(1, shape.channels * shape.outer * shape.inner * itemsize)
    slices = _slices(size, share, most)
    tile = _TILE if slices > 1 else _TILE_BYTES // itemsize
    block_c, block_p = shape.blocks(tile, min(64, 4096 // block_k), slices)
    slices = min(slices, _power_within(max(1, triton.cdiv(shape.channels, block_c))))
    rows = 1 if slices > 1 else min(_power_within(max(1, _ROWS_BYTES // size)), _MAX_ROWS, max(1, 1024 // block_k))
    warps = 1 if block_c * block_p < 1024 else 4
    return _Plan(shape, shape.alignment(itemsize), rows, slices, block_c, block_p, block_k, warps)


def fuses(features: Tensor, weight: Tensor, pool: str) -> bool:
    """Whether :func:`exit_gate_into` takes such features and head; else a matrix product, then :func:`gate_into`.

    Every row reads the weight again, from a cache; that must not outweigh its features.
    """
    classes, channels = weight.shape
    positions = features.shape[1:].numel() // max(1, channels)
    if features.ndim <= 2 or pool != "mean" or _MAX_CLASSES * channels >= 1 << 31:  # weights are counted in int32
        return False
    return classes <= min(_MAX_CLASSES, max(32, positions))


def _slices(size: int, share: int, most: int) -> int:
    """Among how many programs a row is shared: a power of two. It depends on the row alone, as rounding does on it."""
    wanted = 1 << (triton.cdiv(max(1, size), share) - 1).bit_length()
    return min(wanted, _power_within(most))


def _most_slices() -> int:
    return 1 if launch.runs_one_by_one() else _MAX_SLICES


def _power_within(extent: int) -> int:
    """The largest power of two that is no more."""
    return 1 << (extent.bit_length() - 1)


def _with_state(gate: Gate, blocks: int, slices: int, moves: Sequence[object] = ()) -> Gate:
    if gate.state_ptr is None and (slices > 1 or moves or gate.num_kept_ptr is not None):
        gate = gate._replace(state_ptr=gate.scores_ptr.new_zeros(state_size(blocks), dtype=torch.int64))
    return gate


def gate_into(logits: Tensor, score: str, gate: Gate) -> None:
    """Score logits, decide, and order the rows where ``gate`` says how many are kept."""
    rows, classes = logits.shape
    if rows == 0:
        if gate.num_kept_ptr is not None:
            gate.num_kept_ptr.zero_()
        return
    block_k = block_size(classes, _CLASS_BLOCK)
    row_block = max(1, 512 // block_k)
    slices = _slices(classes, _CLASS_BLOCK, min(classes, _most_slices()))
    blocks = triton.cdiv(rows, row_block)
    gate = _with_state(gate, blocks, slices)
    partials = None if slices == 1 else gate.scores_ptr.new_empty(rows, 4, slices)
    with on_device_of(logits):
        launch.launch(
            gate_kernel,
            blocks * slices,
            logits,
            partials,
            gate,
            rows,
            *logits.stride(),
            CLASSES=classes,
            SCORE=score,
            ALIGN=alignment(logits.element_size(), logits.stride(0)),
            ROWS=row_block,
            SLICES=slices,
            BLOCK_K=block_k,
            WINDOW=128,
            num_warps=4,
        )


def exit_gate_into(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: str,
    score: str,
    gate: Gate,
    moves: Sequence[tuple[RowMove, int]] = (),
) -> None:
    """Pool, multiply, decide, and move the kept rows, of features and a head that :func:`fuses` takes."""
    rows, classes = features.shape[0], weight.shape[0]
    if rows == 0:
        if gate.num_kept_ptr is not None:
            gate.num_kept_ptr.zero_()
        return
    channel = 1 if layout == "channels_first" else features.ndim - 1
    numbers = features.element_size(), channel, classes, _SHARE_BYTES, _most_slices()
    plan = _plan(features.shape[1:], features.stride(), *numbers)
    if plan is None:
        features = features.contiguous()
        plan = _plan(features.shape[1:], features.stride(), *numbers)
    slices, warps = plan.slices, plan.warps
    programs = _PROGRAMS_PER_PROCESSOR * launch.num_processors(features.device)
    row_block = min(plan.rows, triton.cdiv(rows, programs))
    blocks = triton.cdiv(rows, row_block)
    gate = _with_state(gate, blocks, slices, moves)
    partials = None if slices == 1 else gate.scores_ptr.new_empty(rows, slices, plan.block_k)
    units = 32 * warps * (8 if plan.rows > 1 < warps else 4)  # copied at once: so many by each thread
    unit_blocks = tuple(block_size(move.units, max(1, units // plan.rows)) for move, _ in moves)
    with on_device_of(features):
        launch.launch(
            exit_gate_kernel,
            blocks * slices,
            features,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            partials,
            gate,
            plan.shape,
            tuple(move for move, _ in moves),
            rows,
            row_block,
            CLASSES=classes,
            SCORE=score,
            CHANNELS_LAST=plan.shape.s_channel == 1,
            ALIGN=plan.align,
            ROWS=plan.rows,
            SLICES=slices,
            BLOCK_C=plan.block_c,
            BLOCK_P=plan.block_p,
            BLOCK_K=plan.block_k,
            WINDOW=32 * warps,
            MOVES=len(moves),
            UNITS=unit_blocks,
            WORDS=tuple(max(1, unit // 4) for _, unit in moves),
            num_warps=warps,
        )
