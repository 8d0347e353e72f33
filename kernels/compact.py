"""Stable compaction: which rows are kept, and the move of their bytes by (source, destination)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cet.kernels.launch import VECTOR_BYTES, block_size, launch, on_device_of

SCAN_BLOCK = 1024
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32}
_TILE_UNITS = 1024  # what a program copies: 8 units of up to 16 bytes in flight for each of its 128 threads
MAX_MOVES = 8  # tensors in one launch

RowPairs = Sequence[tuple[Tensor, Tensor]]


@triton.jit(do_not_specialize=["rows"])
def order_rows_kernel(exit_mask_ptr, order_ptr, num_kept_ptr, rows, BLOCK: tl.constexpr):
    """One program writes the indices of the kept rows, and behind room for ``rows`` of them those of the others."""
    before = tl.zeros([], tl.int64)
    for i_row in range(0, rows, BLOCK):
        o_row = i_row + tl.arange(0, BLOCK)
        m_row = o_row < rows
        b_kept = (tl.load(exit_mask_ptr + o_row, mask=m_row, other=1) == 0).to(tl.int32)
        b_rank = before + tl.cumsum(b_kept, axis=0) - b_kept  # how many of the rows before are kept
        b_place = tl.where(b_kept != 0, b_rank, rows + o_row - b_rank)
        tl.store(order_ptr + b_place, o_row.to(order_ptr.dtype.element_ty), mask=m_row)
        before += tl.sum(b_kept, axis=0)
    tl.store(num_kept_ptr, before.to(num_kept_ptr.dtype.element_ty))


@triton.jit
def copy_units(move, i_outer, b_source, b_target, o_unit, m_row, WORDS: tl.constexpr):
    """Units ``(UNITS,)`` of rows ``(ROWS,)``, which are ``b_source`` in the source and ``b_target`` in the target."""
    b_source = i_outer * move.s_source_outer + b_source * move.s_source_row
    b_target = i_outer * move.s_target_outer + b_target * move.s_target_row
    # The product with WORDS lets the compiler see that a unit is aligned as a whole, whatever the strides.
    o_word = tl.arange(0, WORDS)[None, None, :]
    o_from = (b_source[:, None, None] + o_unit[None, :, None] * move.s_source_unit) * WORDS + o_word
    o_to = (b_target[:, None, None] + o_unit[None, :, None] * move.s_target_unit) * WORDS + o_word
    mask = m_row[:, None, None] & (o_unit < move.units)[None, :, None]
    tl.store(move.target_ptr + o_to, tl.load(move.source_ptr + o_from, mask=mask), mask=mask)


@triton.jit
def copy_rows(move, b_source, b_target, m_row, i_slice, SLICES: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr):
    """Every ``SLICES``-th tile of some rows."""
    unit_tiles = tl.cdiv(move.units, UNITS)
    for i_tile in range(i_slice, move.outer * unit_tiles, SLICES):
        o_unit = i_tile % unit_tiles * UNITS + tl.arange(0, UNITS)
        copy_units(move, i_tile // unit_tiles, b_source, b_target, o_unit, m_row, WORDS)


@triton.jit(do_not_specialize=["rows", "source_rows", "target_rows"])
def gather_and_scatter_rows_kernel(
    moves,
    order_ptr,
    positions_ptr,
    num_kept_ptr,
    count_ptr,
    rows,
    source_rows,
    target_rows,
    MOVES: tl.constexpr,
    EXITED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Each move is ``(outer, rows, units)``, a unit being ``WORDS`` words.

    One of kept rows: ``target[:, j] = source[:, order[0, j]]`` for ``j < num_kept``. One of rows that leave:
    ``target[:, positions[order[1, j]]] = source[:, order[1, j]]`` for ``j < count - num_kept``. Where the numbers of
    rows are given, a row that is not in the source or has no place in the target is left out.
    """
    i_tile = tl.program_id(0).to(tl.int64)
    num_kept = 0
    count = rows
    if num_kept_ptr is not None:
        num_kept = tl.load(num_kept_ptr)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    for i_move in tl.static_range(MOVES):
        move = moves[i_move]
        unit_tiles = tl.cdiv(move.units, UNITS[i_move])
        row_tiles = tl.cdiv(rows, ROWS[i_move])
        tiles = move.outer * row_tiles * unit_tiles
        if (i_tile >= 0) & (i_tile < tiles):
            end = count - num_kept if EXITED[i_move] else num_kept
            i_row = i_tile // unit_tiles % row_tiles * ROWS[i_move]
            if i_row < end:
                o_row = i_row + tl.arange(0, ROWS[i_move])
                m_row = o_row < end
                o_order = rows + o_row if EXITED[i_move] and num_kept_ptr is not None else o_row
                b_source = o_row
                if order_ptr is not None:
                    b_source = tl.load(order_ptr + o_order, mask=m_row, other=0).to(tl.int64)
                if source_rows is not None:
                    m_row &= (b_source >= 0) & (b_source < source_rows)
                b_target = o_row
                if EXITED[i_move]:
                    b_target = b_source
                    if positions_ptr is not None:
                        b_target = tl.load(positions_ptr + b_source, mask=m_row, other=0).to(tl.int64)
                if target_rows is not None:
                    m_row &= (b_target >= 0) & (b_target < target_rows)
                i_outer = i_tile // unit_tiles // row_tiles
                o_unit = i_tile % unit_tiles * UNITS[i_move] + tl.arange(0, UNITS[i_move])
                copy_units(move, i_outer, b_source, b_target, o_unit, m_row, WORDS[i_move])
        i_tile -= tiles  # the next move's programs come behind


class RowMove(NamedTuple):
    """One tensor whose rows move, seen as ``(outer, rows, units)``; strides in units.

    What changes with the number of rows is not here, because another divisibility would compile another kernel.
    """

    source_ptr: object
    target_ptr: object
    outer: int
    units: int
    s_source_outer: int
    s_source_row: int
    s_source_unit: int
    s_target_outer: int
    s_target_row: int
    s_target_unit: int


class _Span(NamedTuple):
    """Some dimensions seen as one: its size, and its stride in the source and in the target."""

    size: int
    source: int
    target: int


def _as_one(dims: Sequence[_Span]) -> _Span | None:
    """The dimensions, outermost first, as one; ``None`` where their entries are not evenly apart."""
    span = _Span(1, 0, 0)
    for dim in reversed(dims):
        if dim.size == 1:
            continue
        if span.size == 1:
            span = dim
        elif dim[1:] == (span.size * span.source, span.size * span.target):
            span = span._replace(size=span.size * dim.size)
        else:
            return None
    return span


def as_move(source: Tensor, target: Tensor, dim: int) -> tuple[RowMove, int] | None:
    """The move and the bytes of its unit; ``None`` where what lies on one side of the rows is not one dimension."""
    offset = (source.data_ptr() | target.data_ptr()) % VECTOR_BYTES
    sizes = source.shape[:dim], source.shape[dim + 1 :]
    extents = _extents(*sizes, source.stride(), target.stride(), source.element_size(), offset)
    if extents is None:
        return None
    unit = extents[-1]
    word = _WORDS[min(unit, 4)]
    return RowMove(triton.reinterpret(source, word), triton.reinterpret(target, word), *extents[:-1]), unit


@lru_cache(maxsize=4096)
def _extents(
    before: Sequence[int],
    behind: Sequence[int],
    source: Sequence[int],
    target: Sequence[int],
    itemsize: int,
    offset: int,
) -> tuple[int, ...] | None:
    """The numbers of a :class:`RowMove`, then the bytes of a unit, by the sizes before and behind the rows, strides,
    and how far from a multiple of 16 bytes the tensors begin: whatever the number of rows."""
    dim = len(before)
    spans = [_Span(*each) for each in zip((*before, 0, *behind), source, target, strict=True)]
    order = sorted(range(len(spans)), key=lambda d: -target[d])  # outermost first
    split = order.index(dim)
    outer, inner = _as_one([spans[d] for d in order[:split]]), _as_one([spans[d] for d in order[split + 1 :]])
    if outer is None or inner is None:
        return None
    unit = itemsize
    units = inner.size
    s_source, s_target = [outer.source, source[dim]], [outer.target, target[dim]]
    s_unit = inner[1:]
    if inner.size == 1 or s_unit == (1, 1):
        unit = math.gcd(VECTOR_BYTES, offset, *(itemsize * extent for extent in (units, *s_source, *s_target)))
        units = units * itemsize // unit
        s_source, s_target = ([stride * itemsize // unit for stride in strides] for strides in (s_source, s_target))
        s_unit = 1, 1
    return outer.size, units, *s_source, s_unit[0], *s_target, s_unit[1], unit


def moves_into(
    kept: Sequence[tuple[RowMove, int]],
    exited: Sequence[tuple[RowMove, int]],
    rows: int,
    order: Tensor | None,
    positions: Tensor | None,
    num_kept: Tensor | None,
    count: Tensor | None,
    source_rows: int | None = None,
    target_rows: int | None = None,
) -> None:
    """Move kept rows, and those that leave; ``order`` is ``(2, rows)``; ``(rows,)`` or None if none is kept.

    The last two are for indices that a caller made: those out of range are left out.
    """
    all_moves = [(*move, False) for move in kept] + [(*move, True) for move in exited]
    for begin in range(0, len(all_moves), MAX_MOVES):
        moves, units, exited_flags = zip(*all_moves[begin : begin + MAX_MOVES], strict=True)
        unit_blocks = tuple(block_size(move.units, _TILE_UNITS) for move in moves)
        row_blocks = tuple(_TILE_UNITS // block for block in unit_blocks)
        programs = sum(
            move.outer * triton.cdiv(rows, row_block) * triton.cdiv(move.units, unit_block)
            for move, row_block, unit_block in zip(moves, row_blocks, unit_blocks, strict=True)
        )
        with on_device_of(order if order is not None else positions):
            launch(
                gather_and_scatter_rows_kernel,
                programs,
                moves,
                order,
                positions,
                num_kept,
                count,
                rows,
                source_rows,
                target_rows,
                MOVES=len(moves),
                EXITED=exited_flags,
                ROWS=row_blocks,
                UNITS=unit_blocks,
                WORDS=tuple(max(1, unit // 4) for unit in units),
            )


def moves_of(pairs: RowPairs) -> list[tuple[RowMove, int]]:
    """Of pairs whose rows are one block of memory, laid out alike."""
    moves = [as_move(source, target, 0) for source, target in pairs if source.numel() > 0]
    assert all(move is not None for move in moves)
    return moves


def scatter_rows(output: Tensor, rows: Tensor, index: Tensor, positions: Tensor | None) -> None:
    """:func:`cet.ops.scatter_rows` of contiguous tensors; what is out of range is not written."""
    if index.shape[0] > 0 and output.numel() > 0:
        rows_in_all = rows.shape[0], output.shape[0]
        moves_into([], [as_move(rows, output, 0)], index.shape[0], index, positions, None, None, *rows_in_all)


def order_rows_into(exit_mask: Tensor, order: Tensor, num_kept: Tensor) -> None:
    with on_device_of(exit_mask):
        launch(order_rows_kernel, 1, exit_mask, order, num_kept, exit_mask.shape[0], BLOCK=SCAN_BLOCK)
