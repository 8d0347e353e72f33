"""`cet energy watch`."""

from __future__ import annotations

import click

from cet.cli.energy.options import (
    BACKBONE,
    BATCH_SIZE,
    DEVICE,
    NO_RAPL,
    REQUIRE_GPU,
    SAMPLES,
    SECONDS,
    check_backbone,
    check_samples,
    decorated,
)
from cet.cli.errors import debug_option
from cet.signals import stoppable


@click.command("watch")
@click.option("--model", "model_spec", metavar="MODULE:NAME|FILE", help="A model to run meanwhile, as in profile.")
@click.option("--data", metavar="MODULE:NAME", help="What it runs on, again and again, as in profile.")
@decorated(BACKBONE, BATCH_SIZE, SAMPLES, DEVICE)
@click.option("--interval", type=SECONDS, default=1.0, show_default=True, metavar="S", help="Seconds between looks.")
@click.option("--duration", type=SECONDS, metavar="S", help="Seconds until the end.  [default: Ctrl-C ends]")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@decorated(REQUIRE_GPU, NO_RAPL, debug_option)
def command(
    model_spec: str | None,
    backbone: str | None,
    data: str | None,
    samples: int,
    batch_size: int,
    device: str | None,
    interval: float,
    duration: float | None,
    form: str,
    require_gpu: bool,
    no_rapl: bool,
) -> None:
    """Power, and where samples leave, live.

    Shown are the power that GPUs report, and for the CPU the mean since the last look; and with --model, which is then
    run again and again, at which exits its samples leave. The energy counters of GPUs are left alone, since some lose
    energy when they are read often. A look at things, not a measurement: for that there are run, profile and compare.
    JSON is one object per line.

    \b
    Examples:
      cet energy watch
      cet energy watch --model mynet:build --data mynet:test_set --batch-size 64
      cet energy watch --duration 60 --format json > power.jsonl
    """
    if (model_spec is None) != (data is None):
        raise click.UsageError("--model and --data belong together; give both, or none.")
    check_backbone(backbone, [model_spec] if model_spec else [])
    check_samples(samples, [batch_size])
    from cet.cli.energy.looks import show
    from cet.energy import EnergyMeter
    from cet.energy.watch import Traffic, looks, require_power

    with stoppable(), EnergyMeter(rapl=False).opened() as gpus, EnergyMeter([], rapl=not no_rapl).opened() as cpus:
        gpus.require(gpu=require_gpu)
        traffic = None
        if model_spec is None or data is None:
            require_power(gpus, cpus)
        else:
            from cet.cli.loading import load_data, load_early_exit, torch_device
            from cet.energy.workloads import batches_for

            model = load_early_exit(model_spec, backbone, torch_device(device), ())
            rows = load_data(data, samples, model.num_classes)
            names = {"model_name": f"--model {model_spec}", "data_name": f"--data {data}"}
            traffic = Traffic(model, batches_for(model, rows, batch_size, **names))
        show(looks(gpus, cpus, traffic, interval=interval, duration=duration), form)
