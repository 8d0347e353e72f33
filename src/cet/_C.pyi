"""The CPU kernels of cet.ops on raw pointers; csrc/bindings.cpp. Arguments are passed by position, which is fastest.

A pointer is ``Tensor.data_ptr()``, 0 for what is left out. Shapes and strides are those of the tensors, in elements.
"""

from collections.abc import Sequence
from typing import Any, final

UNLABELLED: int
HALF_GRADIENT_SCALE: float

# source, target, bytes per element, shape of the target, strides of source and target, dimension of the rows
_RowTensor = tuple[int, int, int, Sequence[int], Sequence[int], Sequence[int], int]
# clean logits, their row stride and gradient; those of the perturbed; weight of the exit
_ExitLogits = tuple[int, int, int, int, int, int, float]

def capabilities() -> list[str]: ...
def kernels(capability: str) -> Kernels: ...
def scores() -> list[str]: ...

@final
class Watch:
    """Notices changes of dictionaries, lists, classes, functions and tensors."""

    def __init__(self, entries: list[Any], objects: list[Any], tensors: list[Any], property: Any) -> None: ...
    def unchanged(self) -> bool: ...

@final
class Kernels:
    @property
    def capability(self) -> str: ...
    def gate(
        self,
        logits: int,
        dtype: int,
        shape: Sequence[int],
        strides: Sequence[int],
        score: int,
        threshold: float,
        temperature: float,
        scores: int,
        exit_mask: int,
        threads: int,
    ) -> None: ...
    def exit_gate(
        self,
        features: int,
        dtype: int,
        shape: Sequence[int],
        strides: Sequence[int],
        channels_last: bool,
        mean: bool,
        weight: int,
        bias: int,
        classes: int,
        logits: int,
        score: int,
        threshold: float,
        temperature: float,
        scores: int,
        exit_mask: int,
        order: int,
        kept_rows: int,
        capacity: int,
        threads: int,
    ) -> int: ...
    def pool(
        self,
        features: int,
        dtype: int,
        shape: Sequence[int],
        strides: Sequence[int],
        channels_last: bool,
        mean: bool,
        pooled: int,
        threads: int,
    ) -> None: ...
    def order_rows(self, exit_mask: int, rows: int, order: int) -> int: ...
    def gather_rows(self, tensors: Sequence[_RowTensor], index: int, threads: int) -> None: ...
    def scatter_rows(
        self,
        rows: int,
        num_rows: int,
        output: int,
        output_rows: int,
        row_bytes: int,
        index: int,
        count: int,
        positions: int,
    ) -> None: ...
    def consistent_exit_loss(
        self,
        exits: Sequence[_ExitLogits],
        dtype: int,
        rows: int,
        classes: int,
        labels: int,
        consistency_weight: float,
        supervise_perturbed: float,
        min_confidence: float,
        hard_target: bool,
        teacher: str,
        loss: int,
        supervised: int,
        consistency: int,
        confident: int,
        supervised_perturbed: int,
        threads: int,
    ) -> None: ...
