"""The code blocks of the README and the pages, and how each is run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click

from cet.cli import COMMANDS
from cet.cli.group import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+) -->\n\n?)?^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: behind the fence.
        text: of the block.
        line: of the page on which the text begins, from 1.
        not_run: the reason why it cannot run, where the page gives one.
    """

    language: str
    text: str
    line: int
    not_run: str | None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    content = page.read_text()
    return [
        Block(found["language"], found["text"], content.count("\n", 0, found.start("text")) + 1, found["why"])
        for found in _BLOCK.finditer(content)
    ]


def check_command(line: str) -> None:
    """See that a line of a console block names a command that is there, with options that it has."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    if program == "cet":
        for name in COMMANDS:
            cli.add_command(import_module(f"cet.cli.{name}").command)
        _parse(cli, click.Context(cli, info_name="cet", **cli.context_settings), arguments)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
        wanted = {word for word in arguments if "=" not in word}
        assert wanted <= targets, f"make has no target {wanted - targets}"
    elif program.endswith("python") and arguments[0] == "-m" and arguments[1].startswith("benchmarks."):
        module = import_module(arguments[1])
        module = import_module(f"{arguments[1]}.__main__") if hasattr(module, "__path__") else module
        _parse(module.main, click.Context(click.Command(arguments[1])), arguments[2:])
    elif program.endswith("python") and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
    elif program.endswith("pytest"):
        for word in arguments:
            assert word.startswith("-") or (ROOT / word).exists(), f"there is no {word}"
    else:
        assert words[:3] == ["pip", "install", "."] or (ROOT / program).is_file() or program.startswith(".venv/bin/"), (
            line
        )


def _parse(command: click.Command, context: click.Context, arguments: list[str]) -> None:
    """Parse a command line without running it."""
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name!r}"
        context, command = click.Context(found, parent=context, info_name=name), found
    options, _, _ = command.make_parser(context).parse_args(list(arguments))
    for parameter in command.params:
        value, choices = options.get(parameter.name or ""), getattr(parameter.type, "choices", None)
        assert not (isinstance(value, str) and choices) or value in choices, f"{value!r} is none of {choices}"


def prose_of(page: Path) -> str:
    """A page without its blocks and without code in lines."""
    return re.sub(r"`[^`\n]+`", "", _BLOCK.sub("", page.read_text()))
