"""What `import cet` gives, and what it does not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cet


@pytest.mark.parametrize("name", cet.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    assert getattr(cet, name).__doc__


def test_type_checkers_see_the_names_that_are_there() -> None:
    tree = ast.parse(Path(cet.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(cet.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'cet' has no attribute 'early'"):
        cet.early  # noqa: B018


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    code = "import cet, cet.calibration, cet.early_exit; assert callable(cet.calibrate) and callable(cet.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_loads_neither_torch_nor_the_training_extra() -> None:
    code = "import sys, cet, cet.cli; print([m for m in ('torch', 'lightning', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
