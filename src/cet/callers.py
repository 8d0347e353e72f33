"""Where a warning belongs: at the user's line."""

import sys


def level_of_caller() -> int:
    """How far up the stack, from the caller of this function, the code is that uses cet."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("cet", "torch"):
        level, frame = level + 1, frame.f_back
    return level
