"""`cet energy watch`."""

from __future__ import annotations

import click

from cet.cli.energy.options import (
    BACKBONE,
    BATCH,
    DEVICE,
    NO_RAPL,
    REQUIRE_GPU,
    SAMPLES,
    SECONDS,
    check_backbone,
    check_meter,
    check_samples,
    options,
)
from cet.cli.errors import debug_option, stoppable


@click.command("watch")
@click.option("--model", "model_spec", metavar="MODULE:NAME|FILE", help="A model to run meanwhile, as in profile.")
@click.option("--data", metavar="MODULE:NAME", help="What it runs on, again and again, as in profile.")
@options(BACKBONE, BATCH, SAMPLES, DEVICE)
@click.option("--interval", type=SECONDS, default=1.0, show_default=True, metavar="S", help="Seconds between looks.")
@click.option("--duration", type=SECONDS, metavar="S", help="Seconds until the end.  [default: Ctrl-C ends]")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@options(REQUIRE_GPU, NO_RAPL, debug_option)
def command(
    model_spec: str | None,
    backbone: str | None,
    data: str | None,
    samples: int,
    batch: int,
    device: str | None,
    interval: float,
    duration: float | None,
    form: str,
    require_gpu: bool,
    no_rapl: bool,
) -> None:
    """Power, and where samples leave, live.

    Shown are the power that a GPU tells, and for the CPU the mean since the last look; and with --model, which is then
    run again and again, at which exits its samples leave. The energy counters of GPUs are left alone, since some lose
    energy when they are read often. A look at things, not a measurement: for that there are run, profile and compare.
    JSON is one object per line.

    \b
    Examples:
      cet energy watch
      cet energy watch --model mynet:build --data mynet:test_set --batch 64
      cet energy watch --duration 60 --format json > power.jsonl
    """
    if (model_spec is None) != (data is None):
        raise click.UsageError("--model and --data belong together; give both, or none.")
    check_backbone(backbone, [model_spec] if model_spec else [])
    check_samples(samples, [batch])
    from cet.cli.energy.live import Traffic, looks, show
    from cet.energy import EnergyMeter, NoCounterError
    from cet.energy.domains import with_domain

    with stoppable(), EnergyMeter(rapl=False).opened() as gpus, EnergyMeter([], rapl=not no_rapl).opened() as cpus:
        check_meter(gpus, require_gpu=require_gpu, estimate_watts=None)
        traffic = None
        if model_spec is not None and data is not None:
            from cet.cli.energy.loading import batches_for, load_data, load_early_exit, torch_device

            model = load_early_exit(model_spec, backbone, torch_device(device), ())
            rows = load_data(data, samples, model.num_classes)
            names = {"model_name": f"--model {model_spec}", "data_name": f"--data {data}"}
            traffic = Traffic(model, batches_for(model, rows, batch, **names))
        elif not gpus.domains and not cpus.domains:
            reasons = "; ".join(with_domain(row.domain, row.reason) for row in (*gpus.unavailable, *cpus.unavailable))
            raise NoCounterError(f"no power can be seen ({reasons}); give --model and --data to watch exit rates alone")
        show(looks(gpus, cpus, traffic, interval=interval, duration=duration), form)
