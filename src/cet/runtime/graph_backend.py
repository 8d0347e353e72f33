"""What the runners need of CUDA graphs. The tests have one that executes on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class GraphMemoryError(RuntimeError):
    """The graphs need more memory than there is, or than they may take."""


class CaptureError(RuntimeError):
    """An operation cannot be part of a graph; the message names it."""


class Graph(Protocol):
    """Captured work."""

    def instantiate(self) -> None:
        """Make ready for :meth:`replay`; not needed for graphs that are only linked."""

    def replay(self) -> None:
        """Run it, on the current stream."""


class GraphBackend(Protocol):
    """Captures and replays work on one device. What it captures lives as long as the graph."""

    def capture(self, body: Callable[[], None]) -> Graph:
        """Run ``body`` once, then record it.

        Raises:
            GraphMemoryError, CaptureError: see there. What the run itself raises is passed on.
        """

    def link(self, graphs: Sequence[Sequence[Any]], buckets: Sequence[Sequence[int]], counts: Tensor) -> Graph:
        """One graph, ready to replay, that runs for each segment in turn the one of its graphs whose bucket is the
        least that holds ``counts[segment]`` rows, and none for 0 rows; then it sets the next count to 0.

        Raises:
            GraphMemoryError, CaptureError: see there.
        """

    def sending(self, index: int, count: Tensor) -> AbstractContextManager[None]:
        """For use in a body: ``count`` is on its way to the host while the work within runs."""

    def receive_count(self, index: int) -> int:
        """Wait for the count that the last replay sent."""

    def in_order(self) -> AbstractContextManager[None]:
        """Work started within comes after the work started within earlier, whatever the streams."""

    def memory(self) -> int:
        """Bytes that the captured work holds, besides the memory it was given."""

    def memory_limit(self) -> int:
        """Bytes that it may hold."""

    def close(self) -> None:
        """Wait until nothing that was captured is running any more."""
