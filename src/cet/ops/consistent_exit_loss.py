"""The consistency objective on the logits of all exits at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.backend import is_tracing, kernels_for, no_tensor, runs_on_triton, traced_backend, triton_kernels
from cet.ops.exit_gate import DTYPES

Target = Literal["soft", "hard"]
Teacher = Literal["self", "final"]

UNLABELLED = -100

HALF_GRADIENT_SCALE = 2.0**15
"""What the kernels multiply differences of probabilities by, where they store gradients in float16.

Divided by the number of rows already, small gradients would round to zero before the loss scale of mixed-precision
training can save them.
"""


@dataclass(frozen=True)
class Switches:
    consistency_weight: float
    target: Target
    teacher: Teacher
    min_confidence: float
    exit_weights: tuple[float, ...]

    def half_factors(self, rows: int) -> tuple[list[float], list[float]]:
        """What the kernels' gradients in float16 still have to be multiplied by, per exit: those of the clean logits,
        which are divided by the number of labelled rows too, and those of the perturbed."""
        supervised = [weight / HALF_GRADIENT_SCALE for weight in self.exit_weights]
        return supervised, [weight * (self.consistency_weight / rows) for weight in supervised]


class ExitLosses(NamedTuple):
    """What :func:`consistent_exit_loss` returns; each part is a float32 tensor ``(E,)`` before any weight."""

    loss: Tensor
    supervised: Tensor
    consistency: Tensor
    confident: Tensor


def consistent_exit_loss_reference(logits: Sequence[Tensor], labels: Tensor, switches: Switches) -> ExitLosses:
    """The definition of :func:`consistent_exit_loss`; ``logits`` are the clean ones, then the perturbed."""
    clean, perturbed = logits[: len(logits) // 2], logits[len(logits) // 2 :]
    labelled = (labels != UNLABELLED).sum().clamp(min=1)
    rows = max(len(labels), 1)
    final = _teacher_log_probabilities(clean[-1])
    loss = clean[0].new_zeros((), dtype=torch.float32)
    supervised, consistency, confident = [], [], []
    for clean_k, perturbed_k, weight in zip(clean, perturbed, switches.exit_weights, strict=True):
        teacher_k = _teacher_log_probabilities(clean_k) if switches.teacher == "self" else final
        confidence, prediction = teacher_k.max(dim=1)
        mask = (confidence.exp() >= switches.min_confidence).float()
        student = F.log_softmax(perturbed_k.float(), dim=1)
        if switches.target == "soft":
            divergences = F.kl_div(student, teacher_k, reduction="none", log_target=True)
            # A class that the teacher rules out adds nothing, whatever the student's logit.
            divergence = divergences.masked_fill(teacher_k.exp() == 0.0, 0.0).sum(dim=1)
        else:
            divergence = F.nll_loss(student, prediction, reduction="none")
        s = F.cross_entropy(clean_k.float(), labels, ignore_index=UNLABELLED, reduction="sum") / labelled
        c = (mask * divergence).sum() / rows
        loss = loss + weight * (s + switches.consistency_weight * c)
        supervised.append(s.detach())
        consistency.append(c.detach())
        confident.append(mask.sum() / rows)
    return ExitLosses(loss, torch.stack(supervised), torch.stack(consistency), torch.stack(confident))


def _teacher_log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.detach().float(), dim=1)


def _losses_and_gradients_cpp(
    kernels: Any, logits: Sequence[Tensor], labels: Tensor, switches: Switches, gradients: Sequence[Tensor | None]
) -> ExitLosses:
    """The losses; the gradients of the loss are written to those ``gradients``, one per logits, that are given."""
    logits = [x if x.stride(1) == 1 else x.contiguous() for x in logits]
    exits = len(switches.exit_weights)
    rows, classes = logits[0].shape
    loss = logits[0].new_empty((), dtype=torch.float32)
    supervised, consistency, confident = (loss.new_empty((exits,)) for _ in range(3))
    labels = labels.contiguous()
    pointers = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
    kernels.consistent_exit_loss(
        [
            (x.data_ptr(), x.stride(0), gradient, y.data_ptr(), y.stride(0), gradient_y, weight)
            for x, gradient, y, gradient_y, weight in zip(
                logits[:exits], pointers[:exits], logits[exits:], pointers[exits:], switches.exit_weights, strict=True
            )
        ],
        DTYPES[logits[0].dtype],
        rows,
        classes,
        labels.data_ptr(),
        switches.consistency_weight,
        switches.min_confidence,
        switches.target == "hard",
        switches.teacher == "final",
        loss.data_ptr(),
        supervised.data_ptr(),
        consistency.data_ptr(),
        confident.data_ptr(),
        torch.get_num_threads(),
    )
    return ExitLosses(loss, supervised, consistency, confident)


def refuse_second_derivative() -> None:
    """Autograd would take the gradients for constants, where it is asked to differentiate them again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "consistent_exit_loss: the kernels' gradients have no gradient of their own; for create_graph=True compute "
            "the loss under use_backend('reference')"
        )


class _ConsistentExitLoss(torch.autograd.Function):
    """Forward computes the gradients too: both softmaxes of a row are at hand then."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, labels: Tensor, switches: Switches, *logits: Tensor) -> ExitLosses:
        # In one piece: glibc keeps one large piece when it is freed, and gives many back to the system each time.
        wanted = ctx.needs_input_grad[3:]
        pieces = iter(logits[0].new_empty((sum(wanted), *logits[0].shape)).unbind())
        gradients = [next(pieces) if want else None for want in wanted]
        losses = _losses_and_gradients_cpp(kernels, logits, labels, switches, gradients)
        ctx.factors = _half_factors(labels, switches) if logits[0].dtype is torch.float16 else [1.0] * len(logits)
        ctx.save_for_backward(*gradients)  # which lets go of them in time for a leaf to keep, rather than copy, its own
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # Mostly the loss is what backward() starts from: then there is nothing to scale. A number is not rounded to half
        # precision before it multiplies, as a tensor is: there a loss scale may be infinite.
        scale = grad.item()
        return (
            None,
            None,
            None,
            *(
                g if g is None or scale * factor == 1.0 else g * (scale * factor)
                for g, factor in zip(ctx.saved_tensors, ctx.factors, strict=True)
            ),
        )


def _half_factors(labels: Tensor, switches: Switches) -> list[float]:
    supervised, consistency = switches.half_factors(len(labels))
    labelled = max(1, int((labels != UNLABELLED).sum()))
    return [*(factor / labelled for factor in supervised), *consistency]


# The four fields of ExitLosses, then the gradients of the loss: what a custom operator can return.
@torch.library.custom_op("cet::consistent_exit_loss", mutates_args=())
def _loss_op(
    logits: list[Tensor],
    labels: Tensor,
    consistency_weight: float,
    target: str,
    teacher: str,
    min_confidence: float,
    exit_weights: list[float],
) -> list[Tensor]:
    switches = Switches(
        consistency_weight, cast(Target, target), cast(Teacher, teacher), min_confidence, tuple(exit_weights)
    )
    if runs_on_triton("consistent_exit_loss", logits, DTYPES):
        run = triton_kernels("consistent_exit_loss").losses_and_gradients
        losses, gradients, _ = run(logits, labels, switches, wanted=(True,) * len(logits))
        return [*losses, *gradients]
    kernels = kernels_for("consistent_exit_loss", logits, DTYPES)
    if kernels is None:
        raise RuntimeError(
            "cet::consistent_exit_loss was recorded for the kernels, which are not there or not chosen now; "
            "record it under use_backend('reference')"
        )
    gradients = [x.new_empty(x.shape) for x in logits]
    return [*_losses_and_gradients_cpp(kernels, logits, labels, switches, gradients), *gradients]


@_loss_op.register_fake
def _(
    logits: list[Tensor],
    labels: Tensor,
    consistency_weight: float,
    target: str,
    teacher: str,
    min_confidence: float,
    exit_weights: list[float],
) -> list[Tensor]:
    shapes: list[tuple[int, ...]] = [(), *((len(exit_weights),),) * 3]
    losses = [labels.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return [*losses, *(x.new_empty(x.shape) for x in logits)]


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, labels, *numbers = inputs
    ctx.switches = Switches(*numbers)
    ctx.save_for_backward(labels, *output[4:])


def _scale_gradients(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor] | None, ...]:
    labels, *gradients = ctx.saved_tensors
    scales = [grads[0]] * len(gradients)
    if gradients[0].dtype is torch.float16:
        supervised, consistency = ctx.switches.half_factors(len(labels))
        labelled = (labels != UNLABELLED).sum().clamp(min=1)
        scales = [*(grads[0] * factor / labelled for factor in supervised), *(grads[0] * f for f in consistency)]
    scaled = [(g.float() * scale).to(g.dtype) for g, scale in zip(gradients, scales, strict=True)]
    return scaled, None, None, None, None, None, None


_loss_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


def consistent_exit_loss(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    labels: Tensor,
    *,
    consistency_weight: float = 1.0,
    target: Target = "soft",
    teacher: Teacher = "self",
    min_confidence: float = 0.0,
    exit_weights: Sequence[float] | None = None,
) -> ExitLosses:
    """``sum_k w_k [ CE(f_k(x), y) + consistency_weight * m * D(stop-grad p(x), p_k(x~)) ]``.

    ``CE`` is averaged over the labelled rows, ``m D`` over all rows. ``p`` is the softmax of the same exit
    (``teacher="self"``) or of the last one (``"final"``) on the clean input; ``D`` is the Kullback-Leibler divergence
    from it (``target="soft"``; Xie et al. 2020, arXiv 1904.12848) or the cross-entropy with its most likely class
    (``"hard"``; Sohn et al. 2020, arXiv 2001.07685); ``m`` is 1 where the largest entry of ``p`` reaches
    ``min_confidence``, else 0. All arithmetic is in float32.

    Args:
        clean: E tensors ``(B, K)``, the logits on the clean input, shallow exit first.
        perturbed: E tensors ``(B, K)``, the logits on the perturbed input.
        labels: ``(B,)`` int64 in ``[0, K)``, or -100 for a row without a label, which adds the consistency term only.
        consistency_weight: the weight lambda of the consistency term.
        target: ``"soft"`` or ``"hard"``.
        teacher: ``"self"`` or ``"final"``.
        min_confidence: rows whose teacher is less sure than this add no consistency term.
        exit_weights: one weight ``w_k`` per exit; ``1 / E`` each when not given.

    Returns:
        The scalar loss, and per exit the supervised term, the consistency term, and the fraction of rows with
        ``m = 1``. Gradients flow from the loss alone, and to the logits alone: not through the teacher, and not twice.

    Raises:
        ValueError: for shapes or devices that do not fit, switches out of range, and for labels out of range on the
            compiled kernels; on a GPU, where looking would wait for the device, these make the loss NaN.
        TypeError: for logits of different or not floating dtypes, or labels that are not int64.
    """
    check_switches(consistency_weight, target, teacher, min_confidence, exit_weights)
    weights = (1.0 / max(1, len(clean)),) * len(clean) if exit_weights is None else tuple(exit_weights)
    logits = [*clean, *perturbed]
    _check(logits, labels, num_clean=len(clean), num_weights=len(weights))
    switches = Switches(consistency_weight, target, teacher, min_confidence, weights)
    if is_tracing():
        backend = traced_backend(logits[0].device.type)
        takes = logits[0].is_cpu if backend == "cpp" else backend == "triton"
        if takes and logits[0].dtype in DTYPES:
            losses = _loss_op(logits, labels, consistency_weight, target, teacher, min_confidence, list(weights))[:4]
            return ExitLosses(losses[0], *(part.detach() for part in losses[1:]))
        return consistent_exit_loss_reference(logits, labels, switches)
    if runs_on_triton("consistent_exit_loss", logits, DTYPES) and len(labels) > 0:
        autograd = triton_kernels("consistent_exit_loss").ConsistentExitLoss
        return ExitLosses(*autograd.apply(labels, switches, *logits))
    kernels = kernels_for("consistent_exit_loss", logits, DTYPES)
    if kernels is None or len(labels) == 0:
        return consistent_exit_loss_reference(logits, labels, switches)
    return ExitLosses(*_ConsistentExitLoss.apply(kernels, labels, switches, *logits))  # type: ignore[no-untyped-call]


def check_switches(
    consistency_weight: float,
    target: Target,
    teacher: Teacher,
    min_confidence: float,
    exit_weights: Sequence[float] | None,
) -> None:
    """Refuse switches of the loss that are out of range."""
    if not 0.0 <= consistency_weight < math.inf:
        raise ValueError(f"consistency_weight is {consistency_weight}; give a finite number >= 0")
    if target not in ("soft", "hard"):
        raise ValueError(f"target {target!r} is unknown; choose soft or hard")
    if teacher not in ("self", "final"):
        raise ValueError(f"teacher {teacher!r} is unknown; choose self or final")
    if not 0.0 <= min_confidence <= 1.0:
        raise ValueError(f"min_confidence is {min_confidence}; give a probability in [0, 1]")
    for index, weight in enumerate(exit_weights or ()):
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"exit_weights[{index}] is {weight}; give a finite number >= 0")


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
