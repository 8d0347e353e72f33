"""Keeps the stages of a backbone right for the inputs and the weights of each call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cet.cut import cut
from cet.inputs import EXAMPLE_ROWS, InputFormat, copies
from cet.stages import CutError, StagedProgram, Stages, evaluating, logits_of

_MAX_PROGRAMS = 8


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

    def program(self, leaves: Sequence[Any]) -> StagedProgram:
        """The stages for such inputs, with at least one row."""
        for program in self._programs:
            if program.fits(leaves):
                return program
        # Whatever the caller has switched on is no part of the backbone.
        device = leaves[self.inputs.is_batched.index(True)].device
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            evaluating(self.backbone),
        ):
            example = self._example_rows(leaves)
            program = self._cut(example)
            self._verify(program, example)
        if len(self._programs) == _MAX_PROGRAMS:
            warnings.warn(
                f"more than {_MAX_PROGRAMS} kinds of inputs were seen, and cutting the backbone for each takes long; "
                "pad inputs to few sizes",
                stacklevel=5,
            )
        self._programs = [program, *self._programs[: _MAX_PROGRAMS - 1]]
        return program

    def _example_rows(self, leaves: Sequence[Any]) -> list[Any]:
        """A few rows of a call, repeated where it has too few."""
        rows = self.inputs.num_rows(leaves)
        return [
            leaf.detach()[torch.arange(EXAMPLE_ROWS, device=leaf.device) % rows] if batched else leaf
            for leaf, batched in zip(leaves, self.inputs.is_batched, strict=True)
        ]

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

    def _verify(self, program: StagedProgram, leaves: list[Any]) -> None:
        """Run the stages beside the backbone: all rows, and a single row from each cut on.

        Raises:
            CutError: when they disagree, which they do when the backbone mixes the rows of a batch or writes to values
                that cross an exit.
        """
        args, kwargs = self.inputs.unflatten(copies(leaves))
        expected = logits_of(self.backbone(*args, **kwargs))
        leaves = copies(leaves)
        sizes = program.input_sizes(leaves)
        values: Sequence[Any] = [leaves[index] for index in program.entry]
        *early, last = program.stages
        for k, stage in enumerate(early):
            _, *values = stage.run(EXAMPLE_ROWS, *sizes, *values)
            self._verify_last_row(program, k, values, sizes, expected)
        self._compare(last.run(EXAMPLE_ROWS, *sizes, *values), expected, "run in one piece")

    def _verify_last_row(
        self, program: StagedProgram, k: int, values: Sequence[Any], sizes: list[int], expected: Tensor
    ) -> None:
        last_row = EXAMPLE_ROWS - 1
        dims = program.stages[k].row_dims
        values = [
            value if dim is None else value.narrow(dim, last_row, 1) for value, dim in zip(values, dims, strict=True)
        ]
        values = copies(values)  # later stages may write to them
        try:
            for stage in program.stages[k + 1 : -1]:
                _, *values = stage.run(1, *sizes, *values)
            logits = program.stages[-1].run(1, *sizes, *values)
        except RuntimeError as error:
            raise CutError(
                f"{type(self.backbone).__name__} fails for one row behind exit {self.exits[k]!r} "
                f"({str(error).splitlines()[0]}); its code must work for any number of rows"
            ) from error
        self._compare(logits, expected[last_row:], f"when a row goes on alone behind exit {self.exits[k]!r}")

    def _compare(self, got: Tensor, expected: Tensor, when: str) -> None:
        scale = float(expected.float().abs().nan_to_num(0, 0, 0).max().clamp(min=1))
        tolerance = 64 * scale * torch.finfo(expected.dtype).eps ** 0.75
        if got.shape != expected.shape or not torch.allclose(
            got.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True
        ):
            raise CutError(
                f"the stages of {type(self.backbone).__name__} answer otherwise than the backbone {when}, as they do "
                "where rows are mixed or values are changed in place across an exit; compute each row on its own"
            )
