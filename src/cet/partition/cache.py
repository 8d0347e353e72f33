"""Keeps the programs of a backbone right for the inputs of each call and the state of the backbone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cet.callers import level_of_caller
from cet.partition.cut import cut
from cet.partition.export import CUTTING
from cet.partition.fingerprint import Fingerprint, Path, changed_paths
from cet.partition.inputs import EXAMPLE_ROWS, InputFormat, copied
from cet.partition.obstacles import is_sharded, obstacle_to_cutting
from cet.partition.private_copy import private_copy
from cet.partition.stages import CutError, Program, Stages, check_classes, evaluating, logits_of
from cet.partition.verify import (
    DependentRowsError,
    ObservedError,
    answers_alike,
    has_same_gradients,
    refuse_mixed_rows,
    refuse_observed,
    verify,
)

MAX_PROGRAMS = 8
"""How many programs are kept for one state of the backbone."""

_MIXES = "its code mixes them"
_UNDER_AUTOCAST = (
    "within torch.autocast its stages, which are cut outside of it, answer otherwise, as where forward asks whether it "
    "is on or leaves it for a block; predict outside of it, or give cet.Stages"
)
_UNSEEN = "no program has been cut for inputs of these sizes, as that takes long and pays only where they recur"

_MAX_STATES = 4
_PATIENCE = 3
"""A kind of input that has come so often is worth a cut."""
_SHORT_CUT = 1.0
"""Seconds. A cut that takes longer waits until as much time has been spent without it."""
_PROMPT_CUTS = 8
"""How many states of the backbone are cut at their first call; later ones wait as new sizes do."""


class UncutWarning(UserWarning):
    """Samples are answered rightly, but by the whole backbone: nothing is saved."""


@dataclass
class _Waiting:
    """Calls of one kind that no program matched."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class _State:
    """One state of the backbone, and what is known of it."""

    fingerprint: Fingerprint
    obstacle: str | None
    programs: list[Program] = field(default_factory=list)
    waiting: dict[Any, _Waiting] = field(default_factory=dict)
    failures: dict[Any, str] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    has_own_rows: set[Any] = field(default_factory=set)
    """The sizes of inputs for which rows were seen not to depend on each other."""
    refusals: dict[Any, str] = field(default_factory=dict)
    """Why inputs of some sizes are refused: their rows depend on each other."""
    serves_autocast: WeakKeyDictionary[Program, dict[torch.dtype, bool]] = field(default_factory=WeakKeyDictionary)
    """By the dtype of autocast, whether a program answers within it as the backbone does."""
    differentiable: WeakKeyDictionary[Program, bool] = field(default_factory=WeakKeyDictionary)
    """Whether a program has the gradients of the backbone."""


class StageCache:
    """Owns the programs of one backbone, for one format of its inputs.

    A program holds for a state of the backbone (:class:`Fingerprint`) and for the dtypes and sizes of inputs that it
    was cut for. Where none matches, the call is answered without one, and the backbone is cut once such calls
    recur: a cut takes from a third of a second to a few seconds. Each cut is checked against the backbone itself.

    Args:
        backbone: the module.
        exits: submodule paths in the order of execution.
        input_format: the format of its inputs.
        masks: for each exit which of the inputs its head takes beside the features, if any.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: Sequence[str],
        input_format: InputFormat,
        masks: Sequence[int | None],
        num_classes: int,
    ) -> None:
        self.backbone = backbone
        self.exits = tuple(exits)
        self.input_format = input_format
        self.masks = tuple(masks)
        self.num_classes = num_classes
        self._states: list[_State] = []
        self._volatile: frozenset[Path] = frozenset()
        self._num_states = 0
        self.num_changes = 0
        """How often another state of the backbone was met so far."""
        self._last_cut = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Programs refer to the weights of one backbone: a copy makes its own."""
        return {**self.__dict__, "_states": []}

    def program(self, inputs: Sequence[Any]) -> Program | None:
        """The program for such inputs with at least one row; None where the uncut backbone has to answer.

        Raises:
            ValueError: where the backbone is in a state in which rows depend on each other.
        """
        state = self._current_state()
        if state.obstacle is not None:
            self._refuse_mixed_rows(state, inputs)
            _warn_once(state, state.obstacle)
            return None
        program = _matching(state, inputs)
        if program is None and not state.refusals.get(_sizes_of(inputs)):
            program = self._new_program(inputs)
        if program is None:
            self._refuse_mixed_rows(self._states[0], inputs)
        elif not self._serves_autocast(program, inputs):
            return None
        return program

    def _serves_autocast(self, program: Program, inputs: Sequence[Any]) -> bool:
        """Whether a program, which is cut outside of autocast, answers as the backbone in the caller's mode."""
        device = self.input_format.device(inputs).type
        if not torch.is_autocast_enabled(device):
            return True
        state, dtype = self._states[0], torch.get_autocast_dtype(device)
        known = state.serves_autocast.setdefault(program, {})
        if dtype not in known:
            with torch.inference_mode(False), torch.no_grad():
                rows = self._example_rows(inputs)
                known[dtype] = answers_alike(program, self.backbone, self.input_format, rows, dtype)
        if not known[dtype]:
            _warn_once(state, _UNDER_AUTOCAST)
        return known[dtype]

    def has_gradients(self, program: Program, inputs: Sequence[Any]) -> bool:
        """Whether a program has the backbone's gradients, which an autograd function or hooks of its own may change."""
        known = self._states[0].differentiable
        if program not in known:
            tensors = (value for value in inputs if isinstance(value, Tensor))
            if not any(tensor.requires_grad for tensor in (*self.backbone.parameters(), *tensors)):
                return True
            device = inputs[self.input_format.is_batched.index(True)].device
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                rows = self._example_rows(inputs)
                known[program] = has_same_gradients(program, self.backbone, self.input_format, rows)
        return known[program]

    def cut_now(self, inputs: Sequence[Any]) -> Program:
        """The program for such inputs, cut if need be.

        Raises:
            CutError: when the backbone cannot be cut for them, with the reason.
        """
        with CUTTING:
            state = self._current_state()
            if state.obstacle is not None:
                raise CutError(state.obstacle)
            return _matching(state, inputs) or self._cut(state, inputs)

    @contextmanager
    def timed(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Count the time of a call that runs without a program."""
        start = time.perf_counter()
        yield
        states = self._states
        if states and states[0].obstacle is None:
            waiting = states[0].waiting.setdefault(self._kind(states[0], inputs), _Waiting())
            waiting.seconds += time.perf_counter() - start

    def revalidate(self) -> None:
        """Compare the whole state of the backbone at the next call."""
        for state in self._states:
            state.fingerprint.expire()

    @property
    def is_used(self) -> bool:
        """Whether the backbone was ever cut for such inputs."""
        return any(state.programs for state in self._states)

    def is_current(self) -> bool:
        """Whether the backbone is in the state that was met last."""
        return not self._states or self._states[0].fingerprint.is_current()

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs for the present state of the backbone, latest first."""
        return tuple(self._current_state().programs)

    @property
    def state(self) -> tuple[object, Fingerprint]:
        """Stands for the present state of the backbone: one and the same object while nothing has changed; and its
        fingerprint, another one where parameters were replaced."""
        state = self._current_state()
        return state, state.fingerprint

    @property
    def obstacle(self) -> str | None:
        """Why the backbone must not be cut as it is now."""
        return self._current_state().obstacle

    def reason(self, inputs: Sequence[Any]) -> str | None:
        """Why no program serves such inputs now; None where one does."""
        state = self._current_state()
        program = _matching(state, inputs)
        if state.obstacle is None and program is not None and not self._serves_autocast(program, inputs):
            return _UNDER_AUTOCAST
        if state.obstacle is not None or program is not None:
            return state.obstacle
        return state.failures.get(self._kind(state, inputs), _UNSEEN)

    def _current_state(self) -> _State:
        states = self._states
        if states and states[0].fingerprint.is_current():
            return states[0]
        for state in states[1:]:
            if state.fingerprint.is_current():
                return self._first(state)
        # Explicit stages call the submodules as these are.
        fingerprint = self._fingerprint()
        for state in states:
            if state.fingerprint.matches(fingerprint):
                state.fingerprint = fingerprint
                return self._first(state)
        self._num_states += 1
        return self._first(_State(fingerprint, obstacle_to_cutting(self.backbone)))

    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(
            self.backbone,
            self._volatile,
            structure_only=isinstance(self.backbone, Stages),
            constants=[value for value in self.input_format.example if not isinstance(value, Tensor)],
        )

    def _first(self, state: _State) -> _State:
        self.num_changes += 1
        others = [other for other in self._states if other is not state]
        self._states = [state, *others[: _MAX_STATES - 1]]
        return state

    def _new_program(self, inputs: Sequence[Any]) -> Program | None:
        """Cut the backbone if that is worth it; never wait for another thread that cuts."""
        if not CUTTING.acquire(blocking=False):
            return None
        try:
            state = self._current_state()
            program = _matching(state, inputs)  # another thread may have been faster
            kind = self._kind(state, inputs)
            if program is not None or kind in state.failures or not self._is_worth_a_cut(state, kind):
                return program
            try:
                return self._cut(state, inputs)
            except CutError as error:
                if isinstance(error, ObservedError):  # until a setting of PyTorch changes, which nothing tells
                    raise
                if isinstance(error, DependentRowsError):
                    state.refusals[_sizes_of(inputs)] = str(error)
                    raise
                self._refuse_mixed_rows(state, inputs)
                state.failures[kind] = str(error)
                _warn_once(state, str(error))
                return None
        finally:
            CUTTING.release()

    def _is_worth_a_cut(self, state: _State, kind: Any) -> bool:
        if not state.programs and not state.failures and self._num_states <= _PROMPT_CUTS:
            return True
        waiting = state.waiting.setdefault(kind, _Waiting())
        waiting.calls += 1
        if waiting.calls >= _PATIENCE and self._last_cut < _SHORT_CUT and len(state.programs) < MAX_PROGRAMS:
            return True
        _warn_once(state, _UNSEEN)
        return waiting.calls >= _PATIENCE and waiting.seconds >= self._last_cut

    def _refuse_mixed_rows(self, state: _State, inputs: Sequence[Any]) -> None:
        """Where the backbone runs as it is, once for such sizes, see that its rows do not depend on each other."""
        kind = _sizes_of(inputs)
        if kind in state.refusals:
            raise DependentRowsError(state.refusals[kind])
        if kind not in state.has_own_rows and not any(is_sharded(weight) for weight in self.backbone.parameters()):
            device = self.input_format.device(inputs)
            # A backbone that draws random numbers draws those of the call itself from the caller's generator.
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                why, may_be_random = state.obstacle or _MIXES, state.obstacle is not None
                rows = self._example_rows(inputs)
                try:
                    refuse_mixed_rows(self.backbone, self.input_format, rows, why, may_be_random=may_be_random)
                    refuse_observed(self.backbone, self.exits, self.input_format, rows)
                except CutError as error:
                    if not state.fingerprint.is_current():  # another thread changed the backbone between two runs
                        return
                    if isinstance(error, DependentRowsError):
                        state.refusals[kind] = str(error)
                    raise
            state.has_own_rows.add(kind)

    def _kind(self, state: _State, inputs: Sequence[Any]) -> Any:
        """What calls have in common that one program would serve: their sizes where the last program fixes them."""
        fixed = state.programs[0].shapes if state.programs else [None] * len(inputs)
        kind: list[Any] = []
        for value, expected in zip(inputs, fixed or [None] * len(inputs), strict=False):
            if isinstance(value, Tensor):
                shape = (None,) * value.ndim if expected is None else expected[1]
                kind.append((value.dtype, *(n for n, s in zip(value.shape, shape, strict=True) if s is not None)))
        return tuple(kind)

    def _cut(self, state: _State, inputs: Sequence[Any]) -> Program:
        start = time.perf_counter()
        program = self._cut_and_verify(state, inputs)
        self._last_cut = time.perf_counter() - start
        state.programs = [program, *state.programs[: MAX_PROGRAMS - 1]]
        state.waiting.clear()
        return program

    def _cut_and_verify(self, state: _State, inputs: Sequence[Any]) -> Program:
        # Whatever the caller has switched on is no part of the backbone.
        device = inputs[self.input_format.is_batched.index(True)].device
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            example = self._example_rows(inputs)
            args, kwargs = self.input_format.unflatten(copied(example))
            if isinstance(self.backbone, Stages):
                with evaluating(self.backbone):
                    expected = check_classes(logits_of(self.backbone(*args, **kwargs)), self.num_classes)
                    program = self.backbone.program(self.exits, copied(example), EXAMPLE_ROWS)
                    verify(program, self.backbone, self.exits, self.input_format, example, expected)
                return program
            traced = private_copy(self.backbone, state.fingerprint.shared).eval()
            before = Fingerprint(traced).entries
            # First, for its own error on a wrong input.
            expected = check_classes(logits_of(traced(*args, **kwargs)), self.num_classes)
            self._note_volatile(state, changed_paths(before, Fingerprint(traced).entries))
            program = self._cut_dynamic_or_fixed(state, traced, example)
            try:
                verify(program, self.backbone, self.exits, self.input_format, example, expected)
            except CutError:
                refuse_observed(traced, self.exits, self.input_format, example)
                raise
            refuse_mixed_rows(traced, self.input_format, example, _MIXES, may_be_random=False)
        return program

    def _note_volatile(self, state: _State, paths: frozenset[Path]) -> None:
        # Attributes as wholes: of a module, or of a class.
        volatile = self._volatile | {path[: 4 if path[:2] == ("", "classes") else 2] for path in paths}
        if volatile != self._volatile:
            self._volatile = volatile
            state.fingerprint = self._fingerprint()

    def _cut_dynamic_or_fixed(self, state: _State, traced: nn.Module, example: Sequence[Any]) -> Program:
        """Sizes other than the batch vary where the code allows it."""
        try:
            return cut(self.backbone, traced, *self._how(example), dynamic=True)
        except CutError:
            # A failed export may have left its symbols behind in attributes of the copy.
            fresh = private_copy(self.backbone, state.fingerprint.shared).eval()
            return cut(self.backbone, fresh, *self._how(example), dynamic=False)

    def _how(self, example: Sequence[Any]) -> tuple[Sequence[str], InputFormat, Sequence[Any], Sequence[int | None]]:
        return self.exits, self.input_format, example, self.masks

    def _example_rows(self, inputs: Sequence[Any]) -> list[Any]:
        """A few rows of a call, the last one repeated where it has too few, and made different where they are alike:
        with equal rows nothing would show whether the backbone keeps them apart."""
        last = self.input_format.num_rows(inputs) - 1
        noise = torch.Generator().manual_seed(0)
        rows = []
        for value, batched in zip(inputs, self.input_format.is_batched, strict=True):
            if batched:
                value = value.detach()[torch.arange(EXAMPLE_ROWS, device=value.device).clamp(max=last)]
                if value.is_floating_point() and _has_equal_rows(value):
                    drawn = torch.randn(value.shape, generator=noise)
                    value = value.nan_to_num(0, 0, 0) + drawn.to(value.device, value.dtype)
            rows.append(value)
        return rows


def _sizes_of(inputs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((value.dtype, value.shape[1:]) for value in inputs if isinstance(value, Tensor))


def _matching(state: _State, inputs: Sequence[Any]) -> Program | None:
    for program in state.programs:
        if program.matches(inputs):
            return program
    return None


def _warn_once(state: _State, reason: str) -> None:
    if reason not in state.warned:
        state.warned.add(reason)
        warnings.warn(
            f"the uncut backbone answers, which saves nothing: {reason}", UncutWarning, stacklevel=level_of_caller()
        )


def _has_equal_rows(batch: Tensor) -> bool:
    flat = batch.reshape(len(batch), -1)
    if flat.isnan().any():
        return True
    return any(torch.equal(flat[i], flat[j]) for i in range(len(flat)) for j in range(i))
