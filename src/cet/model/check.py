"""Compares what :meth:`cet.EarlyExit.predict` runs with the backbone itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cet.partition.verify import coarsest_dtype, is_close

if TYPE_CHECKING:
    from cet.model.early_exit import EarlyExit


class AnswerMismatchError(RuntimeError):
    """The stages of a model answer otherwise than its backbone."""


@torch.no_grad()
def check_answers(model: EarlyExit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare the logits of every exit by the stages with those by the backbone, for at least one row.

    Raises:
        AnswerMismatchError: naming the first exit that differs by more than rounding.
    """
    by_stages = model.exit_answers(*args, **kwargs)
    by_backbone = model.exit_logits(*args, **kwargs)
    dtype = coarsest_dtype(model)
    for name, (logits, _), expected in zip(model.exit_names, by_stages, by_backbone, strict=True):
        if not is_close(logits, expected, dtype):
            again = model.exit_logits(*args, **kwargs)[model.exit_names.index(name)]
            if not is_close(again, expected, dtype):
                raise AnswerMismatchError(
                    f"exit {name!r} answers otherwise each time, as a submodule in train mode does, such as dropout; "
                    "call model.eval()"
                )
            difference = float((logits.float() - expected.float()).abs().max())
            raise AnswerMismatchError(
                f"the stages answer otherwise than the backbone at exit {name!r}, by up to {difference:.3g}; something "
                "that cet.partition.fingerprint does not follow has changed: make a new cet.EarlyExit"
            )
