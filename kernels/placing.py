"""Where rows go: the programs of a launch find the places of their rows among the kept ones in one pass.

By decoupled look-back (Merrill and Garland 2016, "Single-pass Parallel Prefix Scan with Decoupled Look-back",
NVIDIA NVR-2016-002). The programs of a launch share a state of int64 words, which is zero before and after it:

    turns taken | turns done | a word for each block of rows | arrivals at each block

* A program takes a turn, and works on the block that it names. So whoever has a later turn knows that all before it
  have begun, and will not wait for it: waiting for an earlier block comes to an end, in whatever order programs start.
* A word holds a state and the count that belongs to it, written and read at once: nothing else must be ordered by it.
  First comes the count of the block's kept rows, so that nobody waits for a wait; then that of all up to it.
* A block may be shared by ``SLICES`` programs, no more than a device runs at once, with consecutive turns. Each writes
  its part and arrives: an addition that releases what it wrote. Who arrives last acquires, through the chain of
  additions, what all have written, and decides. Others may wait for the block's word: those for which they wait have
  turns at most ``SLICES`` later, and so find room on the device beside them.
* Behind its last access a program adds one to the turns done, releasing; the last one acquires and clears all words.

``tests/ops/placing_model.py`` explores all interleavings of this, and finds what goes wrong without any one of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

_OF_BLOCK = tl.constexpr(1)  # states; 0 is not known yet
_UP_TO_BLOCK = tl.constexpr(2)
HEADER = 2  # words before those of the blocks


def state_size(blocks: int) -> int:
    """Words of the state for so many blocks."""
    return HEADER + 2 * blocks


@triton.jit
def take_turn(state_ptr):
    """The number of this program; without a state programs are on their own."""
    turn = tl.program_id(0).to(tl.int64)
    if state_ptr is not None:
        turn = tl.atomic_add(state_ptr, 1, sem="relaxed", scope="gpu")
    return turn


@triton.jit
def arrives_last(state_ptr, blocks, i_block, SLICES: tl.constexpr):
    """Whether this program is the last of those that share a block, and sees what they have written."""
    arrivals_ptr = state_ptr + 2 + blocks + i_block
    tl.debug_barrier()  # what all threads wrote comes before the addition, which one of them does
    return tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == SLICES - 1


@triton.jit
def word_of(count, is_kept, STATE: tl.constexpr):
    """Of a block with one row ``is_kept`` tells whether that is kept."""
    return count.to(tl.int64) * 8 + is_kept.to(tl.int64) * 4 + STATE


@triton.jit
def kept_before(state_ptr, i_block, num_kept, is_kept, WINDOW: tl.constexpr):
    """Tells others how many rows of a block are kept; returns how many are before it, and tells that too.

    It looks at ``WINDOW`` blocks at a time, as many as it has threads: then each word is loaded by one thread, and what
    is made of them all is the same for all threads. Two copies of one word could differ, as others write.
    """
    words_ptr = state_ptr + 2
    tl.atomic_xchg(words_ptr + i_block, word_of(num_kept, is_kept, _OF_BLOCK), sem="relaxed", scope="gpu")
    o_lane = tl.arange(0, WINDOW)
    before = tl.zeros([], tl.int64)
    unseen = i_block
    while unseen > 0:
        o_block = unseen - 1 - o_lane  # the nearest first
        b_word = tl.load(words_ptr + o_block, mask=o_block >= 0, other=_UP_TO_BLOCK, volatile=True)
        b_state = b_word & 3
        first_total = tl.min(tl.where(b_state == _UP_TO_BLOCK, o_lane, WINDOW), axis=0)
        first_unknown = tl.min(tl.where(b_state == 0, o_lane, WINDOW), axis=0)
        seen = tl.minimum(first_total + 1, first_unknown)
        before += tl.sum(tl.where(o_lane < seen, b_word >> 3, 0), axis=0)
        unseen = tl.where(first_total < first_unknown, 0, unseen - seen)
    word = word_of(before + num_kept, is_kept, _UP_TO_BLOCK)
    tl.atomic_xchg(words_ptr + i_block, word, sem="relaxed", scope="gpu")
    return before


@triton.jit
def wait_for_place(state_ptr, i_block):
    """Of a block with one row, which another program decides: whether it is kept, and its place."""
    word = tl.zeros([], tl.int64)
    while word & 3 != _UP_TO_BLOCK:  # an addition of nothing: one thread reads for all
        word = tl.atomic_add(state_ptr + 2 + i_block, 0, sem="relaxed", scope="gpu")
    is_kept = word >> 2 & 1
    return is_kept, (word >> 3) - is_kept


@triton.jit
def leave(state_ptr, blocks, BLOCK: tl.constexpr):
    """This program will not look at the state any more; the last one clears it."""
    if state_ptr is not None:
        tl.debug_barrier()
        if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            for i_word in range(0, 2 + 2 * blocks, BLOCK):
                o_word = i_word + tl.arange(0, BLOCK)
                tl.store(state_ptr + o_word, tl.zeros([BLOCK], tl.int64), mask=o_word < 2 + 2 * blocks)
