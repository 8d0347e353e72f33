"""One way to time: all ways of doing the same job, side by side in one run.

The set-up function of a benchmark returns a :class:`Case`: inputs, the callables that compete (its *providers*), and
the check that their results must pass before anything is timed. The providers are then timed in blocks. Within a block
each gets its turn, in random order, so that a drift of the clock speed or a busy neighbour hits all of them alike, and
ratios are taken block by block, where most of it cancels.
"""

from __future__ import annotations

import csv
import ctypes
import io
import json
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks import gpu
from cet.measure.host import commit, host_facts, versions
from cet.model.checkpoint import write_atomically

WANTED_BLOCKS = 20
MIN_BLOCKS = 7
PACKAGES = ("cet", "torch", "transformers")
NO_TIME = "not run: no time was left"

Timer = Callable[[Callable[[], object], int], float]


class WrongResultError(Exception):
    """A provider gives another result than it must; its time would mean nothing."""


@dataclass(frozen=True)
class Case:
    """What the set-up function of one benchmark point returns.

    Attributes:
        inputs: what every provider is called with.
        providers: the callables that compete, by name.
        check: takes the result of each provider and raises :class:`WrongResultError` if one is wrong.
        absent: why an optional provider is not among them, by name.
    """

    inputs: tuple[Any, ...]
    providers: Mapping[str, Callable[..., Any]]
    check: Callable[[Mapping[str, Any]], None]
    absent: Mapping[str, str] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> Case:
        """The case without these providers."""
        return replace(self, providers={name: call for name, call in self.providers.items() if name not in names})


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Spread:
        p20, median, p80 = np.percentile(values, (20, 50, 80))
        return cls(float(median), float(p20), float(p80))


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each provider, one entry per block, ``(blocks,)``."""

    seconds: Mapping[str, NDArray[np.float64]]

    @property
    def blocks(self) -> int:
        return len(next(iter(self.seconds.values())))

    def time(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> Spread:
        """How many times as long as ``baseline`` this provider takes, from the log-ratios within the blocks."""
        logs = Spread.of(np.log(self.seconds[name]) - np.log(self.seconds[baseline]))
        return Spread(float(np.exp(logs.median)), float(np.exp(logs.p20)), float(np.exp(logs.p80)))


def measure(
    case: Case,
    *,
    seconds: float,
    timer: Timer,
    seed: int = 0,
    min_blocks: int = MIN_BLOCKS,
    evict: Callable[[], object] | None = None,
) -> Timings:
    """Check the results of all providers, warm each up, and time them in blocks.

    Args:
        case: what to time.
        seconds: how long to time, warm-up not counted; slow providers take longer, until ``min_blocks`` are done.
        timer: :func:`wall_clock` or :func:`cuda_events`.
        seed: of the order within the blocks.
        min_blocks: blocks to time at least.
        evict: called before each turn, which is then a single call with cold caches, see :func:`cache_eviction`.

    Raises:
        WrongResultError: when the check of the case fails; nothing is timed then.
    """
    case.check({name: provider(*case.inputs) for name, provider in case.providers.items()})
    calls = {name: partial(provider, *case.inputs) for name, provider in case.providers.items()}
    shortest = {name: _warm_up(call, seconds / 10, timer) for name, call in calls.items()}
    share = seconds / WANTED_BLOCKS / len(calls)
    # Only the first call after an eviction finds the caches cold.
    repeats = {name: 1 if evict else max(1, round(share / shortest[name])) for name in calls}

    def turn(name: str) -> float:
        if evict:
            evict()
        return timer(calls[name], repeats[name]) / repeats[name]

    order = list(calls)
    shuffle = random.Random(seed).shuffle
    blocks: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(blocks) < min_blocks or time.perf_counter() < end:
        shuffle(order)
        blocks.append({name: turn(name) for name in order})
    return Timings({name: np.array([block[name] for block in blocks]) for name in calls})


def _warm_up(call: Callable[[], object], seconds: float, timer: Timer) -> float:
    """Call for so long, at least once; the shortest time of a call."""
    end = time.perf_counter() + seconds
    shortest = timer(call, 1)
    while time.perf_counter() < end:
        shortest = min(shortest, timer(call, 1))
    return shortest


def wall_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds that ``repeats`` calls take, on the monotonic clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def cuda_events(call: Callable[[], object], repeats: int) -> float:
    """Seconds that ``repeats`` calls take on the current CUDA stream, from an idle device to an idle device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timer_for(device: torch.device) -> Timer:
    """The timer that is right for work on ``device``."""
    return cuda_events if device.type == "cuda" else wall_clock


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep what is freed; whether it is there and does.

    By default the history of the heap decides whether a large tensor gets fresh pages at every call: in one run of the
    sensor CNN at batch 1024, ``predict`` faulted on 4,576 pages a call and the backbone on 11,603, for the same work.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def cache_eviction(device: torch.device) -> Callable[[], object]:
    """A function that reads and writes twice the size of the device's last cache."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _cpu_cache_size()
    buffer = torch.zeros(2 * size, dtype=torch.uint8, device=device)
    return lambda: buffer.add_(1)


def _cpu_cache_size() -> int:
    """Bytes of the largest cache that Linux names for a core; 64 MiB where it names none."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=64 * 1024 * 1024)


def check_close(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Refuse results that differ by more than ``tolerance`` times the largest magnitude wanted.

    Raises:
        WrongResultError: which names the provider and the difference.
    """
    if got.shape != want.shape:
        raise WrongResultError(f"{name} gives shape {tuple(got.shape)} where {tuple(want.shape)} is right")
    if want.numel() == 0:
        return
    difference = float((got - want).abs().max() / want.abs().max())
    if not difference <= tolerance:
        raise WrongResultError(f"{name} differs from the right result by {difference:.1e} of its largest value")


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark: a time or a ratio at one point; empty with a note where it was not taken."""

    quantity: str
    unit: str
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    blocks: int | None = None
    note: str = ""

    @classmethod
    def of(cls, quantity: str, unit: str, spread: Spread, blocks: int) -> Row:
        return cls(quantity, unit, spread.median, spread.p20, spread.p80, blocks)


def provenance(device: torch.device, benchmark: str) -> dict[str, Any]:
    """Where, when and with what the figures were taken."""
    host = host_facts()
    return {
        "commit": commit(Path(__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(benchmark),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else host["processor"],
        **host,
        **versions(PACKAGES),
        **({"gpu": gpu.state(device)} if device.type == "cuda" else {}),
    }


def _command(benchmark: str) -> str:
    """The command line of this run, less where it writes to."""
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        if argument == "--output":
            next(arguments, None)
        elif not argument.startswith("--output="):
            kept.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *kept])


def write_results(
    folder: Path,
    name: str,
    rows: Sequence[tuple[Mapping[str, Any], Row]],
    description: Mapping[str, Any],
    figure: Figure,
) -> list[Path]:
    """Write ``name.csv``, ``name.json`` and ``name.png`` into ``folder``, each atomically.

    Args:
        folder: an existing folder.
        name: of the benchmark.
        rows: the point of each figure, with the same keys for all, and the figure.
        description: :func:`provenance` and settings, for the JSON file; commit, date, device and versions are repeated
            in every row of the CSV file.
        figure: the plot.
    """
    repeated = {key: description[key] for key in ("commit", "date", "device", "cores", "threads", *PACKAGES)}
    table = io.StringIO()
    lines = [{**point, **asdict(row), **repeated} for point, row in rows]
    writer = csv.DictWriter(table, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in line.items()} for line in lines)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    contents = {
        f"{name}.csv": table.getvalue().encode(),
        f"{name}.json": (json.dumps(description, indent=2) + "\n").encode(),
        f"{name}.png": picture.getvalue(),
    }
    for file, content in contents.items():
        write_atomically(folder / file, content)
    return [folder / file for file in contents]


def _rounded(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
