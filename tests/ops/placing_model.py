"""A model of what the programs of a launch do to each other: all interleavings, on a memory that is as weak as a GPU's.

Each program runs on a processor of its own, whose stores go to a buffer and reach the memory in any order unless a
release waits for them, and whose plain loads may be served by a line that was in its cache before, unless an acquire
threw that out. Atomic operations and volatile loads go to the memory. At most ``resident`` programs run at once, and
whoever runs stays until its end. Which waiting program starts next is open too.

Explored are the steps of :mod:`cet.kernels.placing`, and of one launch after another on the same state. A fault is a
wrong place, a part that is not seen when parts are added up, a state that is not clear in the end, or programs that all
wait for ever. ``without`` leaves one rule out, which must then be missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

RULES = ("turns", "release", "acquire", "done")


class Program(NamedTuple):
    """One program.

    Attributes:
        step: what it does next; ``"waits"`` before it has begun.
        turn: its turn.
        buffer: blocks' parts that it has stored and that are not in memory yet, as ``(row, slice)``.
        stale: whether its cache may hold the parts as they were.
        look: the next block to look at, from the right.
        before: how many kept rows it has counted.
    """

    step: str
    turn: int = -1
    buffer: frozenset[tuple[int, int]] = frozenset()
    stale: bool = True
    look: int = 0
    before: int = 0


class State(NamedTuple):
    """Everything: programs, and the memory."""

    programs: tuple[Program, ...]
    turns: int
    done: int
    words: tuple[tuple[str, int], ...]  # of each row: what is known, and the count
    arrivals: tuple[int, ...]
    parts: frozenset[tuple[int, int]]  # in memory


class FaultError(Exception):
    """What went wrong."""


class Model:
    """A launch of ``len(kept)`` rows, each shared by ``slices`` programs; ``kept`` tells which rows are kept."""

    def __init__(self, kept: tuple[int, ...], slices: int = 1, resident: int = 99, without: str = "") -> None:
        assert without in ("", *RULES), without
        self.kept, self.slices, self.resident, self.without = kept, slices, resident, without
        self.rows = len(kept)

    def first(self) -> State:
        rows = self.rows
        programs = tuple(Program("waits") for _ in range(rows * self.slices))
        return State(programs, 0, 0, (("", 0),) * rows, (0,) * rows, frozenset())

    def explore(self) -> int:
        """How many states there are.

        Raises:
            FaultError: where one of them is wrong.
        """
        seen: set[State] = set()
        pending = [self.first()]
        while pending:
            state = pending.pop()
            if state in seen:
                continue
            seen.add(state)
            following = list(self.after(state))
            if not following and any(p.step != "ended" for p in state.programs):
                raise FaultError("all wait for ever")
            if not following:
                self.check_end(state)
            pending += following
        return len(seen)

    def check_end(self, state: State) -> None:
        clear = (0, 0, (("", 0),) * self.rows, (0,) * self.rows)
        if (state.turns, state.done, state.words, state.arrivals) != clear:
            raise FaultError("the state is not clear for the next launch")

    def after(self, state: State) -> Iterator[State]:
        running = sum(p.step not in ("waits", "ended") for p in state.programs)
        for index, program in enumerate(state.programs):
            for part in program.buffer:  # any store may reach the memory now
                later = program._replace(buffer=program.buffer - {part})
                yield self.replaced(state, index, later)._replace(parts=state.parts | {part})
            if program.step == "ended" or (program.step == "waits" and running >= self.resident):
                continue
            yield from getattr(self, program.step.replace(" ", "_"))(state, index, program)

    def replaced(self, state: State, index: int, program: Program) -> State:
        programs = (*state.programs[:index], program, *state.programs[index + 1 :])
        return state._replace(programs=programs)

    # The steps, each one access to memory.

    def waits(self, state: State, index: int, program: Program) -> Iterator[State]:
        turn = index if self.without == "turns" else state.turns
        begun = program._replace(step="stores", turn=turn)
        yield self.replaced(state, index, begun)._replace(turns=state.turns + 1)

    def stores(self, state: State, index: int, program: Program) -> Iterator[State]:
        row, part = divmod(program.turn, self.slices)
        stored = program._replace(buffer=frozenset([(row, part)]), step="arrives")
        if self.slices == 1:
            stored = program._replace(step="tells block")
        yield self.replaced(state, index, stored)

    def arrives(self, state: State, index: int, program: Program) -> Iterator[State]:
        if program.buffer and self.without != "release":
            return  # the addition waits for what was stored
        row = program.turn // self.slices
        arrivals = (*state.arrivals[:row], state.arrivals[row] + 1, *state.arrivals[row + 1 :])
        is_last = arrivals[row] == self.slices
        arrived = program._replace(
            step="sums" if is_last else "waits for word",
            stale=self.without == "acquire",
        )
        yield self.replaced(state, index, arrived)._replace(arrivals=arrivals)

    def sums(self, state: State, index: int, program: Program) -> Iterator[State]:
        row = program.turn // self.slices
        wanted = {(row, part) for part in range(self.slices)}
        if program.stale or not wanted <= state.parts | program.buffer:
            raise FaultError("a part is not seen when parts are added up")
        yield self.replaced(state, index, program._replace(step="tells block"))

    def tells_block(self, state: State, index: int, program: Program) -> Iterator[State]:
        row = program.turn // self.slices
        told = self.replaced(state, index, program._replace(step="looks back", look=row - 1))
        yield self.with_word(told, row, ("block", self.kept[row]))

    def looks_back(self, state: State, index: int, program: Program) -> Iterator[State]:
        row = program.turn // self.slices
        if program.look < 0:
            if program.before != sum(self.kept[:row]):
                raise FaultError("a row has a wrong place")
            told = self.replaced(state, index, program._replace(step="leaves"))
            yield self.with_word(told, row, ("total", program.before + self.kept[row]))
            return
        known, count = state.words[program.look]
        if known:
            look = -1 if known == "total" else program.look - 1
            yield self.replaced(state, index, program._replace(look=look, before=program.before + count))

    def waits_for_word(self, state: State, index: int, program: Program) -> Iterator[State]:
        row = program.turn // self.slices
        known, count = state.words[row]
        if known == "total":
            if count != sum(self.kept[: row + 1]):
                raise FaultError("a row has a wrong place")
            yield self.replaced(state, index, program._replace(step="leaves"))

    def leaves(self, state: State, index: int, program: Program) -> Iterator[State]:
        done = state.done + 1
        # Who has the last turn need not be the last that looks.
        is_last = (program.turn + 1 if self.without == "done" else done) == len(state.programs)
        ended = self.replaced(state, index, program._replace(step="ended"))._replace(done=done)
        if is_last:
            ended = ended._replace(turns=0, done=0, words=(("", 0),) * self.rows, arrivals=(0,) * self.rows)
        yield ended

    def with_word(self, state: State, row: int, word: tuple[str, int]) -> State:
        return state._replace(words=(*state.words[:row], word, *state.words[row + 1 :]))
