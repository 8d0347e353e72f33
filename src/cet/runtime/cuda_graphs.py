"""CUDA graphs by way of PyTorch; linked graphs by way of cet's own extension."""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cet.ops.backend import cuda_extension
from cet.runtime.graph_backend import CaptureError, Graph, GraphMemoryError

_MEMORY_FRACTION = 0.5

_failed: list[torch.cuda.CUDAGraph] = []
"""Kept for good: the pinned-memory allocator of PyTorch 2.11 goes on asking them which streams are theirs."""


@cache
def why_no_switch() -> str | None:
    """Why graphs cannot be linked by SWITCH nodes here; ``None`` if they can."""
    extension = cuda_extension()
    if extension is None:
        return "cet was installed without its CUDA extension; install it where nvcc is, with CET_BUILD_CUDA=1"
    if not extension.has_switch:
        return "cet's CUDA extension was built with CUDA older than 12.8; build it again with a newer nvcc"
    driver = extension.driver_version()
    if driver == 0:
        return "there is no NVIDIA driver; install it on a machine with a GPU"
    # SWITCH nodes came with 12.8; within a major version a newer runtime works on an older driver.
    needed = max(12080, extension.runtime_version // 1000 * 1000)
    if driver < needed:
        return (
            f"the driver supports CUDA {_dotted(driver)}, and an extension built with CUDA "
            f"{_dotted(extension.runtime_version)} needs {_dotted(needed)}; install a newer driver"
        )
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


class _Streams(NamedTuple):
    """On one device, for all captures and models: each stream keeps a workspace of cuBLAS, and PyTorch has only 32.

    Captured products keep their workspace in that of the stream, so that no two graphs may run at once, also of
    different models.
    """

    captures: torch.cuda.Stream
    beside: torch.cuda.Stream
    done: torch.cuda.Event
    """Recorded behind all that was started last."""
    lock: threading.RLock
    """Held while a capture records what runs on the stream, whoever launches it, and while graphs are launched."""


_streams: dict[torch.device, _Streams] = {}
_making = threading.Lock()


def _streams_of(device: torch.device) -> _Streams:
    with _making:
        if device not in _streams:
            with torch.cuda.device(device):
                captures, beside = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            _streams[device] = _Streams(captures, beside, done, threading.RLock())
        return _streams[device]


class _CudaGraph:
    """Attributes:
    graph: PyTorch's.
    draws: whether its work draws random numbers.
    """

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        self.draws = False

    def instantiate(self) -> None:
        try:
            self.graph.instantiate()
        except RuntimeError as error:
            raise _explained(error) from error

    def replay(self) -> None:
        self.graph.replay()


class CudaGraphs:
    """The :class:`cet.runtime.graph_backend.GraphBackend` of one CUDA device.

    All graphs share one memory pool, until a capture fails. That is safe because they hand on values in memory of the
    caller's only, and no two of them run at once, nor beside those of another model on this device.
    """

    def __init__(self, device: torch.device, num_counts: int) -> None:
        self._device = device
        self._pools = [torch.cuda.graph_pool_handle()]  # captures take the last
        self._streams = _streams_of(device)
        self._is_first = True
        with torch.cuda.device(device):
            self._received = torch.zeros(num_counts, dtype=torch.int32, pin_memory=True)
        # External: recorded anew by each replay, for the host to wait on.
        self._arrived = [
            torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
            for _ in range(num_counts)
        ]

    def capture(self, body: Callable[[], None]) -> _CudaGraph:
        captured, stream = _CudaGraph(), self._streams.captures
        with torch.cuda.device(self._device), self._streams.lock:
            stream.wait_stream(torch.cuda.current_stream())
            stream.wait_event(self._streams.done)
            with torch.cuda.stream(stream):
                drawn = self._draws()
                try:
                    body()  # kernels are compiled and libraries make their handles outside of the capture
                finally:  # also after an error: memory that the body used is given to others then
                    stream.synchronize()
                captured.draws = self._draws() != drawn
                if self._is_first:  # and largest: what its run took, of which a pool gets nothing
                    torch.cuda.empty_cache()
                    self._is_first = False
                with _no_garbage_collection():
                    self._record(captured.graph, body)
        return captured

    def _draws(self) -> int:
        """How far the random generator of the device is."""
        return int(torch.cuda.default_generators[self._device.index or 0].get_offset())

    def _record(self, graph: torch.cuda.CUDAGraph, body: Callable[[], None]) -> None:
        try:
            graph.capture_begin(self._pools[-1], capture_error_mode="thread_local")
            try:
                body()
            except Exception:
                with suppress(RuntimeError):
                    self._end(graph)  # or the stream would go on capturing
                raise
            self._end(graph)
        except Exception as error:
            # PyTorch refuses the pool if it is still open, and if no graph is left that uses it.
            self._pools.append(torch.cuda.graph_pool_handle())
            raise _explained(error) from error

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End the capture. Where CUDA has refused it, undo what PyTorch 2.11 leaves (pytorch/pytorch#180395): its
        allocators still give out memory of the pool, and its random generator refuses all other draws."""
        try:
            graph.capture_end()
        except RuntimeError:
            _failed.append(graph)
            with suppress(RuntimeError):  # later versions have done it
                torch._C._cuda_endAllocateToPool(self._device.index, self._pools[-1])
            other = torch.cuda.CUDAGraph()  # a capture that succeeds, of anything, frees the generator
            other.capture_begin(capture_error_mode="thread_local")
            torch.zeros((), device=self._device)
            other.capture_end()
            raise

    def link(self, graphs: Sequence[Sequence[_CudaGraph]], buckets: Sequence[Sequence[int]], counts: Tensor) -> Graph:
        if any(graph.draws for of_segment in graphs for graph in of_segment):
            raise CaptureError("a stage draws random numbers, which would be the same ones in each call")
        raw = [[graph.graph.raw_cuda_graph() for graph in of_segment] for of_segment in graphs]
        try:
            linked = cuda_extension().SwitchGraph(self._device.index, raw, buckets, counts.data_ptr())
        except RuntimeError as error:
            raise _explained(error) from error
        return _Linked(linked)

    @contextmanager
    def sending(self, index: int, count: Tensor) -> Iterator[None]:
        current, beside = torch.cuda.current_stream(), self._streams.beside
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            self._received[index].copy_(count, non_blocking=True)
            self._arrived[index].record()
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # of a capture that failed; the first error is the one to tell
                current.wait_stream(beside)
            raise
        current.wait_stream(beside)

    def receive_count(self, index: int) -> int:
        self._arrived[index].synchronize()
        count = int(self._received[index])
        if count < 0:  # the event was not recorded by this replay
            torch.cuda.current_stream().synchronize()
            count = int(self._received[index])
        if count < 0:
            raise RuntimeError("the number of kept rows did not arrive from the device; choose runner='eager'")
        return count

    @contextmanager
    def in_order(self) -> Iterator[None]:
        done = self._streams.done
        with torch.cuda.device(self._device), self._streams.lock:
            stream = torch.cuda.current_stream()
            stream.wait_event(done)
            # Every count of earlier calls was waited for, so none is on its way here: what is read is of this call.
            self._received.fill_(-1)
            try:
                yield
            except BaseException:
                done.record(stream)
                done.synchronize()
                raise
            done.record(stream)

    def memory(self) -> int:
        segments = (torch.cuda.memory_snapshot(pool) for pool in self._pools)  # type: ignore[no-untyped-call]
        return sum(segment["total_size"] for of_pool in segments for segment in of_pool)

    def memory_limit(self) -> int:
        return int(_MEMORY_FRACTION * torch.cuda.get_device_properties(self._device).total_memory)

    def close(self) -> None:
        self._streams.done.synchronize()


class _Linked:
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        self._graph.launch(torch.cuda.current_stream().cuda_stream)


def _explained(error: Exception) -> RuntimeError:
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return GraphMemoryError(str(error))
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith("<cet ")] or list(frames)
    reason = str(error).splitlines() or [type(error).__name__]
    return CaptureError(f"{ours[-1].line}: {reason[0]}")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph or an event that was garbage and is destroyed within a capture would invalidate it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
