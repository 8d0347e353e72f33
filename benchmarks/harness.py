"""What all benchmarks share: cases whose results are checked before they are timed, and the files of results.

The set-up function of a benchmark returns a :class:`Case`: inputs, the callables that compete (its *providers*), and
the check that their results must pass before anything is timed.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure

from benchmarks import gpu
from cet.files import write_atomically
from cet.measure.host import commit, host_facts, versions
from cet.measure.rounds import Timings, time_calls
from cet.measure.statistics import Spread
from cet.measure.timers import Timer

PACKAGES = ("cet", "torch", "transformers")
NO_TIME = "not run: no time was left"
NOT_TIMED = "not timed: "


class WrongResultError(Exception):
    """A provider gives another result than it must; its time would mean nothing."""


def failure(error: Exception) -> str:
    """The note of a point that failed: its figures are missing, and those of other points are not lost with them."""
    text = str(error) if isinstance(error, WrongResultError) else f"{type(error).__name__}: {error}"
    return NOT_TIMED + " ".join(text.split())[:200]


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


def measure(case: Case, timer: Timer, **settings: Any) -> Timings[str]:
    """Check the results of all providers, then time them by :func:`cet.measure.rounds.time_calls`.

    Raises:
        WrongResultError: when the check of the case fails; nothing is timed then.
    """
    case.check({name: provider(*case.inputs) for name, provider in case.providers.items()})
    calls = {name: partial(provider, *case.inputs) for name, provider in case.providers.items()}
    return time_calls(calls, timer, **settings)


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
    rounds: int | None = None
    note: str = ""

    @classmethod
    def of(cls, quantity: str, unit: str, spread: Spread, num_rounds: int) -> Row:
        return cls(quantity, unit, spread.median, spread.p20, spread.p80, num_rounds)


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


def results_folder(output: Path) -> Path:
    """Make the folder for the results where it is missing, and refuse one that takes no files."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written ({error.strerror}); give another --output") from error
    return output


def write_results(
    folder: Path,
    name: str,
    rows: Sequence[tuple[Mapping[str, Any], Row]],
    description: Mapping[str, Any],
    figure: Figure | None = None,
) -> list[Path]:
    """Write ``name.csv``, ``name.json`` and, with a figure, ``name.png`` into ``folder``, each atomically.

    Args:
        folder: an existing folder.
        name: of the benchmark.
        rows: the point of each figure, with the same keys for all, and the figure.
        description: :func:`provenance` and settings, for the JSON file; commit, date, device and versions are repeated
            in every row of the CSV file.
        figure: the plot; ``None`` while the results are not complete.
    """
    repeated = {key: description[key] for key in ("commit", "date", "device", "cores", "threads", *PACKAGES)}
    table = io.StringIO()
    lines = [{**point, **asdict(row), **{k: v for k, v in repeated.items() if k not in point}} for point, row in rows]
    writer = csv.DictWriter(table, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in line.items()} for line in lines)
    contents = {
        f"{name}.csv": table.getvalue().encode(),
        f"{name}.json": (json.dumps(description, indent=2) + "\n").encode(),
    }
    if figure is not None:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        contents[f"{name}.png"] = picture.getvalue()
    for file, content in contents.items():
        write_atomically(folder / file, content)
    return [folder / file for file in contents]


def _rounded(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
