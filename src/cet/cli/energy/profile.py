"""`cet energy profile`."""

from __future__ import annotations

from typing import Any

import click

from cet.cli.energy.options import (
    BACKBONE,
    DATA,
    FILES,
    FORMAT,
    MEASUREMENT,
    METER,
    MeasurementOptions,
    check_backbone,
    check_samples,
    decorated,
)
from cet.cli.errors import debug_option
from cet.signals import stoppable


@click.command("profile")
@click.option(
    "--model",
    "model_spec",
    required=True,
    metavar="MODULE:NAME|FILE",
    help="A cet.EarlyExit or a function that returns one; or a checkpoint, with --backbone.",
)
@decorated(BACKBONE)
@click.option(
    "--batch-size", "batch_sizes", type=click.IntRange(min=1), multiple=True, default=(32,), metavar="N",
    help="Samples of a batch; may be given several times.  [default: 32]",
)  # fmt: skip
@click.option(
    "--exit", "exits", multiple=True, metavar="NAME",
    help="An early exit to profile; may be given several times.  [default: those that the policy opens, else all]",
)  # fmt: skip
@decorated(*DATA, *MEASUREMENT, *METER, *FILES, FORMAT, debug_option)
@click.pass_context
def command(
    context: click.Context,
    /,
    model_spec: str,
    backbone: str | None,
    batch_sizes: tuple[int, ...],
    exits: tuple[str, ...],
    form: str,
    **given: Any,
) -> None:
    """Joules and time of each exit and of the policy.

    Where no joules can be measured it refuses, unless --assume-watts models them.

    Every sample is forced to leave at one exit after the other, which gives what it costs to come so far, split into
    backbone, heads and gates; and the policy runs as it is, against what its exit rates predict. All of it in windows
    in random order, with idle ones between them, once for each batch size. The joules of a sample are its share of
    those of its batch: attributed, not measured.

    \b
    Examples:
      cet energy profile --model mynet:build --data mynet:test_set --batch-size 1 --batch-size 64
      cet energy profile --model model.safetensors --backbone mynet:backbone \\
          --data mynet:test_set --output profile.json --plots plots
    """
    options = MeasurementOptions(**given)
    check_backbone(backbone, [model_spec])
    check_samples(options.samples, batch_sizes)
    outputs = options.outputs()
    with stoppable(), options.meter(any_domain=True) as meter:
        # Not before: they bring torch, and errors so far should come at once.
        from cet.cli.energy.progress import Windows
        from cet.cli.energy.tables import show
        from cet.cli.energy.text import of_profile
        from cet.cli.loading import load_data, load_early_exit, torch_device
        from cet.energy.workloads import batches_for

        model = load_early_exit(model_spec, backbone, torch_device(options.device), exits)
        data = load_data(options.data, options.samples, model.num_classes)
        names = {"model_name": f"--model {model_spec}", "data_name": f"--data {options.data}"}
        by_size = {size: batches_for(model, data, size, **names) for size in batch_sizes}
        about = {"model": model_spec, "exits": model.exit_names, "policy": model.policy.to_dict()}
        recorder = options.recorder("profile", outputs, meter, **about)
        recorded = recorder.profile(model, by_size, options.settings, exits=exits or None, progress=Windows)
    show(recorded.document, form, of_profile(recorded.document))
    outputs.draw(recorded.document)
    context.exit(recorded.exit_code)
