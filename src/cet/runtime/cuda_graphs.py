"""CUDA graphs by way of PyTorch; linked graphs by way of cet's own extension."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

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


class _CudaGraph(torch.cuda.CUDAGraph):
    def instantiate(self) -> None:
        try:
            super().instantiate()
        except RuntimeError as error:
            raise _explained(error) from error


class CudaGraphs:
    """The :class:`cet.runtime.graph_backend.GraphBackend` of one CUDA device.

    All graphs share one memory pool, until a capture fails. That is safe because they hand on values in memory of the
    caller's only, and no two of them run at once.
    """

    def __init__(self, device: torch.device, num_counts: int) -> None:
        self._device = device
        self._pools = [torch.cuda.graph_pool_handle()]  # captures take the last
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._received = torch.zeros(num_counts, dtype=torch.int32, pin_memory=True)
        # External: recorded anew by each replay, for the host to wait on.
        self._arrived = [
            torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
            for _ in range(num_counts)
        ]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def capture(self, body: Callable[[], None]) -> _CudaGraph:
        graph = _CudaGraph(keep_graph=True)
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                body()  # kernels are compiled and libraries make their handles outside of the capture
                self._stream.synchronize()
                torch.cuda.empty_cache()  # what the run took, of which a pool gets nothing
                self._record(graph, body)
        return graph

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
        raw = [[graph.raw_cuda_graph() for graph in of_segment] for of_segment in graphs]
        try:
            linked = cuda_extension().SwitchGraph(self._device.index, raw, buckets, counts.data_ptr())
        except RuntimeError as error:
            raise _explained(error) from error
        return _Linked(linked)

    @contextmanager
    def sending(self, index: int, count: Tensor) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._beside.wait_stream(current)
        with torch.cuda.stream(self._beside):
            self._received[index].copy_(count, non_blocking=True)
            self._arrived[index].record()
        yield
        current.wait_stream(self._beside)

    def receive_count(self, index: int) -> int:
        self._arrived[index].synchronize()
        return int(self._received[index])

    @contextmanager
    def in_order(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            yield
            self._done.record(stream)

    def memory(self) -> int:
        segments = (torch.cuda.memory_snapshot(pool) for pool in self._pools)  # type: ignore[no-untyped-call]
        return sum(segment["total_size"] for of_pool in segments for segment in of_pool)

    def memory_limit(self) -> int:
        return int(_MEMORY_FRACTION * torch.cuda.get_device_properties(self._device).total_memory)

    def close(self) -> None:
        self._done.synchronize()


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
    return CaptureError(f"{ours[-1].line}: {str(error).splitlines()[0]}")
