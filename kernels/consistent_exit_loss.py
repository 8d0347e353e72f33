"""The loss of all exits and its gradient, in one pass over the clean and the perturbed logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cet.kernels.launch import alignment, block_size, on_device_of

_CLASS_BLOCK = 4096  # logits of a row that stay in registers; of more, all are read twice
_TILE = 256  # logits of a program, where a row has fewer
_BLOCK = 1024
_SUM_BLOCK = 256

# Those of cet.ops.consistent_exit_loss.definition.
_UNLABELLED = tl.constexpr(-100)
_HALF_GRADIENT_SCALE = tl.constexpr(2.0**15)


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
def mean_probability(
    clean, normalizers, o_row, m_row, o_class, EXITS: tl.constexpr, CLASSES: tl.constexpr, ALIGN: tl.constexpr
):
    """Of the exits' softmaxes on the clean input, ``(ROWS, BLOCK_K)``."""
    b_sum = tl.exp(load_logits(clean.ptrs[0], clean.strides[0], o_row, m_row, o_class, CLASSES, ALIGN) - normalizers[0])
    for i in tl.static_range(1, EXITS):
        b_logits = load_logits(clean.ptrs[i], clean.strides[i], o_row, m_row, o_class, CLASSES, ALIGN)
        b_sum += tl.exp(b_logits - normalizers[i])
    return b_sum / EXITS


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
    clean,
    perturbed,
    labels_ptr,
    losses,
    config,
    partials_ptr,
    work_ptr,
    rows,
    EXITS: tl.constexpr,
    CLASSES: tl.constexpr,
    HARD: tl.constexpr,
    FINAL_TEACHER: tl.constexpr,
    MEAN_TEACHER: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """One exit of ``ROWS`` rows; the exits of the same rows run side by side, and share the final one in the cache.

    The program that comes last adds up what all have written; why it sees that is told at
    :func:`cet.kernels.exit_gate.finish`.
    """
    i_exit = tl.program_id(0) % EXITS
    i_block = tl.program_id(0) // EXITS
    blocks = tl.num_programs(0) // EXITS
    o_row = i_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    clean_ptr = pick(clean.ptrs, i_exit, EXITS)
    student_ptr = pick(perturbed.ptrs, i_exit, EXITS)
    s_clean = pick(clean.strides, i_exit, EXITS)
    s_student = pick(perturbed.strides, i_exit, EXITS)
    teacher_ptr = clean.ptrs[EXITS - 1] if FINAL_TEACHER else clean_ptr
    s_teacher = clean.strides[EXITS - 1] if FINAL_TEACHER else s_clean

    if CLASSES <= BLOCK_K:
        o_class = tl.arange(0, BLOCK_K)
        b_clean = load_logits(clean_ptr, s_clean, o_row, m_row, o_class, CLASSES, ALIGN)
        b_student = load_logits(student_ptr, s_student, o_row, m_row, o_class, CLASSES, ALIGN)
        b_teacher = b_clean
        if FINAL_TEACHER:
            b_teacher = load_logits(teacher_ptr, s_teacher, o_row, m_row, o_class, CLASSES, ALIGN)
        clean_softmax = softmax_of_block(b_clean)
        student = softmax_of_block(b_student)
        teacher = softmax_of_block(b_teacher)
    else:
        clean_softmax = softmax_of_rows(clean_ptr, s_clean, o_row, m_row, CLASSES, ALIGN, ROWS, BLOCK_K)
        student = softmax_of_rows(student_ptr, s_student, o_row, m_row, CLASSES, ALIGN, ROWS, BLOCK_K)
        teacher = clean_softmax
        if FINAL_TEACHER:
            teacher = softmax_of_rows(teacher_ptr, s_teacher, o_row, m_row, CLASSES, ALIGN, ROWS, BLOCK_K)

    normalizers = ()
    if MEAN_TEACHER:
        for i in tl.static_range(EXITS):
            softmax = softmax_of_rows(clean.ptrs[i], clean.strides[i], o_row, m_row, CLASSES, ALIGN, ROWS, BLOCK_K)
            normalizers += (log_normalizer(softmax),)
        b_largest = tl.full([ROWS], 0.0, tl.float32)
        b_likeliest = tl.zeros([ROWS], tl.int32)
        for i_class in range(0, CLASSES, BLOCK_K):
            o_class = i_class + tl.arange(0, BLOCK_K)
            b_mean = mean_probability(clean, normalizers, o_row, m_row, o_class, EXITS, CLASSES, ALIGN)
            b_mean = tl.where((o_class < CLASSES)[None, :], b_mean, 0.0)
            b_top = tl.max(b_mean, axis=1)
            b_likeliest = tl.where(b_top > b_largest, i_class + tl.argmax(b_mean, axis=1), b_likeliest)
            b_largest = tl.maximum(b_largest, b_top)
        teacher = b_largest, b_likeliest, 1.0 / b_largest

    weight = pick(config.exit_weights, i_exit, EXITS)
    labelled = tl.maximum(tl.load(work_ptr), 1).to(tl.float32)
    b_label = tl.load(labels_ptr + o_row, mask=m_row, other=_UNLABELLED)
    # A label out of range: NaN instead of an access out of bounds.
    b_one = tl.where((b_label >= 0) & (b_label < CLASSES), 1.0, float("nan"))
    # The largest probability is 1 / sum; the sum is at least 1 unless the logits are NaN, or all infinite.
    b_confident = (m_row & (config.min_confidence * teacher[2] <= 1.0) & (teacher[2] >= 1.0)).to(tl.float32)
    b_label_logit = tl.zeros([ROWS], tl.float32)
    b_student_label_logit = tl.zeros([ROWS], tl.float32)
    b_divergence = tl.zeros([ROWS], tl.float32)
    # The gradient of the student's logits: differences to the teacher and to the label, by their shares.
    of_consistency = config.consistency_weight / rows
    of_perturbed = of_consistency + config.supervise_perturbed / labelled
    consistency_share = tl.where(of_perturbed > 0.0, of_consistency / of_perturbed, 0.0)
    b_supervised_share = tl.where(b_label == _UNLABELLED, 0.0, b_one * (1.0 - consistency_share))
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
        b_student_label_logit += tl.sum(tl.where(b_is_label, b_student, 0.0), axis=1)
        if HARD:
            b_is_target = o_class[None, :] == teacher[1][:, None]
            b_divergence += tl.sum(tl.where(b_is_target, log_normalizer(student) - b_student, 0.0), axis=1)
            b_target = b_is_target.to(tl.float32)
        else:
            if MEAN_TEACHER:
                b_target = mean_probability(clean, normalizers, o_row, m_row, o_class, EXITS, CLASSES, ALIGN)
                b_log_target = tl.log(b_target)
            else:
                b_target = tl.exp(b_teacher - teacher[0][:, None]) / teacher[2][:, None]
                b_log_target = b_teacher - log_normalizer(teacher)
            b_log_ratio = b_log_target - (b_student - log_normalizer(student))
            # A class that the teacher rules out adds nothing, whatever the student's logit.
            b_divergence += tl.sum(tl.where(m_class & (b_target != 0.0), b_target * b_log_ratio, 0.0), axis=1)

        mask = m_row[:, None] & m_class
        o_grad = o_row[:, None] * CLASSES + o_class[None, :]
        if perturbed.grad_ptrs is not None:
            b_share = tl.exp(b_student - student[0][:, None]) / student[2][:, None]
            b_difference = (consistency_share * b_confident)[:, None] * (b_share - b_target)
            # Where the share is 0 the label may be none.
            b_difference += b_supervised_share[:, None] * (b_share - b_is_label.to(tl.float32))
            grad_ptr = pick(perturbed.grad_ptrs, i_exit, EXITS)
            store_gradient(
                grad_ptr, o_grad, b_difference, tl.full([ROWS], 1.0, tl.float32), weight * of_perturbed, mask
            )
        if clean.grad_ptrs is not None:
            b_share = tl.exp(b_clean - clean_softmax[0][:, None]) / clean_softmax[2][:, None]
            b_difference = tl.where((b_label == _UNLABELLED)[:, None], 0.0, b_share - b_is_label.to(tl.float32))
            b_factor = tl.where(b_label == _UNLABELLED, 1.0, b_one)
            grad_ptr = pick(clean.grad_ptrs, i_exit, EXITS)
            store_gradient(grad_ptr, o_grad, b_difference, b_factor, weight / labelled, mask)

    b_supervised = b_one * (clean_softmax[0] + tl.log(clean_softmax[2]) - b_label_logit)
    b_supervised = tl.where(b_label == _UNLABELLED, 0.0, b_supervised)
    b_supervised_perturbed = b_one * (student[0] + tl.log(student[2]) - b_student_label_logit)
    b_supervised_perturbed = tl.where(b_label == _UNLABELLED, 0.0, b_supervised_perturbed)
    b_consistency = tl.where(m_row, b_confident * b_divergence, 0.0)
    partial_ptr = partials_ptr + i_exit * blocks + i_block
    tl.store(partial_ptr, tl.sum(b_supervised, axis=0))
    tl.store(partial_ptr + EXITS * blocks, tl.sum(b_consistency, axis=0))
    tl.store(partial_ptr + 2 * EXITS * blocks, tl.sum(b_confident, axis=0))
    tl.store(partial_ptr + 3 * EXITS * blocks, tl.sum(b_supervised_perturbed, axis=0))

    tl.debug_barrier()
    if tl.atomic_add(work_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        loss = tl.zeros([], tl.float32)
        for i in tl.static_range(EXITS):
            partial_ptr = partials_ptr + i * blocks
            supervised = sum_of_blocks(partial_ptr, blocks, BLOCK_SUM) / labelled
            consistency = sum_of_blocks(partial_ptr + EXITS * blocks, blocks, BLOCK_SUM) / rows
            confident = sum_of_blocks(partial_ptr + 2 * EXITS * blocks, blocks, BLOCK_SUM) / rows
            supervised_perturbed = sum_of_blocks(partial_ptr + 3 * EXITS * blocks, blocks, BLOCK_SUM) / labelled
            tl.store(losses.supervised_ptr + i, supervised)
            tl.store(losses.consistency_ptr + i, consistency)
            tl.store(losses.confident_ptr + i, confident)
            tl.store(losses.supervised_perturbed_ptr + i, supervised_perturbed)
            # A term of weight 0 may be infinite.
            of_exit = supervised
            of_exit += tl.where(
                config.supervise_perturbed > 0.0, config.supervise_perturbed * supervised_perturbed, 0.0
            )
            of_exit += tl.where(config.consistency_weight > 0.0, config.consistency_weight * consistency, 0.0)
            loss += config.exit_weights[i] * of_exit
        tl.store(losses.loss_ptr, loss)


@triton.jit
def scale_kernel(gradient_ptrs, factors, scale_ptr, labelled_ptr, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Multiplies gradients in place.

    Mostly the scale is 1, and nothing is read or written. In float16 each gradient has a factor too, the sum of one
    number and of another over the number of labelled rows.
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    i_gradient = tl.program_id(0) % COUNT
    if factors is not None:
        labelled = tl.maximum(tl.load(labelled_ptr), 1).to(tl.float32)
        scale *= pick(factors[0], i_gradient, COUNT) + pick(factors[1], i_gradient, COUNT) / labelled
    if scale != 1.0:
        gradient_ptr = pick(gradient_ptrs, i_gradient, COUNT)
        o_entry = (tl.program_id(0) // COUNT).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_gradient = tl.load(gradient_ptr + o_entry, mask=o_entry < size).to(tl.float32) * scale
        tl.store(gradient_ptr + o_entry, b_gradient.to(gradient_ptr.dtype.element_ty), mask=o_entry < size)


class _Logits(NamedTuple):
    """Of all exits, on the clean or on the perturbed input."""

    ptrs: tuple[Tensor, ...]
    strides: tuple[int, ...]
    grad_ptrs: tuple[Tensor, ...] | None


class _Losses(NamedTuple):
    loss_ptr: Tensor
    supervised_ptr: Tensor
    consistency_ptr: Tensor
    confident_ptr: Tensor
    supervised_perturbed_ptr: Tensor


class _Config(NamedTuple):
    exit_weights: tuple[float, ...]
    consistency_weight: float
    supervise_perturbed: float
    min_confidence: float


def consistent_exit_loss_into(
    clean: _Logits, perturbed: _Logits, labels: Tensor, config: Any, losses: _Losses, work: Tensor
) -> None:
    """``config`` is a LossConfig of :mod:`cet.ops`. Gradients are contiguous, None where they are not wanted. Of
    ``work``, ``(2,)`` int32, the first entry becomes the number of labelled rows."""
    exits, (rows, classes) = len(clean.ptrs), clean.ptrs[0].shape
    # Where the mean of the exits teaches, a program holds one more block of a row, and no more than these fit.
    is_mean = config.teacher == "mean"
    class_block = _CLASS_BLOCK // 2 if is_mean else _CLASS_BLOCK
    block_k = block_size(classes, class_block if classes <= class_block else class_block // 2)
    row_block = max(1, _TILE // block_k)
    blocks = triton.cdiv(rows, row_block)
    partials = losses.loss_ptr.new_empty(4, exits, blocks)
    labels = labels.contiguous()
    numbers = config.consistency_weight, config.supervise_perturbed, config.min_confidence
    with on_device_of(labels):
        count_labelled_kernel[(1,)](labels, work, rows, BLOCK=_BLOCK)
        consistent_exit_loss_kernel[(blocks * exits,)](
            clean,
            perturbed,
            labels,
            losses,
            _Config(tuple(map(float, config.exit_weights)), *map(float, numbers)),
            partials,
            work,
            rows,
            EXITS=exits,
            CLASSES=classes,
            HARD=config.target == "hard",
            FINAL_TEACHER=config.teacher == "final",
            MEAN_TEACHER=is_mean,
            ALIGN=alignment(clean.ptrs[0].element_size(), *clean.strides, *perturbed.strides),
            ROWS=row_block,
            BLOCK_K=block_k,
            BLOCK_SUM=_SUM_BLOCK,
            num_warps=4 if classes <= class_block // 2 else 8 if classes <= class_block or is_mean else 16,
        )


def losses_and_gradients(
    logits: Sequence[Tensor], labels: Tensor, config: Any, wanted: Sequence[bool]
) -> tuple[_Losses, list[Tensor | None], Tensor]:
    """The losses; the gradients of the loss, of the clean logits where any is wanted, and so of the perturbed, not yet
    scaled in float16; the number of labelled rows, the first entry of an int32 tensor."""
    exits = len(logits) // 2
    loss = logits[0].new_empty((), dtype=torch.float32)
    losses = _Losses(loss, *(loss.new_empty(exits) for _ in range(4)))
    if len(labels) == 0:  # nothing to launch
        losses = _Losses(*(loss.zero_() for loss in losses))
    logits = [x if x.stride(1) == 1 else x.contiguous() for x in logits]
    groups = []
    for part in (slice(exits), slice(exits, None)):
        gradients = tuple(x.new_empty(x.shape) for x in logits[part]) if any(wanted[part]) else None
        groups.append(_Logits(tuple(logits[part]), tuple(x.stride(0) for x in logits[part]), gradients))
    work = labels.new_empty(2, dtype=torch.int32)
    consistent_exit_loss_into(*groups, labels, config, losses, work)
    return losses, [gradient for group in groups for gradient in group.grad_ptrs or (None,) * exits], work


def scale_into(
    gradients: Sequence[Tensor | None], scale: Tensor, factors: Sequence[tuple[float, float]] | None, labelled: Tensor
) -> None:
    """Make gradients of the loss those of ``scale`` times the loss, in place; in float16 each has a factor too, the sum
    of its first number and of its second over the number of labelled rows."""
    given = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
    size = given[0][1].numel()
    with on_device_of(scale):
        scale_kernel[(triton.cdiv(size, _BLOCK) * len(given),)](
            tuple(gradient for _, gradient in given),
            None if factors is None else tuple(zip(*(factors[i] for i, _ in given), strict=True)),
            scale,
            labelled,
            size,
            COUNT=len(given),
            BLOCK=_BLOCK,
        )
