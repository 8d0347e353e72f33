"""`cet energy compare`."""

from __future__ import annotations

from typing import Any

import click

from cet.cli.energy.options import (
    BATCH,
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
@options(BATCH, *DATA, *MEASUREMENT, *METER, *FILES, FORMAT, debug_option)
@click.pass_context
def command(
    context: click.Context,
    /,
    first: str,
    second: str,
    backbones: tuple[str, ...],
    batch: int,
    form: str,
    **given: Any,
) -> None:
    """Whether model A takes less than model B.

    Less energy, and less time, per sample. A and B are each MODULE:NAME of a torch module or of a function that returns
    one, or a checkpoint of cet. Both run the same batches, in windows in random order, so that drift hits both alike;
    the ratio is taken round by round. "Not distinguishable" means that its interval holds 1: more --blocks narrow it.

    \b
    Examples:
      cet energy compare mynet:small mynet:large --data mynet:test_set
      cet energy compare old.safetensors new.safetensors --backbone mynet:backbone \\
          --data mynet:test_set --batch 64 --format json
    """
    if len(backbones) > 2:
        raise click.UsageError("--backbone is given more than twice; A and B have one each.")
    models = (first, second)
    loaded = [models] if len(backbones) == 1 else [(first,), (second,)]
    for name, candidates in zip(backbones, loaded, strict=False):
        check_backbone(name, candidates)
    from cet.cli.energy.wanted import Wanted

    wanted = Wanted(**given)
    check_samples(wanted.samples, [batch])
    outputs = wanted.outputs()
    with stoppable(), wanted.meter() as meter:
        # Not before: they bring torch, and what is wrong so far is told at once.
        from cet.cli.energy.loading import batches_for, load_data, load_model, runner, torch_device
        from cet.cli.energy.progress import Windows
        from cet.cli.energy.recorder import Recorder
        from cet.cli.energy.tables import show
        from cet.cli.energy.text import of_comparison
        from cet.energy import report
        from cet.energy.comparison import compare
        from cet.energy.protocol import Workload

        device = torch_device(wanted.device)
        workloads = []
        data = load_data(wanted.data, wanted.samples, None)
        for name, spec, backbone in zip("AB", models, backbones * 2 or (None, None), strict=False):
            model = load_model(spec, backbone, device)
            cut = batches_for(model, data, batch, model_name=f"{name}, {spec},", data_name=f"--data {wanted.data}")
            workloads.append(Workload(name, runner(model, cut), batch * len(cut)))
        a, b = workloads
        recorder = Recorder("compare", outputs, meter, wanted.about(models={"A": first, "B": second}, batch=batch))
        with recorder.measurement(), Windows("A against B") as progress:
            compared = compare(a, b, meter, wanted.settings, progress=progress, on_block=recorder.add_block)
        document = recorder.finish(compared.measurement, report.comparison_figures(compared))
    show(document, form, of_comparison(document))
    outputs.draw(document)
    context.exit(compared.measurement.exit_code)
