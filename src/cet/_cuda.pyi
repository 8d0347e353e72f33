"""The CUDA part of cet on raw pointers to device memory; csrc/cuda/bindings.cpp."""

from collections.abc import Sequence
from typing import final

runtime_version: int
has_switch: bool

# source, target, strides of a row there and bytes of a row, whether the rows that leave move, or the kept ones
_Move = tuple[int, int, int, int, int, bool]

def driver_version() -> int: ...
def gather_and_scatter_rows(
    device: int,
    stream: int,
    moves: Sequence[_Move],
    order: int,
    positions: int,
    num_kept: int,
    count: int,
    rows: int,
) -> None: ...

@final
class SwitchGraph:
    """Where ``has_switch`` is true."""

    def __init__(
        self, device: int, graphs: Sequence[Sequence[int]], buckets: Sequence[Sequence[int]], counts: int
    ) -> None: ...
    def launch(self, stream: int) -> None: ...
