"""Rounds: all that is compared takes one turn in each, in random order.

A drift of the clock speed or a busy neighbour then hits all of them alike, and of ratios that are taken within the
rounds most of it cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from cet.measure.statistics import Floats, Spread
from cet.measure.timers import Call, Timer, warm_up

TARGET_ROUNDS = 20
"""The number of rounds into which the time is divided."""
MIN_ROUNDS = 7
"""The number of rounds that are taken however long they last."""

Name = TypeVar("Name", bound=Hashable)


def rounds(
    names: Sequence[Name], rng: np.random.Generator, *, min_rounds: int, seconds: float = 0.0
) -> Iterator[list[Name]]:
    """The names in a new random order for each round, for so many rounds, and on until so many seconds have passed."""
    end = time.perf_counter() + seconds
    done = 0
    while done < min_rounds or time.perf_counter() < end:
        yield [names[index] for index in rng.permutation(len(names))]
        done += 1


@dataclass(frozen=True)
class Timings(Generic[Name]):
    """Seconds per call of each of the calls, ``(n,)``, one entry per round."""

    seconds: Mapping[Name, Floats]

    @classmethod
    def of(cls, table: Sequence[Mapping[Name, float]]) -> Timings[Name]:
        """From the seconds of each round by name."""
        return cls({name: np.array([row[name] for row in table]) for name in table[0]})

    @property
    def num_rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def time(self, name: Name) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: Name, baseline: Name) -> Spread:
        """How many times as long as ``baseline`` this call takes, from the log-ratios within the rounds."""
        logs = Spread.of(np.log(self.seconds[name]) - np.log(self.seconds[baseline]))
        return Spread(float(np.exp(logs.median)), float(np.exp(logs.p20)), float(np.exp(logs.p80)))


def time_calls(
    calls: Mapping[Name, Call],
    timer: Timer,
    *,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    evict: Callable[[], object] | None = None,
    seed: int = 0,
) -> Timings[Name]:
    """Warm each call up, and time all of them in rounds.

    Args:
        calls: what to time, by name.
        timer: the one of the device that the calls run on, see :func:`cet.measure.timers.timer_for`.
        seconds: how long to time, warm-up not counted; slow calls take longer, until ``min_rounds`` are done.
        min_rounds: the number of rounds to time at least.
        evict: is called before each turn, which is then a single call with cold caches, see
            :func:`cet.measure.timers.cache_eviction`.
        seed: of the order within the rounds.
    """
    shortest = {name: warm_up(call, timer, seconds / 10) for name, call in calls.items()}
    share = seconds / TARGET_ROUNDS / len(calls)
    # Only the first call after an eviction finds the caches cold.
    repeats = {name: 1 if evict else max(1, round(share / shortest[name])) for name in calls}

    def turn(name: Name) -> float:
        if evict:
            evict()
        return timer(calls[name], repeats[name]) / repeats[name]

    orders = rounds(list(calls), np.random.default_rng(seed), min_rounds=min_rounds, seconds=seconds)
    table = [{name: turn(name) for name in order} for order in orders]
    return Timings.of([{name: row[name] for name in calls} for row in table])
