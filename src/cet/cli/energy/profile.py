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
    check_backbone,
    check_samples,
    options,
)
from cet.cli.errors import debug_option, stoppable


@click.command("profile")
@click.option(
    "--model",
    "model_spec",
    required=True,
    metavar="MODULE:NAME|FILE",
    help="A cet.EarlyExit or a function that returns one; or a checkpoint, with --backbone.",
)
@options(BACKBONE)
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(32,), metavar="N",
    help="Rows of a batch; may be given several times.  [default: 32]",
)  # fmt: skip
@click.option(
    "--exit", "exits", multiple=True, metavar="NAME",
    help="An early exit to profile; may be given several times.  [default: those that the policy opens, else all]",
)  # fmt: skip
@options(*DATA, *MEASUREMENT, *METER, *FILES, FORMAT, debug_option)
@click.pass_context
def command(
    context: click.Context,
    /,
    model_spec: str,
    backbone: str | None,
    batches: tuple[int, ...],
    exits: tuple[str, ...],
    form: str,
    **given: Any,
) -> None:
    """Joules and time of each exit and of the policy.

    Every sample is forced to leave at one exit after the other, which gives what it costs to come so far, split into
    backbone, heads and gates; and the policy runs as it is, against what its exit rates predict. All of it in windows
    in random order, with idle ones between them, once for each batch size. The joules of a sample are its share of
    those of its batch: attributed, not measured.

    \b
    Examples:
      cet energy profile --model mynet:build --data mynet:test_set --batch 1 --batch 64
      cet energy profile --model model.safetensors --backbone mynet:backbone \\
          --data mynet:test_set --output profile.json --plots plots
    """
    from cet.cli.energy.wanted import Wanted

    wanted = Wanted(**given)
    check_backbone(backbone, [model_spec])
    check_samples(wanted.samples, batches)
    outputs = wanted.outputs()
    with stoppable(), wanted.meter() as meter:
        # Not before: they bring torch, and what is wrong so far is told at once.
        from cet.cli.energy.loading import batches_for, load_data, load_early_exit, torch_device
        from cet.cli.energy.progress import Windows
        from cet.cli.energy.recorder import Recorder
        from cet.cli.energy.tables import show
        from cet.cli.energy.text import of_profile
        from cet.energy import report
        from cet.energy.profile import profile

        device = torch_device(wanted.device)
        model = load_early_exit(model_spec, backbone, device, exits)
        data = load_data(wanted.data, wanted.samples, model.num_classes)
        names = {"model_name": f"--model {model_spec}", "data_name": f"--data {wanted.data}"}
        by_size = {size: batches_for(model, data, size, **names) for size in batches}
        about = wanted.about(model=model_spec, exits=model.exit_names, policy=model.policy.to_dict())
        recorder = Recorder("profile", outputs, meter, about)
        for size, cut in by_size.items():
            with recorder.measurement(batch_size=size), Windows(f"batch {size}") as progress:
                profiled = profile(
                    model,
                    cut,
                    meter,
                    wanted.settings,
                    exits=exits or None,
                    progress=progress,
                    on_block=recorder.add_block,
                )
            document = recorder.finish(profiled.measurement, report.profile_figures(profiled))
            if profiled.measurement.stopped:
                break
    show(document, form, of_profile(document))
    outputs.draw(document)
    context.exit(profiled.measurement.exit_code)
