"""Rounds and timers on callables whose times are known."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cet.measure.rounds import MIN_ROUNDS, Timings, rounds, time_calls
from cet.measure.statistics import Spread
from cet.measure.timers import cache_eviction, thread_clock, timer_for, wall_clock

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


class ScriptedTimer:
    """Calls once, and reports the seconds that were given for the provider, times the drift so far."""

    def __init__(self, seconds: dict[str, float], drift: float = 1.0) -> None:
        self.seconds = seconds
        self.drift = drift
        self.turns: list[str] = []

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        name = call()
        self.turns.append(name)
        return self.seconds[name] * repeats * self.drift ** len(self.turns)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_known_ratio_is_measured(device: torch.device) -> None:
    calls = {"short": partial(time.sleep, 0.02), "long": partial(time.sleep, 0.08)}
    timings = time_calls(calls, timer_for(device), seconds=0.01)
    assert timings.num_rounds == MIN_ROUNDS
    assert 0.019 < timings.time("short").median < 0.04
    assert 3 < timings.ratio("long", "short").median < 5


def test_a_steady_drift_leaves_ratios_nearly_alone() -> None:
    timer = ScriptedTimer({"a": 1.0, "b": 3.0}, drift=1.01)
    timings = time_calls({"a": lambda: "a", "b": lambda: "b"}, timer, seconds=1e-6, min_rounds=100)
    assert timings.time("a").p80 / timings.time("a").p20 > 2
    assert timings.ratio("b", "a").median == pytest.approx(3, rel=0.011)


def test_ratios_pair_the_rounds_and_invert() -> None:
    seconds = {"a": np.array([1.0, 10.0, 100.0]), "b": np.array([2.0, 10.0, 400.0])}
    timings = Timings(seconds)
    ratio = timings.ratio("b", "a")
    assert (ratio.p20, ratio.median, ratio.p80) == pytest.approx((2**0.4, 2, 2 * 2**0.6))
    assert timings.ratio("a", "b").median == pytest.approx(1 / ratio.median)
    assert timings.time("a") == Spread(10.0, pytest.approx(4.6), pytest.approx(64.0))


def test_the_order_within_rounds_is_random_and_seeded() -> None:
    names = ("a", "b", "c")

    def orders(seed: int) -> list[tuple[str, ...]]:
        timer = ScriptedTimer(dict.fromkeys(names, 1.0))
        calls = {name: partial(str, name) for name in names}
        timings = time_calls(calls, timer, seconds=1e-6, seed=seed, min_rounds=60)
        timed = timer.turns[-3 * timings.num_rounds :]
        return [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]

    rounds = orders(seed=0)
    assert all(sorted(round_) == list(names) for round_ in rounds)
    assert len(Counter(rounds)) == 6
    assert rounds[:60] == orders(seed=0)[:60]
    assert rounds[:60] != orders(seed=1)[:60]


def test_short_calls_are_repeated_within_a_turn_and_counted_out() -> None:
    timer = ScriptedTimer({"fast": 1e-5, "slow": 1e-3})
    timings = time_calls({"fast": lambda: "fast", "slow": lambda: "slow"}, timer, seconds=0.1)
    assert timings.time("fast").median == pytest.approx(1e-5)
    assert timings.ratio("slow", "fast").median == pytest.approx(100)


def test_cold_turns_are_single_calls_each_after_an_eviction() -> None:
    events: list[str] = []
    calls = {"a": lambda: events.append("a"), "b": lambda: events.append("b")}
    timings = time_calls(calls, wall_clock, seconds=0.01, evict=lambda: events.append("evict"), min_rounds=5)
    timed = events[events.index("evict") :]
    assert timed[::2] == ["evict"] * (2 * timings.num_rounds)
    assert "evict" not in timed[1::2]


def test_eviction_goes_over_more_than_the_last_cache() -> None:
    buffer = cache_eviction(torch.device("cpu"))()
    assert isinstance(buffer, torch.Tensor)
    sizes = [int(f.read_text().strip()[:-1]) for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    assert buffer.numel() >= 2 * 1024 * max(sizes, default=1)


def test_freed_memory_is_kept() -> None:
    """In a process of its own, as it holds for the whole process."""
    program = """
import resource, numpy
from cet.measure.timers import keep_freed_memory
kept = keep_freed_memory()
numpy.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(1 << 23)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    kept, faults = run.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc"), run.stderr
    assert kept == "False" or int(faults) < 100  # of 16,384 pages


def test_a_table_of_stages_and_batch_sizes_is_timed() -> None:
    seconds = {(stage, batch): stage * batch for stage in (1.0, 2.0) for batch in (1, 8)}
    clock: list[float] = []

    def timer(call: Callable[[], Any], repeats: int) -> float:
        call()
        return clock.pop() * repeats

    calls = {name: partial(clock.append, value) for name, value in seconds.items()}
    timings = time_calls(calls, timer, seconds=1e-6)
    assert {name: timings.time(name).median for name in timings.seconds} == seconds
    assert timings.ratio((2.0, 8), (1.0, 1)).median == pytest.approx(16)


def test_rounds_last_as_long_as_asked_and_hold_any_names(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    names = [("stage", 1), ("stage", 8)]
    found = []
    for order in rounds(names, np.random.default_rng(0), min_rounds=3, seconds=5.0):
        found.append(order)
        clock[0] += 1.0
    assert len(found) == 5
    assert all(sorted(order) == names for order in found)
    assert len(list(rounds(names, np.random.default_rng(0), min_rounds=3))) == 3


def test_a_device_without_a_timer_is_refused() -> None:
    with pytest.raises(ValueError, match="work on meta cannot be timed; use one of the devices cpu, cuda"):
        timer_for(torch.device("meta"))


def test_the_clock_of_a_thread_leaves_out_what_it_waits_for() -> None:
    assert thread_clock(lambda: time.sleep(0.05), 2) < 0.05
    end = time.thread_time() + 0.02

    def work() -> None:
        while time.thread_time() < end:
            pass

    assert thread_clock(work, 1) > 0.01
