"""What a sample costs: the work of each stage and of each exit head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from cet.model.early_exit import EarlyExit
from cet.partition.stages import evaluating, first_tensor, logits_of
from cet.words import counted

_backends: Any = torch.backends  # its flags are settable properties, which its annotations deny


@dataclass(frozen=True)
class ExitCosts:
    """The cost of one sample, stage by stage, in any unit that adds up: FLOPs, milliseconds, joules.

    Args:
        stage: ``E`` numbers, the backbone's cost from the exit before (or the input) to this exit; the last one
            to the backbone's output.
        head: ``E - 1`` numbers, the cost of each early exit's head, paid by every sample that comes to that exit
            while it is open.
        unit: what the numbers count, for reports.

    Raises:
        ValueError: for a cost that is negative or not finite, stages that cost nothing together, or a number of
            heads other than one less than the stages.
    """

    stage: tuple[float, ...]
    head: tuple[float, ...]
    unit: str = "FLOPs"

    def __post_init__(self) -> None:
        for name in ("stage", "head"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            for index, value in enumerate(values):
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"{name}[{index}] is {value}; give a finite cost >= 0")
        if len(self.stage) != len(self.head) + 1:
            raise ValueError(
                f"costs have {counted(len(self.stage), 'stage')} and {counted(len(self.head), 'head')}; "
                "give one stage per exit, and one head per exit but the final one"
            )
        if self.full == 0:
            raise ValueError("stage holds only zeros, so leaving early would save nothing; give the cost of each stage")

    @property
    def full(self) -> float:
        """The cost of the backbone alone, all exits closed."""
        return sum(self.stage)

    def cumulative(self, is_open: Sequence[bool] | NDArray[np.bool_]) -> NDArray[np.float64]:
        """The cost of leaving at each exit, ``(E,)``, when only the early exits ``is_open`` run their heads."""
        if len(is_open) != len(self.head):
            raise ValueError(
                f"is_open has {counted(len(is_open), 'entry', 'entries')} for {counted(len(self.head), 'early exit')}; "
                "give one per early exit"
            )
        paid_heads = np.where(is_open, self.head, 0.0)
        cost: NDArray[np.float64] = np.cumsum(self.stage) + np.cumsum(np.append(paid_heads, 0.0))
        return cost


def exit_costs(model: EarlyExit) -> ExitCosts:
    """Count the FLOPs per sample of each stage and head, in one run over ``model.example_inputs``.

    Counted are matrix products and convolutions, those inside attention and recurrent layers included, at 2 FLOPs per
    multiply-add (:class:`torch.utils.flop_counter.FlopCounterMode`). Element-wise work, normalisation, pooling and
    look-ups are not: they move memory but hardly compute. The counts hold for inputs of the example's sizes.

    Raises:
        ValueError: when the backbone has no operation that is counted.
    """
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, model.example_inputs)
    features: dict[int, Tensor] = {}
    behind: list[int] = []
    with torch.no_grad(), evaluating(model), _unfused_kernels(), FlopCounterMode(display=False) as counter:

        def mark(k: int, module_output: Any) -> None:
            behind.append(counter.get_total_flops())
            features[k] = first_tensor(module_output).clone()

        logits = logits_of(model.observe(args, kwargs, mark))
        behind.append(counter.get_total_flops())
        for k, head in enumerate(model.heads):
            head(features[k])
            behind.append(counter.get_total_flops())
    rows, num_exits = logits.shape[0], model.num_exits
    stages = np.diff([0, *behind[:num_exits]]) / rows
    heads = np.diff(behind[num_exits - 1 :]) / rows
    if stages.sum() == 0:
        raise ValueError(
            "the backbone has no matrix product or convolution to count FLOPs of; "
            "pass costs=cet.ExitCosts(stage=..., head=...) with costs that you measured"
        )
    return ExitCosts(stage=tuple(stages), head=tuple(heads))


@contextmanager
def _unfused_kernels() -> Iterator[None]:
    """Run recurrent layers and attention as the matrix products that they are made of.

    FlopCounterMode has no formula for their fused kernels on the CPU, nor for cuDNN's recurrent layers, and would
    count them as nothing.
    """
    before = (_backends.mkldnn.enabled, _backends.cudnn.enabled, _backends.mha.get_fastpath_enabled())
    _switch_kernels(False, False, False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _switch_kernels(*before)


def _switch_kernels(mkldnn: bool, cudnn: bool, mha_fastpath: bool) -> None:
    _backends.mkldnn.enabled = mkldnn
    _backends.cudnn.enabled = cudnn
    _backends.mha.set_fastpath_enabled(mha_fastpath)
