"""Options that several commands of `cet energy` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cet.cli.parameters import PATH, FiniteRange

if TYPE_CHECKING:
    from cet.energy import EnergyMeter, Unavailable

Command = Callable[..., Any]


MOST_SECONDS, MOST_WATTS, MOST_THREADS = 1e6, 1e6, 1024  # beyond these it is a slip
SECONDS = FiniteRange(min=0, min_open=True, max=MOST_SECONDS)
WATTS = FiniteRange(min=0, min_open=True, max=MOST_WATTS)

FORMAT = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="JSON has everything, CSV one figure per line.",
)

REQUIRE_GPU = click.option("--require-gpu", is_flag=True, help="Fail where no GPU's joules can be measured.")
NO_RAPL = click.option("--no-rapl", is_flag=True, help="Leave the counters of the CPU out.")

METER = (
    REQUIRE_GPU,
    NO_RAPL,
    click.option("--integral", is_flag=True, help="Sample power as well, to check the counter and to plot it."),
    click.option(
        "--estimate-watts",
        type=WATTS,
        metavar="W",
        help="Where nothing can be measured, assume so many watts; all joules are then marked as modelled.",
    ),
)

FILES = (
    click.option(
        "--output",
        type=PATH,
        metavar="FILE",
        help="Write everything as JSON.",
    ),
    click.option(
        "--prometheus",
        type=PATH,
        metavar="FILE",
        help="Write metrics for the text-file collector.",
    ),
    click.option(
        "--overwrite", is_flag=True, help="Replace the file of --output; metrics and plots are replaced in any case."
    ),
)

MEASUREMENT = (
    click.option("--blocks", type=click.IntRange(min=1), default=10, show_default=True, metavar="N", help="Rounds."),
    click.option("--window", type=SECONDS, metavar="S", help="Least seconds of a window.  [default: 5]"),
    click.option(
        "--warm-up", type=SECONDS, default=3.0, show_default=True, metavar="S", help="Least seconds before each window."
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the order.  [default: 0]"),
    click.option(
        "--threads", type=click.IntRange(1, MOST_THREADS), metavar="N", help="CPU threads.  [default: torch's choice]"
    ),
    click.option("--plots", type=PATH, metavar="FOLDER", help="Draw PNG files into it."),
)

BACKBONE = click.option("--backbone", metavar="MODULE:NAME", help="The backbone of a checkpoint, which holds no code.")
BATCH = click.option(
    "--batch", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Rows of a batch."
)
SAMPLES = click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Of the data; a window runs all of them at least once.",
)
DEVICE = click.option(
    "--device", metavar="DEVICE", help="Where to run, as torch names it.  [default: where the model is]"
)
DATA = (
    click.option(
        "--data",
        required=True,
        metavar="MODULE:NAME",
        help="Labelled batches (x, y): an iterable, or a function that returns one.",
    ),
    SAMPLES,
    DEVICE,
)


def options(*groups: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several decorators as one, in the order in which help shows them."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(groups), command)


def is_checkpoint(model: str) -> bool:
    """Whether this names a file, not MODULE:NAME."""
    return model.endswith(".safetensors") or Path(model).is_file()


def check_backbone(backbone: str | None, models: Sequence[str]) -> None:
    """Refuse a backbone that none of the models would be loaded into.

    Raises:
        click.UsageError: for a backbone without a checkpoint.
    """
    if backbone is not None and not any(map(is_checkpoint, models)):
        raise click.UsageError(f"--backbone {backbone} is for a checkpoint, and no model here is one; leave it out.")


def check_samples(samples: int, batches: Iterable[int]) -> None:
    """Refuse batches that cannot be filled, whatever the data.

    Raises:
        click.UsageError: for a batch of more rows than samples are taken.
    """
    largest = max(batches)
    if largest > samples:
        raise click.UsageError(
            f"--samples {samples} is too few for a batch of {largest}; raise it, or give a smaller --batch."
        )


def check_meter(meter: EnergyMeter, *, require_gpu: bool, estimate_watts: float | None) -> None:
    """Refuse to measure with what an open meter has.

    Raises:
        DeviceLostError: for a GPU that was lost before.
        NoCounterError: when a GPU is required and none can be measured.
        click.UsageError: for an estimate where there is a measurement.
    """
    from cet.energy import DeviceLostError

    for missing in meter.unavailable:
        if missing.lost:
            raise DeviceLostError(missing.reason)
    measured = [domain.name for domain in meter.domains]
    if require_gpu:
        check_gpu(measured, meter.unavailable)
    if estimate_watts is not None and measured:
        raise click.UsageError(
            f"--estimate-watts is for machines without a counter; here {', '.join(measured)} can be measured, so "
            "leave it out."
        )


def check_gpu(measured: Iterable[str], unavailable: Iterable[Unavailable]) -> None:
    """Refuse a machine on which no GPU is among the measured domains.

    Raises:
        NoCounterError: with the reasons.
    """
    from cet.energy import NoCounterError
    from cet.energy.domains import with_domain

    if not any(name.startswith("gpu") for name in measured):
        reasons = "; ".join(with_domain(row.domain, row.reason) for row in unavailable if row.domain.startswith("gpu"))
        raise NoCounterError(f"no GPU's joules can be measured ({reasons}); cet energy doctor shows the mend")
