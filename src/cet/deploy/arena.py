"""How much memory TFLite Micro needs for a model, or why it cannot run it: a process of its own.

TFLite Micro says on standard error why a model fails, and where memory is short some of its kernels go on without it
and die. So each size is tried in a child of a process that holds nothing else. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from cet.deploy.description import ExportError

MOST_ARENA = 1 << 28
"""What a stage may need: more than any microcontroller has."""

_ALIGNMENT = 16
_LACKED = re.compile(r"builtin opcode '(\w+)'|unresolved custom op: (\S+)|op code (\w+)")
_FAILED = re.compile(r"Node (\w+) \(number \w+\) failed")
_SHORT = re.compile(r"Failed to (allocate|resize)[^\n]*(missing|bytes required)")


def arena_of(content: bytes, title: str, most: int = MOST_ARENA) -> int:
    """The least arena in bytes, a multiple of 16, in which the model in a ``.tflite`` file loads and runs.

    Args:
        content: of the file.
        title: of the model in an error.
        most: how much it may need.

    Raises:
        ExportError: where TFLite Micro cannot run it, with the operator, or not in so much memory.
    """
    command = [sys.executable, "-m", "cet.deploy.arena", str(most)]
    run = subprocess.run(command, input=content, capture_output=True)
    if run.returncode == 0:
        return int(run.stdout)
    said = run.stderr.decode(errors="replace")
    if run.returncode < 0:
        raise ExportError(f"TFLite Micro dies of {title} (signal {-run.returncode}); export it as .tflite for LiteRT")
    raise refusal(title, said, most)


def refusal(title: str, said: str, arena: int) -> ExportError:
    """Why a model cannot run in an arena, from what TFLite Micro said on standard error."""
    if found := _LACKED.search(said):
        name = next(filter(None, found.groups()))
        return ExportError(f"{title} needs the operator {name}, which TFLite Micro lacks; compute it with others")
    if _SHORT.search(said):
        return ExportError(f"{title} does not fit into an arena of {arena} bytes; export a smaller model")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if found := _FAILED.search(said):
        why = next((line for line in lines if not _FAILED.search(line)), "without a reason")
        return ExportError(
            f"{title} fails in the operator {found[1]} of TFLite Micro ({why}); compute it with others, or in float32"
        )
    return ExportError(
        f"TFLite Micro cannot run {title} ({lines[-1] if lines else 'without a reason'}); export it again"
    )


def runs(content: bytes, arena: int) -> bool:
    """Whether a model runs in an arena; TFLite Micro says on standard error why not."""
    from tflite_micro import runtime

    try:
        runtime.Interpreter.from_bytes(content, arena_size=arena).invoke()
    except RuntimeError:
        return False
    return True


def _child_runs(content: bytes, arena: int) -> bool:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(not runs(content, arena))
    return os.waitpid(child, 0)[1] == 0


def _main() -> None:
    content, most = sys.stdin.buffer.read(), int(sys.argv[1])
    if not runs(content, most):
        sys.exit(1)
    too_few, enough = 0, most // _ALIGNMENT
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if _child_runs(content, middle * _ALIGNMENT):
            enough = middle
        else:
            too_few = middle
    print(enough * _ALIGNMENT)


if __name__ == "__main__":
    _main()
