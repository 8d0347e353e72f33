"""The consistency objective on the logits of all exits at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any, get_args

import torch
from torch import Tensor

from cet.data.batches import UNLABELLED
from cet.ops.backend import is_tracing, no_tensor, traced_backend
from cet.ops.consistent_exit_loss import cpp, triton
from cet.ops.consistent_exit_loss.definition import (
    ExitLosses,
    LossConfig,
    Target,
    Teacher,
    loss_definition,
)
from cet.ops.exit_gate.definition import DTYPES
from cet.ops.registration import Choice, Operation, explained_by

__all__ = ["UNLABELLED", "ExitLosses", "LossConfig", "Target", "Teacher", "consistent_exit_loss"]

NUM_LOSSES = len(ExitLosses._fields)

LOSS = Operation(
    "consistent_exit_loss",
    definition=loss_definition,
    kernels={"cpp": cpp.consistent_exit_loss, "triton": triton.consistent_exit_loss},
    dtypes=DTYPES,
)


def _choose(logits: Sequence[Tensor], labels: Tensor) -> Choice:
    choice = LOSS.dispatch(logits)
    if len(labels) == 0 and choice.backend != "reference":
        return Choice("consistent_exit_loss", "reference", "definition").but("definition", "there are no rows")
    return choice


def _run_recorded(logits: list[Tensor], labels: Tensor, *numbers: Any) -> list[Tensor]:
    """The fields of ExitLosses, then the gradients of the loss, not yet scaled in float16."""
    config = LossConfig(*numbers)
    choice = LOSS.dispatch(logits)
    if choice.backend == "reference":
        raise RuntimeError(
            "cet::consistent_exit_loss was recorded for the kernels, which cannot run it now; record it under "
            f"use_backend('reference'): {choice}"
        )
    if choice.backend == "triton":
        losses, gradients, _ = triton.losses_and_gradients(logits, labels, config, wanted=(True,) * len(logits))
        return [*losses, *(g for g in gradients if g is not None)]
    room = [x.new_empty(x.shape) for x in logits]
    return [*cpp.losses_and_gradients(logits, labels, config, room), *room]


def _fake(logits: list[Tensor], labels: Tensor, *numbers: Any) -> list[Tensor]:
    shapes: list[tuple[int, ...]] = [(), *((len(logits) // 2,),) * 4]
    losses = [labels.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return [*losses, *(x.new_empty(x.shape) for x in logits)]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, labels, *numbers = inputs
    ctx.config = LossConfig(*numbers)
    ctx.save_for_backward(labels, *output[NUM_LOSSES:])


def _scale_gradients(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor] | None, ...]:
    labels, *gradients = ctx.saved_tensors
    scales = [grads[0]] * len(gradients)
    if gradients[0].dtype is torch.float16:
        labelled = (labels != UNLABELLED).sum().clamp(min=1)
        factors = ctx.config.half_factors(len(labels))
        scales = [grads[0] * (shared + supervised / labelled) for shared, supervised in factors]
    scaled = [(g.float() * scale).to(g.dtype) for g, scale in zip(gradients, scales, strict=True)]
    return scaled, *(None,) * (1 + len(fields(LossConfig)))


LOSS.record_as(
    "(Tensor[] logits, Tensor labels, float consistency_weight, float supervise_perturbed, str target, str teacher, "
    "float min_confidence, float[] exit_weights) -> Tensor[]",
    run=_run_recorded,
    fake=_fake,
    setup_context=_save_gradients,
    backward=_scale_gradients,
)


def _explain(clean: Sequence[Tensor], perturbed: Sequence[Tensor], labels: Tensor, **options: Any) -> Choice:
    _, logits = _checked(clean, perturbed, labels, **options)
    return _choose(logits, labels)


@explained_by(_explain)
def consistent_exit_loss(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    labels: Tensor,
    *,
    consistency_weight: float = 1.0,
    supervise_perturbed: float = 1.0,
    target: Target = "soft",
    teacher: Teacher = "mean",
    min_confidence: float = 0.0,
    exit_weights: Sequence[float] | None = None,
) -> ExitLosses:
    """``sum_k w_k [ CE(f_k(x), y) + a CE(f_k(x~), y) + consistency_weight * m * D(stop-grad p, p_k(x~)) ]``.

    ``a`` is ``supervise_perturbed``. ``CE`` is averaged over the labelled rows, ``m D`` over all rows. ``p`` is the
    teacher, on the clean input: the mean of the softmaxes of all exits (``teacher="mean"``; Lee & Lee 2021, arXiv
    2104.00299), that of the same exit (``"self"``) or that of the last one (``"final"``). ``D`` is the Kullback-Leibler
    divergence from it (``target="soft"``; Xie et al. 2020, arXiv 1904.12848) or the cross-entropy with its most likely
    class (``"hard"``; Sohn et al. 2020, arXiv 2001.07685); ``m`` is 1 where the largest entry of ``p`` reaches
    ``min_confidence``, else 0. All arithmetic is in float32. A term of weight 0 adds nothing, even an infinite one,
    and the kernels give the clean logits of a row without a label a gradient of 0, even where they are not finite.

    Args:
        clean: E tensors ``(B, K)``, the logits on the clean input, shallow exit first.
        perturbed: E tensors ``(B, K)``, the logits on the perturbed input.
        labels: ``(B,)`` int64 in ``[0, K)``, or -100 for a row without a label, which adds the consistency term only.
        consistency_weight: the weight of the consistency term.
        supervise_perturbed: the weight of the supervised term on the perturbed input.
        target: ``"soft"`` or ``"hard"``.
        teacher: ``"mean"``, ``"self"`` or ``"final"``.
        min_confidence: rows whose teacher is less sure than this add no consistency term.
        exit_weights: one weight ``w_k`` per exit; ``1 / E`` each when not given.

    Returns:
        The scalar loss, and per exit the supervised term, the consistency term, the fraction of rows with ``m = 1``,
        and the supervised term on the perturbed input, each before any weight. Gradients flow from the loss alone, and
        to the logits alone: not through the teacher, and not twice.

    Raises:
        ValueError: for shapes or devices that do not fit, numbers out of range, and for labels out of range on the
            compiled kernels; on a GPU, where looking would wait for the device, these make the loss NaN.
        TypeError: for logits of different or not floating dtypes, or labels that are not int64.
    """
    config, logits = _checked(
        clean, perturbed, labels, consistency_weight, supervise_perturbed, target, teacher, min_confidence, exit_weights
    )
    if not is_tracing():
        losses: ExitLosses = LOSS.run[_choose(logits, labels).backend](logits, labels, config)
        return losses
    backend = traced_backend(logits[0].device.type)
    takes = logits[0].is_cpu if backend == "cpp" else backend == "triton"
    if not (takes and logits[0].dtype in DTYPES):
        return loss_definition(logits, labels, config)
    *numbers, weights = astuple(config)
    recorded = LOSS.recorded(logits, labels, *numbers, list(weights))[:NUM_LOSSES]
    return ExitLosses(recorded[0], *(part.detach() for part in recorded[1:]))


def _checked(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    labels: Tensor,
    consistency_weight: float,
    supervise_perturbed: float,
    target: Target,
    teacher: Teacher,
    min_confidence: float,
    exit_weights: Sequence[float] | None,
) -> tuple[LossConfig, list[Tensor]]:
    check_loss_config(consistency_weight, supervise_perturbed, target, teacher, min_confidence, exit_weights)
    weights = (1.0 / max(1, len(clean)),) * len(clean) if exit_weights is None else tuple(exit_weights)
    logits = [*clean, *perturbed]
    _check(logits, labels, num_clean=len(clean), num_weights=len(weights))
    return LossConfig(consistency_weight, supervise_perturbed, target, teacher, min_confidence, weights), logits


def check_loss_config(
    consistency_weight: float,
    supervise_perturbed: float,
    target: Target,
    teacher: str,
    min_confidence: float,
    exit_weights: Sequence[float] | None,
    teachers: Sequence[str] = get_args(Teacher),
) -> None:
    """Refuse a configuration of the loss with values that are out of range."""
    for name, weight in (("consistency_weight", consistency_weight), ("supervise_perturbed", supervise_perturbed)):
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight}; give a finite number >= 0")
    if target not in ("soft", "hard"):
        raise ValueError(f"target {target!r} is unknown; choose soft or hard")
    if teacher not in teachers:
        raise ValueError(f"teacher {teacher!r} is unknown; choose {', '.join(teachers[:-1])} or {teachers[-1]}")
    if not 0.0 <= min_confidence <= 1.0:
        raise ValueError(f"min_confidence is {min_confidence}; give a probability in [0, 1]")
    for index, weight in enumerate(exit_weights or ()):
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"exit_weights[{index}] is {weight}; give a finite number >= 0")
    if exit_weights and not any(exit_weights):
        raise ValueError("exit_weights are all 0, so no exit would learn; give at least one above 0")


def _check(logits: Sequence[Tensor], labels: Tensor, num_clean: int, num_weights: int) -> None:
    if num_clean == 0 or len(logits) != 2 * num_clean:
        raise ValueError(
            f"consistent_exit_loss: {num_clean} clean and {len(logits) - num_clean} perturbed logits; "
            "give one of each per exit, and at least one exit"
        )
    if num_weights != num_clean:
        raise ValueError(f"consistent_exit_loss: {num_weights} exit_weights for {num_clean} exits; give one per exit")
    for x in (*logits, labels):
        if not isinstance(x, Tensor):
            raise no_tensor("consistent_exit_loss", "labels" if x is labels else "one of the logits", x)
    first = logits[0]
    if first.ndim != 2 or first.shape[1] < 2:
        raise ValueError(f"consistent_exit_loss: logits have shape {tuple(first.shape)}; give (B, K) with K >= 2")
    if not first.is_floating_point():
        raise TypeError(f"consistent_exit_loss: logits are {first.dtype}; give a floating dtype")
    for x in logits:
        if x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"consistent_exit_loss: logits are {tuple(first.shape)} {first.dtype} on {first.device} at one exit, "
                f"{tuple(x.shape)} {x.dtype} on {x.device} at another; give the same shape, dtype and device at all"
            )
    if labels.dtype != torch.int64:
        raise TypeError(f"consistent_exit_loss: labels are {labels.dtype}; give class indices as int64")
    if labels.shape != first.shape[:1] or labels.device != first.device:
        raise ValueError(
            f"consistent_exit_loss: labels are {tuple(labels.shape)} on {labels.device}; "
            f"give ({first.shape[0]},), on {first.device}"
        )
