"""Keeps the stages of a backbone right for the inputs and the weights of each call."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cet.partition.cut import cut
from cet.partition.inputs import EXAMPLE_ROWS, InputFormat, copies
from cet.partition.stages import CutError, StagedProgram, Stages, children_of, evaluating, logits_of

_MAX_PROGRAMS = 8


class _TraceLock:
    """Many threads may run models at once, but none while one of them traces a backbone.

    ``torch.export`` patches torch, and the backbone's parameters, for all threads while it traces: so there is one lock
    for the process. It is entered by those who run.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self._here = threading.local()

    def __enter__(self) -> None:
        with self._condition:
            self._running += 1
            self._here.running = getattr(self._here, "running", 0) + 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._running -= 1
            self._here.running -= 1
            self._condition.notify_all()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Wait until no other thread runs, and keep them from starting."""
        with self._condition:
            self._condition.wait_for(lambda: self._running == getattr(self._here, "running", 0))
            yield


TRACE_LOCK = _TraceLock()


class Staging:
    """The staged programs of one backbone.

    A program holds for the dtypes and sizes of inputs, and the dtype and device of weights, that it was cut for. A
    call that none fits has the backbone cut again, with every input size that was seen to change allowed to vary; each
    cut is checked against the backbone itself.
    """

    def __init__(self, backbone: nn.Module, exits: Sequence[str], inputs: InputFormat) -> None:
        self.backbone = backbone
        self.exits = tuple(exits)
        self.inputs = inputs
        self._programs: list[StagedProgram] = []

    def __getstate__(self) -> dict[str, Any]:
        """Programs refer to the weights of one backbone: a copy makes its own."""
        return {**self.__dict__, "_programs": []}

    def program(self, backbone: nn.Module, leaves: Sequence[Any]) -> StagedProgram:
        """The stages of ``backbone``, of which there is but one at a time, for such inputs with at least one row."""
        if backbone is not self.backbone:
            self.backbone, self._programs = backbone, []
        program = self._fitting(leaves)
        if program is not None:
            return program
        with TRACE_LOCK.tracing():
            return self._fitting(leaves) or self._new_program(leaves)

    def forget(self) -> None:
        """Cut again at the next call."""
        self._programs = []

    def _fitting(self, leaves: Sequence[Any]) -> StagedProgram | None:
        for program in self._programs:
            if program.fits(leaves):
                return program
        return None

    def _new_program(self, leaves: Sequence[Any]) -> StagedProgram:
        # Whatever the caller has switched on is no part of the backbone.
        device = leaves[self.inputs.is_batched.index(True)].device
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            evaluating(self.backbone),
        ):
            example = self._example_rows(leaves)
            args, kwargs = self.inputs.unflatten(copies(example))
            expected = logits_of(self.backbone(*args, **kwargs))  # first, for its own error on a wrong input
            program = self._cut(example)
            self._verify(program, example, expected)
            program = replace(program, modules=children_of(self.backbone))
        if len(self._programs) == _MAX_PROGRAMS:
            warnings.warn(
                f"more than {_MAX_PROGRAMS} kinds of inputs were seen, and cutting the backbone for each takes long; "
                "pad inputs to few sizes",
                stacklevel=level_of_caller(),
            )
        self._programs = [program, *self._programs[: _MAX_PROGRAMS - 1]]
        return program

    def _example_rows(self, leaves: Sequence[Any]) -> list[Any]:
        """A few rows of a call, the last one repeated where it has too few, and made different where they are alike:
        with equal rows nothing would show whether the backbone keeps them apart."""
        last = self.inputs.num_rows(leaves) - 1
        noise = torch.Generator().manual_seed(0)
        rows = []
        for leaf, batched in zip(leaves, self.inputs.is_batched, strict=True):
            if batched:
                leaf = leaf.detach()[torch.arange(EXAMPLE_ROWS, device=leaf.device).clamp(max=last)]
                if leaf.is_floating_point() and _has_equal_rows(leaf):
                    drawn = torch.randn(leaf.shape, generator=noise)
                    leaf = leaf.nan_to_num(0, 0, 0) + drawn.to(leaf.device, leaf.dtype)
            rows.append(leaf)
        return rows

    def _cut(self, leaves: list[Any]) -> StagedProgram:
        if isinstance(self.backbone, Stages):
            return self.backbone.program(self.exits, copies(leaves), EXAMPLE_ROWS)
        varying = self._sizes_that_changed(leaves)
        try:
            return cut(self.backbone, self.exits, self.inputs, leaves, varying)
        except CutError:
            if not varying:
                raise
            return cut(self.backbone, self.exits, self.inputs, leaves)

    def _sizes_that_changed(self, leaves: Sequence[Any]) -> frozenset[tuple[int, int]]:
        changed: set[tuple[int, int]] = set()
        for program in self._programs:
            changed.update(program.sizes)
            for index, (leaf, expected) in enumerate(zip(leaves, program.shapes, strict=True)):
                if expected is not None:
                    sizes = enumerate(zip(leaf.shape, expected[1], strict=True))
                    changed.update((index, dim) for dim, (size, old) in sizes if old is not None and size != old)
        return frozenset(changed)

    def _verify(self, program: StagedProgram, leaves: list[Any], expected: Tensor) -> None:
        """Run the stages beside the backbone: all rows, and each row alone from each cut on.

        Raises:
            CutError: when they disagree, which they do when the backbone mixes the rows of a batch or writes to values
                that cross an exit.
        """
        leaves = copies(leaves)
        sizes = program.input_sizes(leaves)
        values: Sequence[Any] = [leaves[index] for index in program.entry]
        *early, last = program.stages
        dims: Sequence[int | None] = [0 if self.inputs.is_batched[index] else None for index in program.entry]
        self._verify_single_rows(program, 0, values, dims, sizes, expected)
        for k, stage in enumerate(early):
            _, *values = stage.run(EXAMPLE_ROWS, *sizes, *values)
            self._verify_single_rows(program, k + 1, values, stage.row_dims, sizes, expected)
        self._compare(last.run(EXAMPLE_ROWS, *sizes, *values), expected, "run in one piece")

    def _verify_single_rows(
        self,
        program: StagedProgram,
        start: int,
        values: Sequence[Any],
        dims: Sequence[int | None],
        sizes: list[int],
        expected: Tensor,
    ) -> None:
        where = f" behind exit {self.exits[start - 1]!r}" if start else ""
        for row in range(EXAMPLE_ROWS):
            alone: Sequence[Any] = copies(  # later stages may write to them
                [value if dim is None else value.narrow(dim, row, 1) for value, dim in zip(values, dims, strict=True)]
            )
            try:
                for stage in program.stages[start:-1]:
                    _, *alone = stage.run(1, *sizes, *alone)
                logits = program.stages[-1].run(1, *sizes, *alone)
            except RuntimeError as error:
                raise CutError(
                    f"{type(self.backbone).__name__} fails for one row{where} "
                    f"({str(error).splitlines()[0]}); its code must work for any number of rows"
                ) from error
            self._compare(logits, expected[row : row + 1], f"when a row goes on alone{where}")

    def _compare(self, got: Tensor, expected: Tensor, when: str) -> None:
        scale = float(expected.float().abs().nan_to_num(0, 0, 0).max().clamp(min=0.1))
        tolerance = scale * min(64 * torch.finfo(expected.dtype).eps ** 0.75, 0.125)
        if got.shape != expected.shape or not torch.allclose(
            got.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True
        ):
            raise CutError(
                f"the stages of {type(self.backbone).__name__} answer otherwise than the backbone {when}, as they do "
                "where it mixes rows, changes values in place across an exit, is random or keeps state; let each row "
                "depend on itself alone"
            )


def level_of_caller() -> int:
    """How far up the stack, from the caller of this function, the code is that uses cet."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("cet", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _has_equal_rows(batch: Tensor) -> bool:
    flat = batch.reshape(len(batch), -1)
    if flat.isnan().any():
        return True
    return any(torch.equal(flat[i], flat[j]) for i in range(len(flat)) for j in range(i))
