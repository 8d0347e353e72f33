"""Turns the cross-references of docstrings, such as :func:`cet.calibrate`, into links of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


def _linked(found: re.Match[str]) -> str:
    name = found[1]
    # A function of the name of its module is the function.
    path = re.sub(r"^cet\.ops\.(exit_step|exit_gate|compact|consistent_exit_loss)$", r"cet.ops.\1.\1", name)
    # A name that is not on the site stays a plain name.
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_linked, obj.docstring.value)
