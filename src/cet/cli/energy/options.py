"""Options that several commands of `cet energy` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cet.cli.parameters import PATH, FiniteRange, is_checkpoint

if TYPE_CHECKING:
    from cet.energy import EnergyMeter
    from cet.energy.measurement import Settings
    from cet.energy.recorder import Outputs, Recorder
    from cet.energy.report import Kind

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
        "--assume-watts",
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
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        metavar="N",
        help="Windows of each thing that is compared.",
    ),
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
BATCH_SIZE = click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Samples of a batch."
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


def decorated(*groups: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several decorators as one, in the order in which help shows them."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(groups), command)


def check_backbone(backbone: str | None, models: Sequence[str]) -> None:
    """Refuse a backbone that none of the models would be loaded into.

    Raises:
        click.UsageError: for a backbone without a checkpoint.
    """
    if backbone is not None and not any(map(is_checkpoint, models)):
        raise click.UsageError(f"--backbone {backbone} is for a checkpoint, and no model here is one; leave it out.")


def check_samples(samples: int, batch_sizes: Iterable[int]) -> None:
    """Refuse batches that cannot be filled, whatever the data.

    Raises:
        click.UsageError: for a batch of more samples than are taken.
    """
    largest = max(batch_sizes)
    if largest > samples:
        raise click.UsageError(
            f"--samples {samples} is too few for a batch of {largest}; raise it, or give a smaller --batch-size."
        )


def check_assumption(meter: EnergyMeter, assume_watts: float | None) -> None:
    """Refuse to assume what an open meter can measure.

    Raises:
        click.UsageError: then.
    """
    if assume_watts is not None and meter.domains:
        measured = ", ".join(domain.name for domain in meter.domains)
        raise click.UsageError(
            f"--assume-watts is for machines without a counter; here {measured} can be measured, so leave it out."
        )


def checked_outputs(output: Path | None, prometheus: Path | None, plots: Path | None, *, overwrite: bool) -> Outputs:
    """The files to write, before anything is measured.

    Raises:
        click.UsageError: for two that are the same file or folder, by whatever spelling or link.
        OutputError: for one that cannot be written.
        ModuleNotFoundError: for plots without matplotlib.
    """
    options = {"--output": output, "--prometheus": prometheus, "--plots": plots}
    given = {name: os.path.realpath(path) for name, path in options.items() if path is not None}
    for first, second in combinations(given, 2):
        if given[first] == given[second]:
            raise click.UsageError(
                f"{first} {options[first]} and {second} {options[second]} are the same; give each its own."
            )
    from cet.energy.recorder import Outputs

    if plots is not None:
        from cet.measure.host import require

        require("--plots", ["matplotlib"], extra="demo")
    outputs = Outputs(output, prometheus, plots)
    outputs.check(overwrite=overwrite)
    return outputs


@dataclass(frozen=True)
class MeasurementOptions:
    """The values of :data:`DATA`, :data:`MEASUREMENT`, :data:`METER` and :data:`FILES`, by the names of the options."""

    data: str
    samples: int
    device: str | None
    rounds: int
    window: float | None
    warm_up: float
    seed: int
    threads: int | None
    plots: Path | None
    require_gpu: bool
    no_rapl: bool
    integral: bool
    assume_watts: float | None
    output: Path | None
    prometheus: Path | None
    overwrite: bool

    @property
    def settings(self) -> Settings:
        """Of the protocol."""
        from cet.energy.measurement import Settings

        return Settings(
            rounds=self.rounds,
            window=self.window,
            warmup=self.warm_up,
            seed=self.seed,
            assume_watts=self.assume_watts,
        )

    def outputs(self) -> Outputs:
        """As :func:`checked_outputs`."""
        return checked_outputs(self.output, self.prometheus, self.plots, overwrite=self.overwrite)

    @contextmanager
    def meter(self, *, any_domain: bool = False) -> Iterator[EnergyMeter]:
        """An open meter, with as many threads of torch as were asked for.

        Args:
            any_domain: whether it must measure joules of something, where no watts are assumed.

        Raises:
            NoCounterError: when a GPU is required and none can be measured, or none of the domains can.
            click.UsageError: when watts are assumed where joules can be measured.
        """
        from cet.energy import EnergyMeter

        with EnergyMeter(rapl=not self.no_rapl, integral=self.integral).opened() as meter:
            check_assumption(meter, self.assume_watts)
            meter.require(gpu=self.require_gpu, any_domain=any_domain and self.assume_watts is None)
            if self.threads is not None:
                import torch

                torch.set_num_threads(self.threads)
            yield meter

    def recorder(self, kind: Kind, outputs: Outputs, meter: EnergyMeter, **models: Any) -> Recorder:
        """What keeps the results, with what is measured and where."""
        import torch

        from cet.energy.recorder import Recorder
        from cet.energy.report import plain
        from cet.measure.host import host_facts

        about = {
            **models,
            "data": self.data,
            "samples": self.samples,
            "settings": plain(self.settings),
            "host": host_facts(),
            "torch": torch.__version__,
        }
        return Recorder(kind, outputs, meter, about)
