"""What the options that `profile` and `compare` share ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cet.cli.energy.options import check_meter
from cet.cli.energy.output import Outputs
from cet.energy import EnergyMeter
from cet.energy.measurement import Settings


@dataclass(frozen=True)
class Wanted:
    """The options :data:`DATA`, :data:`MEASUREMENT`, :data:`METER` and :data:`FILES`, by their names."""

    data: str
    samples: int
    device: str | None
    blocks: int
    window: float | None
    warm_up: float
    seed: int
    threads: int | None
    plots: Path | None
    require_gpu: bool
    no_rapl: bool
    integral: bool
    estimate_watts: float | None
    output: Path | None
    prometheus: Path | None
    overwrite: bool

    @property
    def settings(self) -> Settings:
        """Of the protocol."""
        return Settings(
            blocks=self.blocks,
            window=self.window,
            warmup=self.warm_up,
            seed=self.seed,
            estimate_watts=self.estimate_watts,
        )

    def outputs(self) -> Outputs:
        """The files to write.

        Raises:
            OutputError: for one that cannot be written.
            ModuleNotFoundError: for plots without matplotlib.
        """
        if self.plots is not None:
            from cet.measure.host import require

            require("--plots", ["matplotlib"], extra="demo")
        outputs = Outputs(self.output, self.prometheus, self.plots)
        outputs.check(overwrite=self.overwrite)
        return outputs

    @contextmanager
    def meter(self) -> Iterator[EnergyMeter]:
        """An open meter, with as many threads of torch as were asked for.

        Raises:
            NoCounterError: when a GPU is required and none can be measured.
        """
        with EnergyMeter(rapl=not self.no_rapl, integral=self.integral).opened() as meter:
            check_meter(meter, require_gpu=self.require_gpu, estimate_watts=self.estimate_watts)
            if self.threads is not None:
                import torch

                torch.set_num_threads(self.threads)
            yield meter

    def about(self, **models: Any) -> dict[str, Any]:
        """For the document: what is measured, and where."""
        import torch

        from cet.measure.host import host_facts

        return {
            **models,
            "data": self.data,
            "samples": self.samples,
            "settings": asdict(self.settings),
            "host": host_facts(),
            "torch": torch.__version__,
        }
