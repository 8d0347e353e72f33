"""One thing that `cet doctor` looked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Whether something can be used here.

    Attributes:
        name: what it is.
        available: whether it can be used.
        detail: what was found, or why it cannot be used.
        fix: what would make it available; ``None`` when it is, or when nothing would.
    """

    name: str
    available: bool
    detail: str
    fix: str | None = None
