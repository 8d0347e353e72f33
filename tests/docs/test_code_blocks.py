"""Every code block of the README and the pages runs as it stands, or gives the reason why it cannot."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch

import cet
from pages import PAGES, ROOT, blocks_of, check_command, prose_of

LANGUAGES = {"python", "console", "text", "cpp"}
"""What a page may hold; ``text`` is output and listings, ``cpp`` a part of a source file."""

MOST_NOT_RUN = 3


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_blocks_run_one_after_another(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    short = cet.energy.Settings(rounds=2, window=0.05, update_periods=1, warmup=0.05)
    monkeypatch.setattr(cet.energy, "measured_costs", partial(cet.energy.measured_costs, settings=short))
    namespace = ModuleType("page")  # dataclasses look for the module of their annotations
    monkeypatch.setitem(sys.modules, "page", namespace)
    try:
        for block in blocks_of(page):
            if block.language == "python" and block.not_run is None:
                # Blank lines in front, so that a traceback names the line of the page.
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), vars(namespace))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_are_there_with_their_options(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "console":
            for line in block.text.replace("\\\n", " ").splitlines():
                try:
                    check_command(line)
                except (AssertionError, click.UsageError) as error:
                    raise AssertionError(f"{_name(page)}:{block.line}: {line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_are_of_a_known_kind(page: Path) -> None:
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_command_is_hidden_by_indentation(page: Path) -> None:
    """An indented block would be run by nobody."""
    for line in prose_of(page).splitlines():
        assert not re.match(r" {4,}(cet|make|python|pip|import|from) ", line), line


def test_few_blocks_are_not_run() -> None:
    not_run = [block for page in PAGES for block in blocks_of(page) if block.not_run is not None]
    assert len(not_run) <= MOST_NOT_RUN


@pytest.mark.parametrize(
    "line",
    [
        "cet trian",
        "cet predict runs/mine --date x",
        "cet train --perturb rain",
        "make tset",
        "python -m benchmarks.compact --cool",
        "python docs/none.py",
        "curl x",
    ],
)
def test_commands_that_are_not_there_are_found(line: str) -> None:
    with pytest.raises((AssertionError, click.UsageError)):
        check_command(line)


def test_the_quickstart_of_the_readme_is_short() -> None:
    first, *_ = (block for block in blocks_of(ROOT / "README.md") if block.language == "python")
    assert len(first.text.splitlines()) <= 15


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", prose_of(page)):
        if not target.startswith(("http://", "https://")):
            assert os.path.exists(page.parent / target), f"{_name(page)} links to {target}"


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    assert [name for name in cet.__all__ if f"::: cet.{name}" not in pages] == []
