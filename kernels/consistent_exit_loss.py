"""The loss of all exits and its gradient, in one pass over the clean and the perturbed logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cet.kernels import alignment, block_size, on_device_of
from cet.ops.consistent_exit_loss import (
    HALF_GRADIENT_SCALE,
    UNLABELLED,
    ExitLosses,
    Switches,
    refuse_second_derivative,
)

_CLASS_BLOCK = 4096  # logits of a row that stay in registers; of more, all are read twice
_TILE = 256  # logits of a program, where a row has fewer
_BLOCK = 1024
_SUM_BLOCK = 256

_UNLABELLED = tl.constexpr(UNLABELLED)
_HALF_GRADIENT_SCALE = tl.constexpr(HALF_GRADIENT_SCALE)


@triton.jit
def pick(values, index, COUNT: tl.constexpr):
    """``values[index]``, of a tuple."""
    picked = values[0]
    for i in tl.static_range(1, COUNT):
        picked = tl.where(index == i, values[i], picked)
    return picked


@triton.jit(do_not_specialize=["rows"])
def count_labelled_kernel(labels_ptr, work_ptr, rows, BLOCK: tl.constexpr):
    """Writes how many rows have a label, and the zero from which :func:`consistent_exit_loss_kernel` counts tickets."""
    b_count = tl.zeros([BLOCK], tl.int32)
    for i_row in range(0, rows, BLOCK):
        o_row = i_row + tl.arange(0, BLOCK)
        b_label = tl.load(labels_ptr + o_row, mask=o_row < rows, other=_UNLABELLED)
        b_count += (b_label != _UNLABELLED).to(tl.int32)
    tl.store(work_ptr, tl.sum(b_count, axis=0))
    tl.store(work_ptr + 1, 0)


@triton.jit
def load_logits(logits_ptr, s_row, o_row, m_row, o_class, CLASSES: tl.constexpr, ALIGN: tl.constexpr):
    """As float32, with -Inf in excess columns."""
    o_logit = o_row[:, None] * (s_row // ALIGN * ALIGN) + o_class[None, :]
    mask = m_row[:, None] & (o_class < CLASSES)[None, :]
    return tl.load(logits_ptr + o_logit, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def softmax_of_block(b_logits):
    """Of each row the largest logit, its class (the first such), and the sum of exponentials relative to it."""
    b_max = tl.max(b_logits, axis=1)
    b_offset = tl.where(b_max == float("-inf"), 0.0, b_max)
    return b_max, tl.argmax(b_logits, axis=1), tl.sum(tl.exp(b_logits - b_offset[:, None]), axis=1)


@triton.jit
def softmax_of_rows(
    logits_ptr,
    s_row,
    o_row,
    m_row,
    CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """:func:`softmax_of_block` of all blocks of a row together (Milakov and Gimelshein 2018, arXiv 1805.02867)."""
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_argmax = tl.zeros([ROWS], tl.int32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for i_class in range(0, CLASSES, BLOCK_K):
        o_class = i_class + tl.arange(0, BLOCK_K)
        b_max2, b_argmax2, b_sum2 = softmax_of_block(
            load_logits(logits_ptr, s_row, o_row, m_row, o_class, CLASSES, ALIGN)
        )
        b_argmax = tl.where(b_max2 > b_max, i_class + b_argmax2, b_argmax)
        b_top = tl.maximum(b_max, b_max2)
        b_offset = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_sum = b_sum * tl.exp(b_max - b_offset) + b_sum2 * tl.exp(b_max2 - b_offset)
        b_max = b_top
    return b_max, b_argmax, b_sum


@triton.jit
def log_normalizer(softmax):
    """What is subtracted from logits for log-probabilities."""
    return (softmax[0] + tl.log(softmax[2]))[:, None]


@triton.jit
def store_gradient(grad_ptr, o_grad, b_difference, b_factor, scale, mask):
    """Differences of probabilities ``(ROWS, K)`` times a factor per row and a scale: in float16, where small gradients
    would be lost, always the same one, and :func:`scale_kernel` does the rest."""
    if grad_ptr.dtype.element_ty == tl.float16:
        scale = _HALF_GRADIENT_SCALE
    b_grad = b_difference * (b_factor * scale)[:, None]
    tl.store(grad_ptr + o_grad, b_grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_of_blocks(partials_ptr, blocks, BLOCK: tl.constexpr):
    """In an order that depends on their number alone."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_block in range(0, blocks, BLOCK):
        o_block = i_block + tl.arange(0, BLOCK)
        b_sum += tl.load(partials_ptr + o_block, mask=o_block < blocks, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit(do_not_specialize=["rows"])
def consistent_exit_loss_kernel(
    clean_ptrs,
    perturbed_ptrs,
    clean_grad_ptrs,
    perturbed_grad_ptrs,
    clean_strides,
    perturbed_strides,
    weights,
    labels_ptr,
    loss_ptr,
    supervised_ptr,
    consistency_ptr,
    confident_ptr,
    partials_ptr,
    work_ptr,
    rows,
    consistency_weight,
    min_confidence,
    EXITS: tl.constexpr,
    CLASSES: tl.constexpr,
    HARD: tl.constexpr,
    FINAL_TEACHER: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """One exit of ``ROWS`` rows; the exits of the same rows run side by side, and share the final one in the cache.

    The program that comes last adds up what all have written; :func:`cet.kernels.exit_gate.finish` says why it sees it.
    """
    i_exit = tl.program_id(0) % EXITS
    i_block = tl.program_id(0) // EXITS
    blocks = tl.num_programs(0) // EXITS
    o_row = i_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    clean_ptr = pick(clean_ptrs, i_exit, EXITS)
    student_ptr = pick(perturbed_ptrs, i_exit, EXITS)
    s_clean = pick(clean_strides, i_exit, EXITS)
    s_student = pick(perturbed_strides, i_exit, EXITS)
    teacher_ptr = clean_ptrs[EXITS - 1] if FINAL_TEACHER else clean_ptr
    s_teacher = clean_strides[EXITS - 1] if FINAL_TEACHER else s_clean

    if CLASSES <= BLOCK_K:
        o_class = tl.arange(0, BLOCK_K)
        b_clean = load_logits(clean_ptr, s_clean, o_row, m_row, o_class, CLASSES, ALIGN)
        b_student = load_logits(student_ptr, s_student, o_row, m_row, o_class, CLASSES, ALIGN)
        b_teacher = b_clean
        if FINAL_TEACHER:
            b_teacher = load_logits(teacher_ptr, s_teacher, o_row, m_row, o_class, CLASSES, ALIGN)
        clean = softmax_of_block(b_clean)
        student = softmax_of_block(b_student)
        teacher = softmax_of_block(b_teacher)
    else:
        clean = softmax_of_rows(clean_ptr, s_clean, o_row, m_row, CLASSES, ALIGN, ROWS, BLOCK_K)
        student = softmax_of_rows(student_ptr, s_student, o_row, m_row, CLASSES, ALIGN, ROWS, BLOCK_K)
        teacher = clean
        if FINAL_TEACHER:
            teacher = softmax_of_rows(teacher_ptr, s_teacher, o_row, m_row, CLASSES, ALIGN, ROWS, BLOCK_K)

    weight = pick(weights, i_exit, EXITS)
    labelled = tl.maximum(tl.load(work_ptr), 1).to(tl.float32)
    b_label = tl.load(labels_ptr + o_row, mask=m_row, other=_UNLABELLED)
    # A label out of range: NaN instead of an access out of bounds.
    b_one = tl.where((b_label >= 0) & (b_label < CLASSES), 1.0, float("nan"))
    # The largest probability is 1 / sum; the sum is at least 1 unless the logits are NaN, or all infinite.
    b_confident = (m_row & (min_confidence * teacher[2] <= 1.0) & (teacher[2] >= 1.0)).to(tl.float32)
    b_label_logit = tl.zeros([ROWS], tl.float32)
    b_divergence = tl.zeros([ROWS], tl.float32)
    for i_class in range(0, CLASSES, BLOCK_K):
        o_class = i_class + tl.arange(0, BLOCK_K)
        if CLASSES > BLOCK_K:
            b_clean = load_logits(clean_ptr, s_clean, o_row, m_row, o_class, CLASSES, ALIGN)
            b_student = load_logits(student_ptr, s_student, o_row, m_row, o_class, CLASSES, ALIGN)
            b_teacher = b_clean
            if FINAL_TEACHER:
                b_teacher = load_logits(teacher_ptr, s_teacher, o_row, m_row, o_class, CLASSES, ALIGN)
        m_class = (o_class < CLASSES)[None, :]
        b_is_label = o_class[None, :] == b_label[:, None]
        b_label_logit += tl.sum(tl.where(b_is_label, b_clean, 0.0), axis=1)
        if HARD:
            b_is_target = o_class[None, :] == teacher[1][:, None]
            b_divergence += tl.sum(tl.where(b_is_target, log_normalizer(student) - b_student, 0.0), axis=1)
            b_target = b_is_target.to(tl.float32)
        else:
            b_target = tl.exp(b_teacher - teacher[0][:, None]) / teacher[2][:, None]
            b_log_ratio = (b_teacher - log_normalizer(teacher)) - (b_student - log_normalizer(student))
            # A class that the teacher rules out adds nothing, whatever the student's logit.
            b_divergence += tl.sum(tl.where(m_class & (b_target != 0.0), b_target * b_log_ratio, 0.0), axis=1)

        mask = m_row[:, None] & m_class
        o_grad = o_row[:, None] * CLASSES + o_class[None, :]
        if perturbed_grad_ptrs is not None:
            b_share = tl.exp(b_student - student[0][:, None]) / student[2][:, None]
            grad_ptr = pick(perturbed_grad_ptrs, i_exit, EXITS)
            scale = weight * consistency_weight / rows
            store_gradient(grad_ptr, o_grad, b_share - b_target, b_confident, scale, mask)
        if clean_grad_ptrs is not None:
            b_share = tl.exp(b_clean - clean[0][:, None]) / clean[2][:, None]
            b_difference = tl.where((b_label == _UNLABELLED)[:, None], 0.0, b_share - b_is_label.to(tl.float32))
            b_factor = tl.where(b_label == _UNLABELLED, 1.0, b_one)
            grad_ptr = pick(clean_grad_ptrs, i_exit, EXITS)
            store_gradient(grad_ptr, o_grad, b_difference, b_factor, weight / labelled, mask)

    b_supervised = b_one * (clean[0] + tl.log(clean[2]) - b_label_logit)
    b_supervised = tl.where(b_label == _UNLABELLED, 0.0, b_supervised)
    b_consistency = tl.where(m_row, b_confident * b_divergence, 0.0)
    partial_ptr = partials_ptr + i_exit * blocks + i_block
    tl.store(partial_ptr, tl.sum(b_supervised, axis=0))
    tl.store(partial_ptr + EXITS * blocks, tl.sum(b_consistency, axis=0))
    tl.store(partial_ptr + 2 * EXITS * blocks, tl.sum(b_confident, axis=0))

    tl.debug_barrier()
    if tl.atomic_add(work_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        loss = tl.zeros([], tl.float32)
        for i in tl.static_range(EXITS):
            partial_ptr = partials_ptr + i * blocks
            supervised = sum_of_blocks(partial_ptr, blocks, BLOCK_SUM) / labelled
            consistency = sum_of_blocks(partial_ptr + EXITS * blocks, blocks, BLOCK_SUM) / rows
            tl.store(supervised_ptr + i, supervised)
            tl.store(consistency_ptr + i, consistency)
            tl.store(confident_ptr + i, sum_of_blocks(partial_ptr + 2 * EXITS * blocks, blocks, BLOCK_SUM) / rows)
            loss += weights[i] * (supervised + consistency_weight * consistency)
        tl.store(loss_ptr, loss)


@triton.jit
def scale_kernel(
    gradient_ptrs, factors, scale_ptr, labelled_ptr, size, CLEAN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """Multiplies gradients in place, of which the first ``CLEAN`` are those of clean logits.

    Mostly the scale is 1, and nothing is read or written. In float16 each gradient has a factor too, and those of the
    clean logits are divided by the number of labelled rows.
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    i_gradient = tl.program_id(0) % COUNT
    if factors is not None:
        scale *= pick(factors, i_gradient, COUNT)
        if i_gradient < CLEAN:
            scale /= tl.maximum(tl.load(labelled_ptr), 1).to(tl.float32)
    if scale != 1.0:
        gradient_ptr = pick(gradient_ptrs, i_gradient, COUNT)
        o_entry = (tl.program_id(0) // COUNT).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_gradient = tl.load(gradient_ptr + o_entry, mask=o_entry < size).to(tl.float32) * scale
        tl.store(gradient_ptr + o_entry, b_gradient.to(gradient_ptr.dtype.element_ty), mask=o_entry < size)


Gradients = tuple[list[Tensor] | None, list[Tensor] | None]


def consistent_exit_loss_into(
    logits: Sequence[Tensor],
    labels: Tensor,
    switches: Switches,
    losses: ExitLosses,
    gradients: Gradients,
    work: Tensor,
) -> None:
    """``gradients`` are those of the clean and of the perturbed logits, contiguous; None where they are not wanted. Of
    ``work``, ``(2,)`` int32, the first entry becomes the number of labelled rows."""
    logits = [x if x.stride(1) == 1 else x.contiguous() for x in logits]
    exits, (rows, classes) = len(logits) // 2, logits[0].shape
    block_k = block_size(classes, _CLASS_BLOCK if classes <= _CLASS_BLOCK else _CLASS_BLOCK // 2)
    row_block = max(1, _TILE // block_k)
    blocks = triton.cdiv(rows, row_block)
    clean, perturbed = tuple(logits[:exits]), tuple(logits[exits:])
    clean_grad, perturbed_grad = (None if group is None else tuple(group) for group in gradients)
    strides = [x.stride(0) for x in logits]
    partials = losses.loss.new_empty(3, exits, blocks)
    labels = labels.contiguous()
    with on_device_of(labels):
        count_labelled_kernel[(1,)](labels, work, rows, BLOCK=_BLOCK)
        consistent_exit_loss_kernel[(blocks * exits,)](
            clean,
            perturbed,
            clean_grad,
            perturbed_grad,
            tuple(strides[:exits]),
            tuple(strides[exits:]),
            tuple(map(float, switches.exit_weights)),
            labels,
            *losses,
            partials,
            work,
            rows,
            float(switches.consistency_weight),
            float(switches.min_confidence),
            EXITS=exits,
            CLASSES=classes,
            HARD=switches.target == "hard",
            FINAL_TEACHER=switches.teacher == "final",
            ALIGN=alignment(logits[0].element_size(), *strides),
            ROWS=row_block,
            BLOCK_K=block_k,
            BLOCK_SUM=_SUM_BLOCK,
            num_warps=4 if classes <= 2048 else 8 if classes <= _CLASS_BLOCK else 16,
        )


def losses_and_gradients(
    logits: Sequence[Tensor], labels: Tensor, switches: Switches, wanted: Sequence[bool]
) -> tuple[ExitLosses, list[Tensor | None], Tensor]:
    """The losses; the gradients of the loss, of the clean logits where any is wanted, and so of the perturbed, not yet
    scaled in float16; the number of labelled rows, the first entry of an int32 tensor."""
    exits = len(switches.exit_weights)
    loss = logits[0].new_empty((), dtype=torch.float32)
    losses = ExitLosses(loss, *(loss.new_empty(exits) for _ in range(3)))
    if len(labels) == 0:  # nothing to launch
        losses = ExitLosses(*(loss.zero_() for loss in losses))
    clean, perturbed = (
        [x.new_empty(x.shape) for x in logits[group]] if any(wanted[group]) else None
        for group in (slice(exits), slice(exits, None))
    )
    work = labels.new_empty(2, dtype=torch.int32)
    consistent_exit_loss_into(logits, labels, switches, losses, (clean, perturbed), work)
    return losses, [*(clean or [None] * exits), *(perturbed or [None] * exits)], work


def scale_into(gradients: Sequence[Tensor | None], scale: Tensor, switches: Switches, labelled: Tensor) -> None:
    """Make gradients of the loss those of ``scale`` times the loss, in place."""
    exits = len(gradients) // 2
    given = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
    size, factors = given[0][1].numel(), None
    if given[0][1].dtype is torch.float16:
        supervised, consistency = switches.half_factors(len(given[0][1]))
        factors = tuple(([*supervised, *consistency])[i] for i, _ in given)
    with on_device_of(scale):
        scale_kernel[(triton.cdiv(size, _BLOCK) * len(given),)](
            tuple(gradient for _, gradient in given),
            factors,
            scale,
            labelled,
            size,
            CLEAN=sum(i < exits for i, _ in given),
            COUNT=len(given),
            BLOCK=_BLOCK,
        )


class ConsistentExitLoss(torch.autograd.Function):
    """Forward computes the gradients too: both softmaxes of a row are at hand then."""

    @staticmethod
    def forward(ctx: Any, labels: Tensor, switches: Switches, *logits: Tensor) -> ExitLosses:
        ctx.wanted, ctx.switches = ctx.needs_input_grad[2:], switches
        losses, ctx.gradients, labelled = losses_and_gradients(logits, labels, switches, ctx.wanted)
        ctx.save_for_backward(labels, labelled, *logits)
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # Whoever takes the gradients owns them, so they can be scaled in place. A second call, on a graph that was
        # retained, computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        labels, labelled, *logits = ctx.saved_tensors
        if gradients is None:
            _, gradients, _ = losses_and_gradients(logits, labels, ctx.switches, ctx.wanted)
        scale_into(gradients, grad, ctx.switches, labelled)
        return None, None, *(g if want else None for g, want in zip(gradients, ctx.wanted, strict=True))
