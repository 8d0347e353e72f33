"""The `cet` command. Heavy imports happen inside the commands, so that help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = ("demo", "train", "calibrate", "predict", "export", "doctor", "energy", "completion")
"""The modules of this package whose ``command`` is a command of `cet`."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 after an error, 2 for bad usage, 130 after Ctrl-C.

    An error is one sentence on stderr, or with ``--debug`` a traceback. Errors with an ``exit_code`` exit with it.
    """
    try:
        # Not before: Ctrl-C may come while they are imported.
        from cet.cli.group import run

        sys.exit(run(sys.argv[1:] if args is None else args, COMMANDS))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
