"""The CUDA part of cet on raw pointers to device memory; csrc/cuda/bindings.cpp."""

from collections.abc import Sequence
from typing import final

runtime_version: int
has_switch: bool

def driver_version() -> int: ...

@final
class SwitchGraph:
    """Where ``has_switch`` is true."""

    def __init__(
        self, device: int, graphs: Sequence[Sequence[int]], buckets: Sequence[Sequence[int]], counts: int
    ) -> None: ...
    def launch(self, stream: int) -> None: ...
