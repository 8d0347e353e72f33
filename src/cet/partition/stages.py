"""A backbone as stages: what the runners run, and backbones whose stages are given explicitly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class CutError(ValueError):
    """The backbone cannot be cut into stages at these exits."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    ``run(n, *sizes, *values)`` takes the number of rows, the sizes of the inputs that vary, and what crosses the cut
    before it. It returns ``(features, *values)``: the features of its exit and what crosses the cut behind it; the last
    stage returns the logits.
    """

    run: Callable[..., Any]
    row_dims: tuple[int | None, ...]
    """For each value that crosses the cut behind the stage, the dimension that holds the rows, or None."""
    mask: int | None = None
    """Which of these values is the mask of the exit's head, if it takes one."""
    source: str = ""
    """The Python source of ``run`` where it was generated."""


@dataclass(frozen=True, eq=False)
class Program:
    """A backbone as stages, for inputs of certain dtypes and shapes."""

    stages: tuple[Stage, ...]
    entry: tuple[int, ...]
    """Which of the inputs the first stage takes."""
    sizes: tuple[tuple[int, int], ...] = ()
    """The (input, dimension) of each input size that may vary besides the batch."""
    shapes: tuple[tuple[torch.dtype, tuple[int | None, ...]] | None, ...] = ()
    """Per input its dtype and shape, None for sizes that may vary; None for inputs that may be anything."""
    guard: Callable[..., bool] | None = None
    """Tests the sizes of ``guarded``; None where the stages hold for all."""
    guarded: tuple[tuple[int, int], ...] = ()
    """The (input, dimension) of each size that the guard takes."""
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a runner found out about the program last."""

    def matches(self, inputs: Sequence[Any]) -> bool:
        """Whether the stages were cut for such inputs."""
        for value, expected in zip(inputs, self.shapes, strict=False):
            if expected is not None:
                dtype, shape = expected
                if value.dtype != dtype:
                    return False
                for size, wanted in zip(value.shape, shape, strict=True):
                    if wanted is not None and size != wanted:
                        return False
        return self.guard is None or self.guard(*[inputs[index].shape[dim] for index, dim in self.guarded])

    def input_sizes(self, inputs: Sequence[Any]) -> list[int]:
        """The sizes that every stage takes after the number of rows."""
        return [inputs[index].shape[dim] for index, dim in self.sizes]

    def entry_values(self, inputs: Sequence[Any]) -> list[Any]:
        """What the first stage takes after the number of rows and the sizes."""
        return [inputs[index] for index in self.entry]


class Stages(nn.Module):
    """A backbone given as stages, for those that ``torch.export`` cannot trace.

    Each stage is called with what the one before it returned, a tensor or a tuple of tensors, all of them ``(n, ...)``
    with one row per sample; the first is called with the inputs. The last returns the logits. Exits are named by the
    stages after which a sample may leave; the feature of an exit is the first tensor that its stage returns.

    >>> backbone = cet.Stages(stem=Stem(), body=Body(), tail=Tail())
    >>> model = cet.EarlyExit(backbone, ["stem", "body"], example_inputs=(x,))
    """

    def __init__(self, **stages: nn.Module) -> None:
        super().__init__()
        if len(stages) < 2:
            raise ValueError(f"Stages got {len(stages)} stages; give at least two, in the order of execution")
        for name, stage in stages.items():
            self.add_module(name, stage)

    def forward(self, *inputs: Any) -> Any:
        return _call_in_turn(list(self.children()), inputs)

    def program(self, exits: Sequence[str], inputs: Sequence[Any], num_rows: int) -> Program:
        """The stages between these exits, for inputs like ``inputs``.

        Raises:
            CutError: for an exit that is no stage or out of order, and for a value without one row per sample.
        """
        names = [name for name, _ in self.named_children()]
        ends = []
        for path in exits:
            if path not in names[:-1]:
                raise CutError(f"exit {path!r} is no stage before the last; name one of {', '.join(names[:-1])}")
            ends.append(names.index(path) + 1)
        if ends != sorted(ends):
            raise CutError(f"exits {', '.join(exits)} are not in the order of execution, {', '.join(names)}; sort them")
        modules = list(self.children())
        stages: list[Stage] = []
        values: Sequence[Any] = inputs
        for start, end in zip([0, *ends], ends, strict=False):
            run = partial(_run_to_exit, names[end - 1], modules[start:end])
            _, *values = run(num_rows, *values)
            stages.append(Stage(run, row_dims=(0,) * len(values)))
        stages.append(Stage(partial(_run_to_end, modules[ends[-1] :]), row_dims=()))
        return Program(stages=tuple(stages), entry=tuple(range(len(inputs))))


def _call_in_turn(modules: Sequence[nn.Module], values: Any) -> Any:
    for module in modules:
        values = module(*values) if isinstance(values, tuple) else module(values)
    return values


def _run_to_exit(name: str, modules: Sequence[nn.Module], n: int, *values: Any) -> tuple[Any, ...]:
    outputs = _call_in_turn(modules, values)
    crossing = outputs if isinstance(outputs, tuple) else (outputs,)
    for index, value in enumerate(crossing):
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != n:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise CutError(f"output {index} of stage {name!r} has {got} for {n} rows; return tensors (n, ...) only")
    return (crossing[0], *crossing)


def _run_to_end(modules: Sequence[nn.Module], _: int, *values: Any) -> Tensor:
    return logits_of(_call_in_turn(modules, values))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for all submodules; each gets its own mode back."""
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in training:
            submodule.training = mode


def logits_of(output: Any) -> Tensor:
    """The logits ``(B, K)`` in what a backbone returns: the tensor itself, or its attribute ``logits``.

    A single logit ``(B, 1)`` or ``(B,)``, as binary
    cross-entropy takes, becomes the logits ``(B, 2)`` of two classes: 0, itself.

    Raises:
        TypeError: for any other output.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the backbone returns {type(output).__name__}; it must return logits (B, K) or an object with .logits, so "
            "wrap it in a module that does"
        )
    if logits.ndim == 1 and logits.is_floating_point():
        logits = logits[:, None]
    if logits.ndim == 2 and logits.shape[1] == 1:
        return torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits


def check_classes(logits: Tensor, num_classes: int) -> Tensor:
    """The logits, if there are as many as the exits have.

    Raises:
        ValueError: where the backbone's last layer was replaced by one of other classes.
    """
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"the backbone now gives {logits.shape[-1]} classes but its exits have {num_classes}; wrap it anew with "
            "cet.EarlyExit"
        )
    return logits


def first_tensor(output: Any) -> Tensor:
    """The features of an exit: the first tensor that its submodule returned."""
    for value in pytree.tree_leaves(output):
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"an exit's submodule returned {type(output).__name__} without a tensor; name another submodule")
