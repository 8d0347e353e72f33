"""Every code block of the README and the pages runs as it stands, or gives the reason why it cannot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pages import PAGES, ROOT, blocks_of, check_command

LANGUAGES = {"python", "console", "text", "cpp"}
"""What a page may hold; ``text`` is output and listings, ``cpp`` a part of a source file."""

MOST_NOT_RUN = 6


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_blocks_run_one_after_another(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks_of(page):
            if block.language == "python" and block.not_run is None:
                # Blank lines in front, so that a traceback names the line of the page.
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_are_there_with_their_options(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "console":
            for line in block.text.replace("\\\n", " ").splitlines():
                try:
                    check_command(line)
                except Exception as error:
                    raise AssertionError(f"{_name(page)}:{block.line}: {line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_are_of_a_known_kind(page: Path) -> None:
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_block_is_hidden_by_indentation(page: Path) -> None:
    """Indented blocks of the README would be run by nobody."""
    fenced = "".join(block.text for block in blocks_of(page))
    before = ""
    for line in page.read_text().splitlines():
        if line.startswith("    ") and not before and line + "\n" not in fenced:
            assert line.split()[0] not in ("cet", "make", "python", "pip", "import", "from"), line
        before = line.strip()


def test_few_blocks_are_not_run() -> None:
    not_run = [block for page in PAGES for block in blocks_of(page) if block.not_run is not None]
    assert len(not_run) <= MOST_NOT_RUN


def test_commands_that_are_not_there_are_found() -> None:
    for line in ("cet trian", "cet predict runs/mine --date x", "make tset", "cet train --perturb rain", "curl x"):
        with pytest.raises((AssertionError, Exception)):
            check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files(page: Path) -> None:
    import re

    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert os.path.exists(page.parent / target), f"{_name(page)} links to {target}"
