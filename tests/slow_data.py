"""Data that take longer than anybody waits, for a test that interrupts."""

from __future__ import annotations

import sys
import time
from typing import NoReturn


def batches() -> NoReturn:
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
    raise AssertionError("nobody interrupted")
