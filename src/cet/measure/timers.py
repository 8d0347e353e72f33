"""Seconds of a call: the timer of each device, warm-up by time, and what decides whether caches and pages are warm."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `cet energy run` measures any program, and does without torch
    import torch

Call = Callable[[], object]

Timer = Callable[[Call, int], float]
"""Takes a call and how often to make it, and returns the seconds that all of them took together."""


def wall_clock(call: Call, repeats: int) -> float:
    """The seconds that ``repeats`` calls take, on the monotonic clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def thread_clock(call: Call, repeats: int) -> float:
    """The seconds that a processor works for the calling thread during ``repeats`` calls, others left out."""
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return time.thread_time() - start


def cuda_events(call: Call, repeats: int) -> float:
    """The seconds that ``repeats`` calls take on the current CUDA stream, from an idle device to an idle device."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


TIMERS: dict[str, Timer] = {"cpu": wall_clock, "cuda": cuda_events}


def timer_for(device: torch.device) -> Timer:
    """The timer that is right for work on ``device``.

    Raises:
        ValueError: for a device that is neither a CPU nor a CUDA device.
    """
    if device.type not in TIMERS:
        raise ValueError(f"work on {device} cannot be timed; use one of the devices {', '.join(TIMERS)}")
    return TIMERS[device.type]


def warm_up(call: Call, timer: Timer, seconds: float) -> float:
    """Repeat a call for so many seconds, at least once, and return the shortest time of one call in seconds."""
    end = time.perf_counter() + seconds
    shortest = timer(call, 1)
    while time.perf_counter() < end:
        shortest = min(shortest, timer(call, 1))
    return shortest


def cache_eviction(device: torch.device) -> Call:
    """Return a function that reads and writes twice the size of the last cache of ``device``."""
    import torch

    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _cpu_cache_size()
    buffer = torch.zeros(2 * size, dtype=torch.uint8, device=device)
    return lambda: buffer.add_(1)


def _cpu_cache_size() -> int:
    """Bytes of the largest cache that Linux names for a core; 64 MiB where it names none."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=64 * 1024 * 1024)


def keep_freed_memory() -> bool:
    """Make the allocator of glibc keep all memory that is freed, and return whether there is one and it does.

    By default the history of the heap decides whether a large tensor gets fresh pages at every call: in one run of the
    sensor CNN at batch 1024, ``predict`` faulted on 4,576 pages a call and the backbone on 11,603, for the same work.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))
