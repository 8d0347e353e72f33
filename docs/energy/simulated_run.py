"""Makes the pictures and the table of docs/energy.md: `cet energy profile` of a made-up model on a simulated GPU.

python docs/energy/simulated_run.py

Everything is as in a real run but for the library under nvidia-ml-py, which is that of the tests, and the clock, which
is virtual. Time and power of the model's parts are set below; what they come out as is measured.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import cet
from cet.cli.energy.text import of_profile
from cet.energy import EnergyMeter, plots, report
from cet.energy.figures import profile_figures
from cet.energy.measurement import Settings
from cet.energy.profile import profile
from cet.files import write_atomically

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tests"))

from nvml.simulation import Simulation, build  # noqa: E402

LABEL = "SIMULATED: no real GPU was measured"
SAMPLES = 32
BATCHES = (1, 16)
WATTS = {"stem": 110.0, "body": 190.0, "tail": 260.0, "head": 60.0}
"""Of the load, beyond idle."""
PER_CALL, PER_ROW = 3e-3, {"stem": 0.4e-3, "body": 0.7e-3, "tail": 1.1e-3, "head": 0.1e-3}
"""s."""
STRENGTH = {"stem": 0.8, "body": 1.3, "tail": 2.0}
"""How far, on the average, the right class is ahead at each exit; the noise is 1."""


class Part(nn.Module):
    """Takes time and power, and passes its input on."""

    def __init__(self, simulation: Simulation, kind: str) -> None:
        super().__init__()
        self._simulation, self._kind = simulation, kind

    def forward(self, x: Tensor) -> Tensor:
        self._simulation.load(WATTS[self._kind])
        self._simulation.clock.sleep(PER_CALL + PER_ROW[self._kind] * len(x))
        self._simulation.load(0)
        return x


class Classifier(Part):
    """Decides between two classes by one column of its input."""

    def __init__(self, simulation: Simulation, kind: str, column: int) -> None:
        super().__init__(simulation, kind)
        self._column = column

    def forward(self, x: Tensor) -> Tensor:
        ahead = super().forward(x)[:, self._column]
        return torch.stack([-ahead, ahead], dim=1)


def samples() -> tuple[Tensor, Tensor]:
    """Labels, and how far class 1 is ahead at each exit ``(SAMPLES, 3)``."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (SAMPLES,), generator=generator)
    strength = torch.tensor(list(STRENGTH.values()))
    ahead = strength + torch.randn(SAMPLES, 3, generator=generator)
    return (2 * y[:, None] - 1) * ahead, y


def early_exit(simulation: Simulation) -> cet.EarlyExit:
    backbone = cet.Stages(
        stem=Part(simulation, "stem"), body=Part(simulation, "body"), tail=Classifier(simulation, "tail", 2)
    )
    heads = {"stem": Classifier(simulation, "head", 0), "body": Classifier(simulation, "head", 1)}
    policy = cet.ExitPolicy("confidence", (0.93, 0.93))
    return cet.EarlyExit(backbone, heads, (samples()[0],), policy=policy)


def simulated() -> report.Document:
    """The document of `cet energy profile --batch-size 1 --batch-size 16 --integral`."""
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(build(Path(folder)))
    simulation.install()
    model = early_exit(simulation).eval()
    x, y = samples()
    settings = Settings()
    figures, measurements, flags = [], [], []
    with EnergyMeter(rapl=False, integral=True, clock=simulation.clock).opened() as meter:
        for size in BATCHES:
            result = profile(model, list(zip(x.split(size), y.split(size), strict=True)), meter, settings)
            figures += profile_figures(result)
            flags += result.measurement.flags
            measurements.append(report.plain_measurement(result.measurement, batch_size=size))
    return report.document(
        "profile", figures, measurements, flags=dict.fromkeys(flags), about={"settings": report.plain(settings)}
    )


def main() -> None:
    document = simulated()
    for name, content in plots.draw(document, LABEL).items():
        write_atomically(HERE / name, content)
    console = Console(width=80, record=True, highlight=False)
    for text in (LABEL, *of_profile(document)):
        console.print(text, markup=False)
        console.print()
    text = console.export_text()
    write_atomically(HERE / "table.txt", ("\n".join(line.rstrip() for line in text.splitlines()) + "\n").encode())


if __name__ == "__main__":
    main()
