"""A graph backend that executes on the CPU, so that all but CUDA itself is tested without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

import cet
from cet.runtime import GraphRunner, RunnerName
from cet.runtime.graph_backend import CaptureError


class FakeGraph:
    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body
        self._is_ready = False

    def instantiate(self) -> None:
        self._is_ready = True

    def replay(self) -> None:
        assert self._is_ready
        self.run()

    def run(self) -> None:
        self._body()


class FakeLinkedGraph:
    """What the SWITCH nodes do, a stale count for a segment that was not run included."""

    def __init__(self, graphs: Sequence[Sequence[FakeGraph]], buckets: Sequence[Sequence[int]], counts: Tensor) -> None:
        self.graphs, self.buckets, self.counts = graphs, buckets, counts

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        for index, (graphs, buckets) in enumerate(zip(self.graphs, self.buckets, strict=True)):
            count = int(self.counts[index])
            if count == 0:
                self.counts[index + 1] = 0
            else:
                graphs[next(i for i, bucket in enumerate(buckets) if bucket >= count)].run()


class FakeGraphs:
    """Memory is counted as one byte per graph."""

    def __init__(
        self,
        num_counts: int,
        room: int = 1 << 30,
        refuses: Callable[[Callable[[], None]], bool] = lambda body: False,
        links: bool = True,
    ) -> None:
        self.room = room
        self.refuses = refuses
        self.links = links
        self.captured = self.replayed = self.linked = self.closed = 0
        self._sent: list[int | None] = [None] * num_counts

    def capture(self, body: Callable[[], None]) -> FakeGraph:
        body()
        if self.refuses(body):
            raise CaptureError("x = NONZERO_1(h): operation not permitted when stream is capturing")
        self.captured += 1
        return FakeGraph(self._counted(body))

    def _counted(self, body: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replayed += 1
            body()

        return replay

    def link(
        self, graphs: Sequence[Sequence[FakeGraph]], buckets: Sequence[Sequence[int]], counts: Tensor
    ) -> FakeLinkedGraph:
        if not self.links:
            raise CaptureError("operation not supported in a conditional node")
        self.linked += 1
        return FakeLinkedGraph(graphs, buckets, counts)

    @contextmanager
    def sending(self, index: int, count: Tensor) -> Iterator[None]:
        assert self.linked == 0
        self._sent[index] = int(count)
        yield

    def receive_count(self, index: int) -> int:
        count, self._sent[index] = self._sent[index], None
        assert count is not None, "no graph sent a count since the last was received"
        return count

    def in_order(self) -> nullcontext[None]:
        return nullcontext()

    def memory(self) -> int:
        return self.captured

    def memory_limit(self) -> int:
        return self.room

    def close(self) -> None:
        self.closed += 1


class Fakes:
    """Makes fake backends for a model, and keeps them."""

    def __init__(self, **options: object) -> None:
        self.options = options
        self.made: list[FakeGraphs] = []

    def __call__(self, device: torch.device, num_counts: int) -> FakeGraphs:
        self.made.append(FakeGraphs(num_counts, **self.options))  # type: ignore[arg-type]
        return self.made[-1]


def run_by(model: cet.EarlyExit, runner: RunnerName, monkeypatch: pytest.MonkeyPatch, **options: object) -> Fakes:
    """Have ``model`` run by ``runner`` on fake graphs."""
    fakes = Fakes(**options)
    monkeypatch.setattr("cet.model.early_exit.runner_for", lambda device, wanted: runner)
    monkeypatch.setattr(model, "_graphs", GraphRunner(model.exit_names, fakes))
    return fakes
