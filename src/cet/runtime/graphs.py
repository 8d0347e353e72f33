"""Runs batches by captured graphs: one per segment and bucket, launched by the host or linked into one."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cet.callers import level_of_caller
from cet.ops.backend import chosen_backend, needs_grad, preferring_triton
from cet.partition.fingerprint import watching
from cet.partition.stages import Program
from cet.runtime.buckets import choose_buckets
from cet.runtime.cuda_graphs import CudaGraphs, why_no_switch
from cet.runtime.eager import Answers
from cet.runtime.graph_backend import CaptureError, Graph, GraphBackend, GraphMemoryError
from cet.runtime.padded import PaddedProgram
from cet.runtime.policy import ExitPolicy
from cet.runtime.scores import require_kernel

MAX_BUCKETS = 8
"""How many graphs a segment may have."""

MAX_CAPTURES = 4
"""For how many kinds of calls graphs are kept."""


class Request(NamedTuple):
    """A batch of at least one row, and what is to be done with it.

    Attributes:
        program: the stages.
        modules: the backbone and the heads.
        policy: when rows leave.
        inputs: the inputs, as :meth:`cet.partition.inputs.InputFormat.flatten` gives them.
        is_batched: which of them hold one row per sample.
        names: of the inputs, for errors.
        rows: how many.
    """

    program: Program
    modules: Sequence[nn.Module]
    policy: ExitPolicy
    inputs: Sequence[Any]
    is_batched: Sequence[bool]
    names: Sequence[str]
    rows: int

    @property
    def device(self) -> torch.device:
        device: torch.device = self.inputs[self.is_batched.index(True)].device
        return device


@dataclass(frozen=True)
class Capture:
    """What was captured for one kind of call.

    Attributes:
        runner: ``"graphs"``, or ``"device"`` where the graphs are linked into one.
        exits: the exits, by name, at which the segments end.
        buckets: for each segment the numbers of rows that it was captured for.
        eager: the exits before which a segment runs eagerly, because it cannot be captured.
        buffer_bytes: memory between the segments.
        graph_bytes: memory within the segments, which all graphs share.
        reason: why the device does not launch them itself; None where it does, or could.
    """

    runner: str
    exits: tuple[str, ...]
    buckets: tuple[tuple[int, ...], ...]
    eager: tuple[str, ...]
    buffer_bytes: int
    graph_bytes: int
    reason: str | None = None


class _Kind(NamedTuple):
    """What calls of one program must have in common to be served by the same graphs."""

    linked: bool
    inputs: tuple[Any, ...]
    open_exits: tuple[bool, ...]
    score: str
    autocast: torch.dtype | None
    backend: str | None

    @classmethod
    def of(cls, request: Request, *, linked: bool) -> _Kind:
        device = request.device.type
        inputs = tuple(
            (value.dtype, value.device, value.shape[batched:]) if isinstance(value, Tensor) else (type(value), value)
            for value, batched in zip(request.inputs, request.is_batched, strict=True)
        )
        open_exits = tuple(threshold is not None for threshold in request.policy.thresholds)
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(
            linked, inputs, open_exits, require_kernel(request.policy.score, "a CUDA graph"), autocast, chosen_backend()
        )


class _Weights:
    """The parameters and buffers of some modules, kept where the graphs read them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        submodules = [submodule for module in modules for submodule in module.modules()]
        self._children = [(m._modules, name, child) for m in submodules for name, child in m.named_children()]
        self._slots = [
            (tensors, name)
            for submodule in submodules
            for tensors in (submodule._parameters, submodule._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._containers: list[tuple[Any, None]] = [
            (container, None) for m in submodules for container in (m._modules, m._parameters, m._buffers)
        ]
        self._look()
        # Held, so that a graph that runs before the check reads them, and nothing else takes their place.
        self._held = [tensor.detach() for tensor in self._tensors]
        self._addresses = [*map(Tensor.data_ptr, self._held)]

    def are_those_of(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these are the weights of ``modules`` now. Takes microseconds where no tensor was replaced."""
        return (
            len(modules) == len(self._modules)
            and all(map(is_, modules, self._modules))
            and (bool(self._watch.unchanged()) or self._are_in_place())
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
        )

    def _are_in_place(self) -> bool:
        """Whether there are as many as before, in the same modules; from now on it is these that count."""
        if not all(children.get(name) is module for children, name, module in self._children):
            return False
        self._look()
        return len(self._tensors) == len(self._slots)

    def _look(self) -> None:
        self._watch = watching(self._containers, [], [])
        tensors = (tensors.get(name) for tensors, name in self._slots)
        self._tensors = [tensor for tensor in tensors if tensor is not None]


class _Captured:
    """The graphs for one kind of call with so many rows as the program has room for."""

    def __init__(
        self,
        backend: GraphBackend,
        program: PaddedProgram,
        weights: _Weights,
        buckets: Sequence[tuple[int, ...]],
        exit_names: Sequence[str],
        *,
        linked: bool,
    ) -> None:
        self.program = program
        self.weights = weights
        self.buckets = buckets
        self.eager: list[int] = []
        self.why_not_linked: str | None = None
        self._backend = backend
        self._graphs: list[dict[int, Graph]] = []
        linked = linked and len(buckets) > 1  # the bucket of the first segment is known to the host
        sending = _unsent if linked else backend.sending
        for index, of_segment in enumerate(buckets):
            graphs: dict[int, Graph] = {}
            try:
                for rows in reversed(of_segment):  # large ones first: the others fit into their memory
                    graphs[rows] = backend.capture(partial(program.run, index, rows, sending))
                    if not linked:
                        graphs[rows].instantiate()
                    _check_memory(backend)
            except CaptureError as error:
                where = f"the segment before exit {exit_names[program.segments[index].exit_index]!r}"
                if linked:
                    raise CaptureError(f"{where} cannot be captured ({error})") from error
                _warn(f"{where} cannot be captured ({error}); it runs eagerly")
                self.eager.append(index)
                graphs = {}
            self._graphs.append(graphs)
        self.close = weakref.finalize(self, backend.close)
        """Waits until no graph runs any more; at the latest before the memory that they use is gone."""
        self.close.atexit = False
        self._whole: Graph | None = None
        if linked:
            ascending = [[graphs[rows] for rows in sorted(graphs)] for graphs in self._graphs]
            self._whole = backend.link(ascending, buckets, program.counts)

    def run(self, request: Request, *, with_scores: bool) -> Answers:
        with self._backend.in_order():
            self.program.load(request.inputs, request.rows, request.policy)
            if self._whole is not None:
                self._whole.replay()
            else:
                self._run_segments(request.rows)
            return self.program.answers(request.rows, with_scores=with_scores)

    def _run_segments(self, rows: int) -> None:
        last = len(self._graphs) - 1
        for index, graphs in enumerate(self._graphs):
            if graphs:
                graphs[next(bucket for bucket in self.buckets[index] if bucket >= rows)].replay()
            else:
                self.program.run(index, rows, self._backend.sending)
            if index < last:
                rows = self._backend.receive_count(index)
                if rows == 0:
                    return

    def report(self, exit_names: Sequence[str]) -> Capture:
        ends = [exit_names[segment.exit_index] for segment in self.program.segments]
        return Capture(
            runner="graphs" if self._whole is None else "device",
            exits=tuple(ends),
            buckets=tuple(self.buckets),
            eager=tuple(ends[index] for index in self.eager),
            buffer_bytes=self.program.memory(),
            graph_bytes=self._backend.memory(),
            reason=None if self._whole is not None else self.why_not_linked or why_no_switch(),
        )


class _Entry(NamedTuple):
    program: Program
    kind: _Kind
    capacity: int
    captured: _Captured | None
    """None where the graphs did not fit into memory: such calls run eagerly."""


class GraphRunner:
    """Captures graphs for the calls that it sees, and runs later ones by them.

    The first call of a kind is captured for up to the rows that it has, so run the largest batch first: a larger one
    is captured anew. So are calls after weights have moved, which is found while the graphs run; what they gave is
    then thrown away. Flags of ``torch.backends`` are in the graphs as they were.

    Args:
        exit_names: for messages.
        backend: makes the backend for a device and a number of counts.
    """

    def __init__(
        self,
        exit_names: Sequence[str],
        backend: Callable[[torch.device, int], GraphBackend] = CudaGraphs,
    ) -> None:
        self._exit_names = exit_names
        self._backend = backend
        self._entries: list[_Entry] = []
        self._prefers_triton = True
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Graphs refer to the weights of one model: a copy makes its own."""
        return GraphRunner, (self._exit_names, self._backend)

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What is captured, latest first."""
        return tuple(entry.captured.report(self._exit_names) for entry in self._entries if entry.captured)

    def forget(self) -> None:
        """Free all graphs and their memory."""
        with self._lock:
            self._drop(lambda _: True)

    def run(self, request: Request, *, linked: bool, with_scores: bool) -> Answers | None:
        """Answer every row, as :func:`cet.runtime.eager.run_batch` does.

        Args:
            request: the batch.
            linked: whether to link the graphs into one.
            with_scores: whether exit index and score are wanted.

        Returns:
            The answers; None for a call that must run eagerly, because it needs gradients or its graphs do not fit
            into memory. A warning says so.

        Raises:
            ValueError: for inputs on several devices.
        """
        parameters = (parameter for module in request.modules for parameter in module.parameters())
        inputs = (value for value in request.inputs if isinstance(value, Tensor))
        if needs_grad(itertools.chain(inputs, parameters)):
            _warn("graphs hold no gradients, so this call runs eagerly; use torch.no_grad() or predict")
            return None
        with self._lock, torch.no_grad():
            if self._prefers_triton:
                try:
                    with preferring_triton(request.device):
                        return self._answers(request, linked=linked, with_scores=with_scores)
                except Exception as error:
                    if type(error).__module__.partition(".")[0] != "triton" or chosen_backend() is not None:
                        raise
                    self._prefers_triton = False
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    _warn(f"Triton has no kernel for this model ({reason}), so graphs hold PyTorch's operations")
            return self._answers(request, linked=linked, with_scores=with_scores)

    def _answers(self, request: Request, *, linked: bool, with_scores: bool) -> Answers | None:
        kind = _Kind.of(request, linked=linked)
        captured = (self._find(request, kind) or self._capture(request, kind)).captured
        if captured is None:
            return None
        answers = captured.run(request, with_scores=with_scores)
        if captured.weights.are_those_of(request.modules):
            return answers
        captured = self._capture(request, kind).captured
        return None if captured is None else captured.run(request, with_scores=with_scores)

    def _find(self, request: Request, kind: _Kind) -> _Entry | None:
        for entry in self._entries:
            if entry.program is request.program and request.rows <= entry.capacity and entry.kind == kind:
                return entry
        return None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, request: Request, kind: _Kind) -> _Entry:
        _check_devices(request)
        self._drop(lambda entry: entry.program is request.program and entry.kind == kind)
        if len(self._entries) == MAX_CAPTURES:
            _warn(
                f"more than {MAX_CAPTURES} kinds of calls were seen, and capturing graphs for each takes long; pad "
                "inputs to few sizes and keep to few policies"
            )
            oldest = self._entries[-1]
            self._drop(lambda entry: entry is oldest)
        linked, limit = kind.linked, MAX_BUCKETS
        reason = None
        captured = None
        while limit and captured is None:
            try:
                captured = self._capture_with(request, kind.autocast, limit, linked=linked)
            except (GraphMemoryError, torch.OutOfMemoryError) as error:
                limit //= 2
                then = f"trying {limit} for each exit" if limit else "such calls run eagerly"
                _warn(f"graphs for batches of {request.rows} do not fit ({error}); {then}")
            except CaptureError as error:
                linked, reason = False, str(error)  # after which it cannot happen again
                _warn(f"{error}, so runner 'device' runs as 'graphs'")
        if captured is not None:
            captured.why_not_linked = reason
        entry = _Entry(request.program, kind, request.rows, captured)
        self._entries.insert(0, entry)
        return entry

    def _capture_with(self, request: Request, autocast: torch.dtype | None, limit: int, *, linked: bool) -> _Captured:
        # Weights that autocast keeps would be kept in the memory of one graph and read by others.
        device = request.device
        with torch.autocast(device.type, autocast, cache_enabled=False) if autocast else nullcontext():
            weights = _Weights(request.modules)
            program = PaddedProgram(
                request.program, request.modules[1:], request.policy, request.inputs, request.is_batched, request.rows
            )
            exits = [segment.exit_index for segment in program.segments[:-1]]
            buckets = choose_buckets(request.rows, exits, request.policy.survival, limit)
            backend = self._backend(device, len(program.segments))
            return _Captured(backend, program, weights, buckets, self._exit_names, linked=linked)

    def _drop(self, unwanted: Callable[[_Entry], bool]) -> None:
        dropped = [entry for entry in self._entries if unwanted(entry)]
        self._entries = [entry for entry in self._entries if not unwanted(entry)]
        for entry in dropped:
            if entry.captured is not None:
                entry.captured.close()


def _check_devices(request: Request) -> None:
    for name, value in zip(request.names, request.inputs, strict=True):
        if isinstance(value, Tensor) and value.device != request.device:
            first = request.names[request.is_batched.index(True)]
            raise ValueError(f"{name} is on {value.device} but {first} on {request.device}; move one")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=level_of_caller())


def _unsent(index: int, count: Tensor) -> nullcontext[None]:
    return nullcontext()


def _check_memory(backend: GraphBackend) -> None:
    used, limit = backend.memory(), backend.memory_limit()
    if used > limit:
        raise GraphMemoryError(f"they need more than {used >> 20} MiB, where {limit >> 20} MiB is the limit")
