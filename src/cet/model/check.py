"""Whether `predict` answers as the backbone does: two ways through one model, compared on one batch.

`predict` runs the stages that were cut from the backbone and the compiled exit step; `exit_logits` runs the backbone
itself, with hooks. They must not drift apart.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cet.partition.stages import evaluating
from cet.runtime.policy import ExitPolicy

if TYPE_CHECKING:
    from cet.model.early_exit import EarlyExit


def runtime_logits(model: EarlyExit, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The logits of all ``E`` exits, tensors ``(B, K)``, as `predict` computes them, with every row answered at each.

    A row whose logits at an exit give no score (NaN or +Inf among them) cannot leave there; its logits are NaN.
    """
    early = range(model.num_exits - 1)
    probe = copy.copy(model)  # it shares everything but its policy: that of the model is left alone
    logits = []
    with torch.no_grad(), evaluating(model):
        for k in (*early, None):
            # Confidence is never below 0, so that every row with a score leaves at the one open exit.
            probe.policy = ExitPolicy("confidence", tuple(0.0 if k == other else None for other in early))
            probe.training = False
            output = probe.predict(*args, **kwargs)
            here = output.exit_index == (model.num_exits - 1 if k is None else k)
            logits.append(output.logits if here.all() else output.logits.where(here[:, None], torch.nan))
    return tuple(logits)


def check_answers(model: EarlyExit, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Compare `predict` with `exit_logits` at every exit, in eval mode.

    Half of the digits of the logits' dtype must agree, relative to the largest logit of the exit: the two ways may add
    in another order, but not compute something else.

    Args:
        model: has its own modes and policy back afterwards.
        args: positional inputs of one batch.
        kwargs: keyword inputs.

    Raises:
        RuntimeError: when they differ, naming the first exit that does.
    """
    answers = runtime_logits(model, args, kwargs)
    compare_answers(model, answers, args, kwargs)


def compare_answers(
    model: EarlyExit, answers: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """As :func:`check_answers`, with what :func:`runtime_logits` gave for these inputs."""
    with torch.no_grad(), evaluating(model):
        expected = model.exit_logits(*args, **kwargs)
    for name, answer, reference in zip(model.exit_names, answers, expected, strict=True):
        eps = max(torch.finfo(answer.dtype).eps, torch.finfo(reference.dtype).eps)
        got, wanted = answer.double(), reference.double()
        # Where there is no score, predict gives no answer at this exit.
        scored = ~(wanted.isnan() | wanted.isposinf()).any(dim=1) & ~wanted.isneginf().all(dim=1)
        got, wanted = got[scored], wanted[scored]
        size = wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 0.0
        differing = ~torch.isclose(got, wanted, rtol=0.0, atol=eps**0.5 * size)
        if differing.any():
            apart = (got - wanted).abs()[differing].max().item()
            raise RuntimeError(
                f"predict and exit_logits differ at exit {name!r}, by up to {apart:.3g} where logits reach {size:.3g}: "
                "the stages no longer compute what the backbone does; wrap the backbone in EarlyExit again after "
                "changing it, and use nothing in it that differs from call to call"
            )
