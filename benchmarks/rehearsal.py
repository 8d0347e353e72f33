"""The CPU in a GPU's place: streams, events and graphs that record what runs between begin and end, and run it again.

What a real capture refuses is refused here too: reading a value, or a constant made on the host. So all that surrounds
the kernels, the graph runners and the scripts of the first contact with a GPU, runs where there is none. It proves the
order of calls and the values, never timing or memory order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

REFUSED = "operation not permitted when stream is capturing"
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
WAITING |= {"lift_fresh", "lift_fresh_copy"}
"""Operations that wait for a device, or copy from pageable memory of the host."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations that a capture refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_flags = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if name in WAITING or by_flags:
            raise RuntimeError(f"{name}: {REFUSED}")
        return func(*args, **(kwargs or {}))


class _Recorder(NoWaiting):
    """Notes what runs, and runs it again into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.steps.append(lambda: _again(func, args, kwargs, result))
        return result


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(result), strict=True):
        if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
            old.copy_(new)


_recording: list[_Recorder] = []
_seed = [0]  # how many draws the default generator has made


class Stream:
    """Work that is launched as a whole; it runs when somebody waits for it if the device is late, else at once."""

    cuda_stream = 0
    late = False
    """Whether work runs only when the stream is waited for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.queue: list[Callable[[], None]] = []

    def launch(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        if not Stream.late:
            self.synchronize()

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def wait_stream(self, other: Stream) -> None:
        if not _recording:
            other.synchronize()

    def wait_event(self, event: Event) -> None:
        event.synchronize()


_current = [Stream()]


class Event:
    """Waiting for one runs what its stream was given before; unless it is broken, which real ones are not."""

    broken = False

    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or _current[-1]

    def synchronize(self) -> None:
        # Whatever the stream of a capture, the work runs on the one that the graph is launched on.
        if not Event.broken:
            for stream in {id(s): s for s in (*_current, self._stream) if s is not None}.values():
                stream.synchronize()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e-3


class Graph:
    """A stand-in for :class:`torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorder = _Recorder()
        self._is_ready = not keep_graph

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._recorder.__enter__()
        _recording.append(self._recorder)

    def capture_end(self) -> None:
        _recording.remove(self._recorder)
        self._recorder.__exit__(None, None, None)

    def instantiate(self) -> None:
        self._is_ready = True

    def replay(self) -> None:
        assert self._is_ready
        _current[-1].launch(self.run)

    def run(self) -> None:
        with torch.no_grad():
            for step in self._recorder.steps:
                step()

    def raw_cuda_graph(self) -> Graph:
        return self


class SwitchGraph:
    """What the SWITCH nodes do, a stale count for a segment that was not run included."""

    def __init__(
        self, device: int, graphs: Sequence[Sequence[Graph]], buckets: Sequence[Sequence[int]], counts: int
    ) -> None:
        self._graphs, self._buckets = graphs, buckets
        self._counts = (ctypes.c_int32 * (len(graphs) + 1)).from_address(counts)

    def launch(self, stream: int) -> None:
        _current[-1].launch(self._run)

    def _run(self) -> None:
        for index, (graphs, buckets) in enumerate(zip(self._graphs, self._buckets, strict=True)):
            count = self._counts[index]
            if count == 0:
                self._counts[index + 1] = 0
            else:
                graphs[next(i for i, bucket in enumerate(buckets) if bucket >= count)].run()


class _Generator:
    """Counts as CUDA's generators do; a test that draws says so by :func:`draw`."""

    def get_offset(self) -> int:
        return _seed[0]


def draw() -> None:
    """Tell the generator that numbers were drawn."""
    _seed[0] += 4


class _Graphing:
    """A stand-in for :class:`torch.cuda.graph`."""

    def __init__(self, graph: Graph, **_: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        self._graph.capture_begin()

    def __exit__(self, *_: Any) -> None:
        self._graph.capture_end()


@contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    _current.append(stream)
    try:
        yield
    finally:
        _current.pop()


def _record_launches() -> Any:
    """Have kernels that are interpreted be part of a capture."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # of what the interpreter does the device sees nothing
            run(self, *args, **kwargs)
        if _recording:
            _recording[-1].steps.append(lambda: run(self, *args, **kwargs))

    return mock.patch.object(GridExecutor, "__call__", noted)


@contextmanager
def cpu_as_gpu(*, late: bool = False) -> Iterator[None]:
    """Have ``torch.cuda`` work on CPU tensors, whose device then counts as a GPU for the graph runners.

    Args:
        late: whether work that is launched runs only when it is waited for.
    """
    properties = mock.Mock(total_memory=1 << 34, multi_processor_count=132, uuid="0")
    fakes: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": _Graphing,
        "current_stream": lambda *_: _current[-1],
        "stream": _on_stream,
        "device": lambda *_: nullcontext(),
        "synchronize": lambda *_: _current[-1].synchronize(),
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: (0, 1),
        "memory_snapshot": lambda *_: [],
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "default_generators": [_Generator()],
    }
    zeros = torch.zeros

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return zeros(*args, **kwargs)

    with mock.patch.multiple(torch.cuda, **fakes), mock.patch.object(torch, "zeros", unpinned), _record_launches():
        Stream.late = late
        try:
            yield
        finally:
            Stream.late = Event.broken = False
            _current[:] = [Stream()]


@contextmanager
def rehearsing() -> Iterator[None]:
    """:func:`cpu_as_gpu` for whole models: every runner takes CPU tensors."""
    extension = mock.Mock(has_switch=True, runtime_version=13000, SwitchGraph=SwitchGraph)
    extension.driver_version.return_value = 13000
    with ExitStack() as stack:
        stack.enter_context(cpu_as_gpu())
        for target, fake in {
            "cet.runtime.cuda_graphs.cuda_extension": lambda: extension,
            "cet.runtime.graphs.why_no_switch": lambda: None,
            "cet.model.early_exit.runner_for": lambda device, wanted: wanted or "eager",
            "cet.model.early_exit.check_runner": lambda wanted: None,
            "cet.ops.backend.why_no_triton": lambda device: None,
        }.items():
            stack.enter_context(mock.patch(target, fake))
        stack.enter_context(mock.patch("cet.runtime.cuda_graphs._streams", {}))
        yield
