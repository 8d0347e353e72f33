"""What `import cet` gives, and what it does not do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import cet


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in (cet, cet.energy) for name in package.__all__]
)
def test_public_names_are_there_and_documented(package: ModuleType, name: str) -> None:
    assert getattr(package, name).__doc__


@pytest.mark.parametrize("package", [cet, cet.energy])
def test_type_checkers_see_the_names_that_are_there(package: ModuleType) -> None:
    tree = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    imported = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(package.__all__) == {name for name in imported if hasattr(package, name)}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match=r"cet.* early"):
        cet.early  # noqa: B018


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    code = "import cet, cet.calibration, cet.model.early_exit; assert callable(cet.calibrate) and callable(cet.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_loads_neither_torch_nor_the_training_extra() -> None:
    code = "import sys, cet, cet.cli; print([m for m in ('torch', 'lightning', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"


def test_joules_of_any_program_are_measured_without_torch() -> None:
    code = "import sys, cet.energy.run, cet.cli.energy.run; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "False"


def test_a_source_distribution_has_all_kernels_whatever_could_be_built_here(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "src", "csrc", "kernels"):
        (tmp_path / name).symlink_to(root / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist"],
        cwd=tmp_path,
        env={**os.environ, "CET_BUILD_CPP": "0", "CET_BUILD_CUDA": "0"},
        check=True,
        capture_output=True,
    )
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        packed = {Path(*Path(name).parts[1:]) for name in file.getnames()}
    kernels = {path.relative_to(root) for folder in ("csrc", "kernels") for path in (root / folder).rglob("*.*")}
    assert {path for path in kernels if path.suffix in (".cpp", ".cu", ".h", ".py")} <= packed
