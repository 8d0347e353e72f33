"""Imports between the rooms of the package point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cet

ROOT = Path(cet.__file__).parent
LEVELS = (
    # Beside, below all.
    {"data", "perturb", "measure", "files", "signals", "plotting", "callers", "words", "thresholds"},
    {"kernels", "_C", "_cuda"},
    {"ops", "partition"},
    {"runtime"},
    {"model"},
    {"calibration", "training"},
    {"deploy"},
    {"energy"},
    {"report"},
    {"demo"},
    {"cli"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST, room: str) -> Iterator[tuple[int, str]]:
    """The rooms that a file refers to, with the lines."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"cet.{room}"] if node.level else [module]
            if module == "cet" and not node.level:
                names = [f"cet.{_home_of(alias.name)}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cet":
            names = [f"cet.{_home_of(node.attr)}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cet."):
            names = [node.value]  # import_module("cet.calibration")
        for name in names:
            package, _, rest = name.partition(".")
            if package == "cet" and (target := rest.partition(".")[0]) in LEVEL_OF:
                yield node.lineno, target


HOME_OF = {
    alias.name: node.module or alias.name
    for node in ast.walk(ast.parse((ROOT / "__init__.pyi").read_text()))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
"""The module of each public name of cet."""


def _home_of(name: str) -> str:
    return HOME_OF.get(name, name)


def breaches(source: str, room: str) -> list[tuple[int, str]]:
    """Imports of what is not below, with their lines."""
    return [
        (line, target)
        for line, target in imported_rooms(ast.parse(source), room)
        if target != room and LEVEL_OF[target] >= LEVEL_OF[room]
    ]


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or room_of(path) in LEVEL_OF]
KERNELS = sorted((ROOT.parents[1] / "kernels").glob("*.py"))


def test_every_room_has_a_level() -> None:
    rooms = {room_of(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms <= LEVEL_OF.keys()


@pytest.mark.parametrize("path", [*FILES, *KERNELS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_imports_only_what_is_below(path: Path) -> None:
    room = "kernels" if path in KERNELS else room_of(path)
    assert breaches(path.read_text(), room) == []


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("from cet.model.early_exit import EarlyExit", "runtime"),
        ("def f():\n    import cet.cli.group", "energy"),
        ("from cet import calibrate", "model"),
        ("import cet\ncet.train_heads", "ops"),
        ("import_module('cet.demo.run')", "energy"),
        ("from cet.ops import gate", "data"),
        ("from cet.partition.cut import cut", "ops"),
    ],
)
def test_a_breach_is_found(source: str, room: str) -> None:
    assert breaches(source, room)
