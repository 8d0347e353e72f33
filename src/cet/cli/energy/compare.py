"""`cet energy compare`."""

from __future__ import annotations

from typing import Any

import click

from cet.cli.energy.options import (
    BATCH_SIZE,
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


@click.command("compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    metavar="MODULE:NAME",
    help="The backbone of checkpoints; given twice, that of A and that of B.",
)
@decorated(BATCH_SIZE, *DATA, *MEASUREMENT, *METER, *FILES, FORMAT, debug_option)
@click.pass_context
def command(
    context: click.Context,
    /,
    first: str,
    second: str,
    backbones: tuple[str, ...],
    batch_size: int,
    form: str,
    **given: Any,
) -> None:
    """Whether model A takes less than model B.

    Less energy, and less time, per sample. A and B are each MODULE:NAME of a torch module or of a function that returns
    one, or a checkpoint of cet. Both run the same batches, in windows in random order, so that drift hits both alike;
    the ratio is taken round by round. "Not distinguishable" means that its interval holds 1: more --rounds narrow it.

    \b
    Examples:
      cet energy compare mynet:small mynet:large --data mynet:test_set
      cet energy compare old.safetensors new.safetensors --backbone mynet:backbone \\
          --data mynet:test_set --batch-size 64 --format json
    """
    if len(backbones) > 2:
        raise click.UsageError("--backbone is given more than twice; A and B have one each.")
    models = (first, second)
    loaded = [models] if len(backbones) == 1 else [(first,), (second,)]
    for name, candidates in zip(backbones, loaded, strict=False):
        check_backbone(name, candidates)
    options = MeasurementOptions(**given)
    check_samples(options.samples, [batch_size])
    outputs = options.outputs()
    with stoppable(), options.meter() as meter:
        # Not before: they bring torch, and errors so far should come at once.
        from cet.cli.energy.progress import Windows
        from cet.cli.energy.tables import show
        from cet.cli.energy.text import of_comparison
        from cet.cli.loading import load_data, load_model, torch_device
        from cet.energy.protocol import Workload
        from cet.energy.workloads import batches_for, runner

        device = torch_device(options.device)
        workloads = []
        data = load_data(options.data, options.samples, None)
        for name, spec, backbone in zip("AB", models, backbones * 2 or (None, None), strict=False):
            model = load_model(spec, backbone, device)
            names = {"model_name": f"{name}, {spec},", "data_name": f"--data {options.data}"}
            batches = batches_for(model, data, batch_size, **names)
            workloads.append(Workload(name, runner(model, batches), batch_size * len(batches)))
        recorder = options.recorder("compare", outputs, meter, models={"A": first, "B": second}, batch=batch_size)
        a, b = workloads
        recorded = recorder.compare(a, b, options.settings, progress=Windows)
    show(recorded.document, form, of_comparison(recorded.document))
    outputs.draw(recorded.document)
    context.exit(recorded.exit_code)
