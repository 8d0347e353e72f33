"""Which sizes of the inputs may vary in an exported file, which are equal, and how far they go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from cet.deploy.description import Range
from cet.partition.stages import Program

Place = tuple[int, int]
"""A size by (input, dimension)."""

_LEAST = 2
"""A size of one is traced as a constant, so that no graph that was traced with more holds for it."""
_LONGEST = 1 << 24
"""A size that may be as large as this may be any."""
_FAR = 4096


def sizes_that_vary(
    program: Program, inputs: Sequence[Any], is_batched: Sequence[bool], names: Sequence[str]
) -> tuple[dict[Place, str], dict[str, Range]] | None:
    """A name for each size that may vary besides the batch, the same for those that must be equal; and their ranges.

    None where sizes depend on each other in another way: no file can say that to those who read it.
    """
    places = [
        (index, dim)
        for index, known in enumerate(program.shapes)
        if known is not None
        for dim, size in enumerate(known[1])
        if size is None and not (dim == 0 and is_batched[index])
    ]
    example = {(index, dim): inputs[index].shape[dim] for index, dim in places}

    def holds(moved: Sequence[Place], size: int) -> bool:
        sizes = example | dict.fromkeys(moved, size)
        return program.guard is None or program.guard(*[sizes[place] for place in program.guarded])

    named: dict[Place, str] = {}
    ranges: dict[str, Range] = {}
    for place in places:
        if place in named:
            continue
        alike = [other for other in places if example[other] == example[place] and other not in named]
        for moved in ([place], alike):
            limits = _range(lambda size, moved=moved: holds(moved, size), example[place])  # type: ignore[misc]
            if limits is not None:
                name = f"{names[place[0]]}_{place[1]}"
                named |= dict.fromkeys(moved, name)
                ranges[name] = limits
                break
        else:
            return None
    corners = itertools.product(*((limits.least, limits.largest or _LONGEST) for limits in ranges.values()))
    for corner in corners:
        sizes = dict(zip(ranges, corner, strict=True))
        if program.guard is not None and not program.guard(*[sizes[named[place]] for place in program.guarded]):
            return None
    return named, ranges


def _range(holds: Callable[[int], bool], start: int) -> Range | None:
    """The sizes around ``start`` for which a condition holds without a gap; None for ``start`` alone."""
    least = largest = start
    while least > _LEAST and start - least < _FAR and holds(least - 1):
        least -= 1
    while largest - start < _FAR and holds(largest + 1):
        largest += 1
    if largest - start == _FAR:  # by halves from here on
        if holds(_LONGEST):
            return Range(least, None)
        beyond = _LONGEST
        while beyond - largest > 1:
            middle = (largest + beyond) // 2
            largest, beyond = (middle, beyond) if holds(middle) else (largest, middle)
    return None if least == largest else Range(least, largest)
