"""What a model returns."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # exported models answer in processes without torch
    from torch import Tensor


@dataclass(frozen=True)
class ExitOutput:
    """One answer per row of the batch, in the order of the input.

    Attributes:
        logits: ``(B, K)``, from the exit that the row took.
        exit_index: ``(B,)`` int64, that exit; ``E - 1`` is the final one.
        score: ``(B,)`` float32, the policy's score of the row at that exit.

    These are tensors; or NumPy arrays where a model that :func:`cet.load_exported` read was called with such.
    """

    logits: Tensor
    exit_index: Tensor
    score: Tensor

    @property
    def labels(self) -> Tensor:
        """``(B,)`` int64, the most likely class of each row."""
        return self.logits.argmax(1)


@runtime_checkable
class ExitAnswers(Protocol):
    """What :func:`cet.calibrate` reads: a model that can be asked for the answers of all its exits, such as one that
    :func:`cet.load_exported` has read."""

    exit_names: tuple[str, ...]

    @property
    def num_exits(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    def exit_answers(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        """Logits ``(B, K)`` and scores ``(B,)`` of all ``E`` exits."""


class LossOutput(OrderedDict[str, Any]):
    """What a call with ``labels=`` returns: ``loss``, and ``logits`` ``(B, K)``, by name, by attribute or by position,
    as the trainers of Hugging Face read it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclass(frozen=True)
class Explanation:
    """How a model answers a call.

    Attributes:
        stages: the exits that end the stages which run, the final one included; empty where the uncut backbone answers.
        dynamic_sizes: the sizes of inputs, as ``name[dimension]``, that may vary besides the batch without another cut.
        num_programs: how many programs are kept for the backbone as it is now.
        reason: why the uncut backbone answers; None where stages run.
    """

    stages: tuple[str, ...]
    dynamic_sizes: tuple[str, ...]
    num_programs: int
    reason: str | None

    def __str__(self) -> str:
        sizes = f"sizes that may vary: {', '.join(('batch', *self.dynamic_sizes))}"
        kept = f"{self.num_programs} program{'s' * (self.num_programs != 1)} kept"
        if self.reason is not None:
            return f"the uncut backbone answers, which saves nothing: {self.reason}; {kept}"
        return f"stages up to {', '.join(self.stages)}; {sizes}; {kept}"
