"""Kinds of values that options of several commands take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click


class _Path(click.Path):
    """A path; an empty one, which a shell makes of an unset variable, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty; give one, or leave the option out.", param, ctx)
        return super().convert(value, param, ctx)


class FiniteRange(click.FloatRange):
    """A range of finite numbers: click's own lets NaN through, which is neither below nor above anything."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return float(super().convert(number, param, ctx))


PATH = _Path(path_type=Path)


def is_checkpoint(model: str) -> bool:
    """Whether this names a file, not MODULE:NAME."""
    return model.endswith(".safetensors") or Path(model).is_file()
