"""`cet completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from cet.cli.errors import debug_option

VARIABLE = "_CET_COMPLETE"
"""The environment variable through which a shell asks `cet` for completions; click derives it from the name."""


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes the commands and options of cet.

    \b
    Examples:
      cet completion bash > ~/.local/share/bash-completion/completions/cet
      cet completion zsh > "${fpath[1]}/_cet"
      cet completion fish > ~/.config/fish/completions/cet.fish
    """
    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(context.find_root().command, {}, "cet", VARIABLE).source())
