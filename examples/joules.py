"""Joules of a model with early exits against its backbone, or time alone where no energy can be counted.

python examples/joules.py
"""

import torch
from torch import nn

import cet
from cet.energy import EnergyMeter, Settings, Workload, compare

torch.manual_seed(0)
layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
backbone = nn.Sequential(*layers, nn.Linear(1024, 10)).eval()
x = torch.randn(256, 1024)
model = cet.EarlyExit(backbone, exits=["3"], example_inputs=(x[:2],))
# Half of the rows leave at the exit; with your own model this is what cet.calibrate finds.
at_exit, _ = model.exit_logits(x)
model.policy = cet.ExitPolicy("entropy", (float(cet.ops.exit_score(at_exit.detach()).median()),))


def full() -> None:
    with torch.no_grad():
        backbone(x)


def early() -> None:
    model.predict(x)


# Windows long enough to believe are the default; these are short, so that the example is.
settings = Settings(rounds=3, window=0.2, update_periods=1, warmup=0.1, warmup_limit=0.2)
meter = EnergyMeter()
comparison = compare(Workload("full", full, len(x)), Workload("early", early, len(x)), meter, settings)
for missing in comparison.measurement.unavailable:
    print(f"not measured: {missing.domain}: {missing.reason}")
for contrast in comparison.contrasts:
    ratio = contrast.ratio
    found = ratio.reason if ratio.value is None else f"{ratio.value:.2f} of early ({contrast.verdict})"
    print(f"{contrast.quantity} of full: {found}")
