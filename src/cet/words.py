"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int | str, one: str, many: str | None = None) -> str:
    """A count and what is counted: ``1 class``, ``2 classes``.

    Args:
        count: the number, or the number as it is to be written.
        one: what one of them is called.
        many: what several are called; ``one`` with an s when not given.
    """
    return f"{count} {one if str(count) == '1' else many or one + 's'}"


def uncertain(confidence: float) -> str:
    """A confidence below 1, never written as 1."""
    return f"{confidence:.4g}" if confidence < 0.9999 else str(confidence)
