"""`cet energy`."""

from __future__ import annotations

import click

from cet.cli.energy import compare, profile, run, watch
from cet.cli.errors import debug_option


@click.group("energy", context_settings={"help_option_names": ["-h", "--help"]})
@debug_option
def command() -> None:
    """Joules of a command, of each exit of a model, and of two models against each other.

    What cannot be measured is shown as a dash with the reason, never as 0. Every figure is marked as that of an energy
    counter, of integrated power, or of a model. CUDA_VISIBLE_DEVICES chooses the GPUs. `cet doctor` shows what this
    machine can measure.

    \b
    Examples:
      cet energy run -- python train.py
      cet energy profile --model model.safetensors --backbone mynet:build --data mynet:test_set
      cet energy compare mynet:small mynet:large --data mynet:test_set
      cet energy watch

    \b
    Exit codes, besides 0, 1 for other errors, and 2 for bad usage:
      10  energy cannot be measured as asked   20  output cannot be written
      11  no counter where one is required     21  model or data cannot be used
      12  it is unclear which GPU is meant     22  the model has no such exit
      13  MIG instances have no joules         126, 127  COMMAND cannot be run, found
      14  a GPU was lost                       129, 130, 143  stopped by a signal
      15  the counter stands still under load
      16  the counter ran backwards or failed
    """


for module in (run, profile, compare, watch):
    command.add_command(module.command)
