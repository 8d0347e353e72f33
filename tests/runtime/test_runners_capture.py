"""What a capture that fails leaves behind, on stand-ins for PyTorch's graphs."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch

from cet.runtime.cuda_graphs import CudaGraphs
from cet.runtime.graph_backend import CaptureError, GraphMemoryError

Pool = tuple[int, int]


class Graph:
    """Refuses to end when it is told so."""

    def __init__(self, begun: list[Pool | None], ends: bool = True) -> None:
        self._begun, self._ends = begun, ends

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local"
        self._begun.append(pool)

    def capture_end(self) -> None:
        if not self._ends:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def begun() -> list[Pool | None]:
    """The pools of the captures so far."""
    return []


@pytest.fixture
def ended() -> list[Pool]:
    """The pools from which torch no longer allocates."""
    return []


@pytest.fixture
def record(
    begun: list[Pool | None], ended: list[Pool], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], None], bool], None]:
    handles = itertools.count(1)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: (0, next(handles)))
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: Graph(begun))
    end = lambda device, pool: ended.append(pool)  # noqa: E731
    monkeypatch.setattr("torch._C._cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr("cet.runtime.cuda_graphs._failed", [])
    backend = CudaGraphs.__new__(CudaGraphs)
    backend._device, backend._pools = torch.device("cpu"), [torch.cuda.graph_pool_handle()]
    return lambda body, ends: backend._record(Graph(begun, ends), body)  # type: ignore[arg-type]


def waits() -> None:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it")


def test_a_refused_capture_is_cleaned_up_and_later_ones_take_another_pool(
    record: Callable[..., None], begun: list[Pool | None], ended: list[Pool]
) -> None:
    record(lambda: None, True)
    with pytest.raises(CaptureError, match=r"^raise RuntimeError.*: CUDA error: operation not permitted when .*ing$"):
        record(waits, False)
    record(lambda: None, True)
    assert begun == [(0, 1), (0, 1), None, (0, 2)]
    assert ended == [(0, 1)]


def test_a_capture_that_cuda_itself_refuses_in_the_end_is_cleaned_up(
    record: Callable[..., None], ended: list[Pool]
) -> None:
    with pytest.raises(CaptureError, match="previous error during capture"):
        record(lambda: None, False)
    assert ended == [(0, 1)]


def test_too_little_memory_leaves_nothing_open(
    record: Callable[..., None], begun: list[Pool | None], ended: list[Pool]
) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(GraphMemoryError, match="out of memory"):
        record(too_large, True)
    record(lambda: None, True)
    assert (begun, ended) == ([(0, 1), (0, 2)], [])


class Body:
    def __call__(self) -> None:
        waits()


def test_a_failure_keeps_no_memory_alive(record: Callable[..., None]) -> None:
    """Else buffers that did not fit would stay until the next garbage collection, and fewer of them would not fit."""
    body = Body()
    alive = weakref.ref(body)
    gc.disable()
    try:
        with pytest.raises(CaptureError):
            record(body, False)
        del body
        assert alive() is None
    finally:
        gc.enable()
