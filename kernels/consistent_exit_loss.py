"""The loss of all exits and its gradient, in one pass over the clean and the perturbed logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cet.kernels.launch import alignment, block_size, launch, num_processors, on_device_of

_CLASS_BLOCK = 4096  # logits of a row that stay in registers; of more, all are read twice
_TILE = 256  # logits of a program, where a row has fewer
_BLOCK = 1024
_SUM_TILE = 256  # partial sums that are loaded at once; of more, registers are spilled in some kernels
_PROGRAMS_PER_PROCESSOR = 8  # of those that stride over their entries: enough to hide what they wait for

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
def rows_of_block(i_block, rows, CLASSES: tl.constexpr, ALIGN: tl.constexpr, LEADS: tl.constexpr, ROWS: tl.constexpr):
    """Which rows these are, which of them there are, and how many entries before the first one of a row its blocks of
    classes begin: where a row may begin anywhere, with these all blocks begin at 16 bytes."""
    o_row = i_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lead = 0
    if LEADS:
        tl.static_assert(ROWS == 1)
        lead = (i_block.to(tl.int64) * CLASSES % ALIGN).to(tl.int32)
    return o_row, o_row < rows, lead


@triton.jit
def classes_of_block(at, i_class, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr):
    """The classes of a block's columns, and the mask of its entries."""
    o_class = i_class - at[2] + tl.arange(0, BLOCK_K)
    return o_class, at[1][:, None] & ((o_class >= 0) & (o_class < CLASSES))[None, :]


@triton.jit
def offsets_of_block(at, s_row, i_class, ALIGN: tl.constexpr, LEADS: tl.constexpr, BLOCK_K: tl.constexpr):
    """``(ROWS, BLOCK_K)``, in a form that shows the compiler what they are multiples of."""
    o_start = (at[0] * s_row - at[2]) // ALIGN * ALIGN if LEADS else at[0] * (s_row // ALIGN * ALIGN)
    return o_start[:, None] + (i_class + tl.arange(0, BLOCK_K))[None, :]


@triton.jit
def is_inside(at, i_class, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a block needs no mask, under which a thread would access its entries one by one if rows are odd.

    A row of more than one block is alone in its program, and is there.
    """
    return (i_class >= at[2]) & (i_class - at[2] + BLOCK_K <= CLASSES)


@triton.jit
def load_logits(
    logits_ptr,
    s_row,
    at,
    i_class,
    CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    LEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of classes as float32, with -Inf in excess columns."""
    o_logit = offsets_of_block(at, s_row, i_class, ALIGN, LEADS, BLOCK_K)
    _, mask = classes_of_block(at, i_class, CLASSES, BLOCK_K)
    if CLASSES <= BLOCK_K:
        b_logits = tl.load(logits_ptr + o_logit, mask=mask, other=float("-inf"))
    elif is_inside(at, i_class, CLASSES, BLOCK_K):
        b_logits = tl.load(logits_ptr + o_logit)
    else:
        b_logits = tl.load(logits_ptr + o_logit, mask=mask, other=float("-inf"))
    return b_logits.to(tl.float32)


@triton.jit
def store_gradient(
    grad_ptr,
    at,
    i_class,
    b_difference,
    b_factor,
    scale,
    CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    LEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Differences of probabilities ``(ROWS, K)`` times a factor per row and a scale: in float16, where small gradients
    would be lost, always the same one, and :func:`scale_kernel` does the rest."""
    if grad_ptr.dtype.element_ty == tl.float16:
        scale = _HALF_GRADIENT_SCALE
    b_grad = (b_difference * (b_factor * scale)[:, None]).to(grad_ptr.dtype.element_ty)
    if LEADS:
        o_grad = offsets_of_block(at, CLASSES, i_class, ALIGN, LEADS, BLOCK_K)
    else:
        o_grad = (at[0] * CLASSES)[:, None] + (i_class + tl.arange(0, BLOCK_K))[None, :]
    _, mask = classes_of_block(at, i_class, CLASSES, BLOCK_K)
    if CLASSES <= BLOCK_K:
        tl.store(grad_ptr + o_grad, b_grad, mask=mask)
    elif is_inside(at, i_class, CLASSES, BLOCK_K):
        tl.store(grad_ptr + o_grad, b_grad)
    else:
        tl.store(grad_ptr + o_grad, b_grad, mask=mask)


@triton.jit
def exponentials(b_logits, b_max):
    """Relative to the largest logits of the rows, which may all be -Inf."""
    return tl.exp(b_logits - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None])


@triton.jit
def softmax_of_block(b_logits):
    """Of each row the largest logit, its column (the first such), and the sum of exponentials relative to it."""
    b_max = tl.max(b_logits, axis=1)
    return b_max, tl.argmax(b_logits, axis=1), tl.sum(exponentials(b_logits, b_max), axis=1)


@triton.jit
def softmax_of_rows(
    logits_ptr,
    s_row,
    at,
    CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    LEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """:func:`softmax_of_block` of all blocks of a row together (Milakov and Gimelshein 2018, arXiv 1805.02867), with
    the class in place of the column."""
    b_max = tl.full([at[0].shape[0]], float("-inf"), tl.float32)
    b_argmax = tl.zeros([at[0].shape[0]], tl.int32)
    b_sum = tl.zeros([at[0].shape[0]], tl.float32)
    for i_class in range(0, CLASSES + at[2], BLOCK_K):
        b_logits = load_logits(logits_ptr, s_row, at, i_class, CLASSES, ALIGN, LEADS, BLOCK_K)
        b_max2, b_column, b_sum2 = softmax_of_block(b_logits)
        b_argmax = tl.where(b_max2 > b_max, i_class - at[2] + b_column, b_argmax)
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
def probabilities(b_logits, softmax):
    """In the words of :func:`softmax_of_block`: of a block that was seen there nothing is computed anew."""
    return exponentials(b_logits, softmax[0]) * (1.0 / softmax[2])[:, None]


@triton.jit
def mean_probability(
    clean,
    normalizers,
    at,
    i_class,
    EXITS: tl.constexpr,
    CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    LEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of the exits' softmaxes on the clean input, ``(ROWS, BLOCK_K)``."""
    b_logits = load_logits(clean.ptrs[0], clean.strides[0], at, i_class, CLASSES, ALIGN, LEADS, BLOCK_K)
    b_sum = tl.exp(b_logits - normalizers[0])
    for i in tl.static_range(1, EXITS):
        b_logits = load_logits(clean.ptrs[i], clean.strides[i], at, i_class, CLASSES, ALIGN, LEADS, BLOCK_K)
        b_sum += tl.exp(b_logits - normalizers[i])
    return b_sum / EXITS


@triton.jit
def mean_teacher(
    clean,
    at,
    EXITS: tl.constexpr,
    CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    LEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The normalizers of all exits; of their mean what is the last two of :func:`softmax_of_rows` of a single one."""
    normalizers = ()
    for i in tl.static_range(EXITS):
        softmax = softmax_of_rows(clean.ptrs[i], clean.strides[i], at, CLASSES, ALIGN, LEADS, BLOCK_K)
        normalizers += (log_normalizer(softmax),)
    b_largest = tl.full([at[0].shape[0]], 0.0, tl.float32)
    b_likeliest = tl.zeros([at[0].shape[0]], tl.int32)
    for i_class in range(0, CLASSES + at[2], BLOCK_K):
        b_mean = mean_probability(clean, normalizers, at, i_class, EXITS, CLASSES, ALIGN, LEADS, BLOCK_K)
        _, mask = classes_of_block(at, i_class, CLASSES, BLOCK_K)
        b_mean = tl.where(mask, b_mean, 0.0)
        b_top = tl.max(b_mean, axis=1)
        b_likeliest = tl.where(b_top > b_largest, i_class - at[2] + tl.argmax(b_mean, axis=1), b_likeliest)
        b_largest = tl.maximum(b_largest, b_top)
    return normalizers, (b_largest, b_likeliest, 1.0 / b_largest)


@triton.jit
def sum_up(
    partials_ptr, losses, config, labelled, rows, blocks, EXITS: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr
):
    """The last sums as one tile, ``TERMS`` being four for each exit and more: each takes as long as one of them would,
    and adds in an order that depends on the number of blocks alone."""
    o_term = tl.arange(0, TERMS)
    m_term = o_term < 4 * EXITS
    b_sums = tl.zeros([TERMS, BLOCK], tl.float32)
    for i_block in range(0, blocks, BLOCK):
        o_block = i_block + tl.arange(0, BLOCK)
        mask = m_term[:, None] & (o_block < blocks)[None, :]
        b_sums += tl.load(partials_ptr + o_term.to(tl.int64)[:, None] * blocks + o_block[None, :], mask=mask, other=0.0)
    i_kind, i_exit = o_term // EXITS, o_term % EXITS
    of_labelled = (i_kind == 0) | (i_kind == 3)
    b_term = tl.sum(b_sums, axis=1) / tl.where(of_labelled, labelled, rows.to(tl.float32))
    tl.store(losses.supervised_ptr + i_exit, b_term, mask=i_kind == 0)
    tl.store(losses.consistency_ptr + i_exit, b_term, mask=i_kind == 1)
    tl.store(losses.confident_ptr + i_exit, b_term, mask=i_kind == 2)
    tl.store(losses.supervised_perturbed_ptr + i_exit, b_term, mask=i_kind == 3)
    b_weight = tl.where(i_kind == 0, 1.0, 0.0)
    b_weight = tl.where(i_kind == 1, config.consistency_weight, b_weight)
    b_weight = tl.where(i_kind == 3, config.supervise_perturbed, b_weight)
    b_loss = tl.where(b_weight > 0.0, b_weight * b_term, 0.0)  # a term of weight 0 may be infinite
    tl.store(losses.loss_ptr, tl.sum(tl.where(m_term, b_loss * pick(config.exit_weights, i_exit, EXITS), 0.0), axis=0))


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
    LEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    OWN: tl.constexpr,
):
    """``OWN`` exits of ``ROWS`` rows: all of them, one after the other, or one, and then the programs for the exits of
    the same rows run side by side, and share the teacher in the cache.

    The program that comes last adds up what all have written: before its addition to the ticket each releases what it
    wrote, and with its own the last one acquires that.
    """
    i_block = tl.program_id(0) // (EXITS // OWN)
    blocks = tl.num_programs(0) // (EXITS // OWN)
    at = rows_of_block(i_block, rows, CLASSES, ALIGN, LEADS, ROWS)
    o_row, m_row, lead = at
    labelled = tl.maximum(tl.load(work_ptr), 1).to(tl.float32)
    b_label = tl.load(labels_ptr + o_row, mask=m_row, other=_UNLABELLED)
    m_label = (b_label >= 0) & (b_label < CLASSES)
    # A label out of range: NaN instead of an access out of bounds.
    b_one = tl.where(m_label, 1.0, float("nan"))
    # The gradient of the student's logits: differences to the teacher and to the label, by their shares.
    of_consistency = config.consistency_weight / rows
    of_perturbed = of_consistency + config.supervise_perturbed / labelled
    consistency_share = tl.where(of_perturbed > 0.0, of_consistency / of_perturbed, 0.0)
    supervised_share = tl.where(of_perturbed > 0.0, 1.0 - consistency_share, 0.0)
    b_supervised_share = tl.where(b_label == _UNLABELLED, 0.0, b_one * supervised_share)

    normalizers = ()
    if MEAN_TEACHER:
        if CLASSES <= BLOCK_K:
            b_mean = tl.zeros([ROWS, BLOCK_K], tl.float32)
            for i in tl.static_range(EXITS):
                b_clean = load_logits(clean.ptrs[i], clean.strides[i], at, 0, CLASSES, ALIGN, LEADS, BLOCK_K)
                b_mean += probabilities(b_clean, softmax_of_block(b_clean))
            b_mean /= EXITS
            b_log_mean = tl.log(b_mean)
            b_largest = tl.max(b_mean, axis=1)
            teacher = b_largest, tl.argmax(b_mean, axis=1), 1.0 / b_largest
        else:
            normalizers, teacher = mean_teacher(clean, at, EXITS, CLASSES, ALIGN, LEADS, BLOCK_K)
    elif FINAL_TEACHER:
        teacher_ptr, s_teacher = clean.ptrs[EXITS - 1], clean.strides[EXITS - 1]
        if CLASSES <= BLOCK_K:
            b_teacher = load_logits(teacher_ptr, s_teacher, at, 0, CLASSES, ALIGN, LEADS, BLOCK_K)
            teacher = softmax_of_block(b_teacher)
        else:
            teacher = softmax_of_rows(teacher_ptr, s_teacher, at, CLASSES, ALIGN, LEADS, BLOCK_K)

    for i_own in tl.static_range(OWN):
        i_exit = i_own if OWN == EXITS else tl.program_id(0) % EXITS
        clean_ptr = pick(clean.ptrs, i_exit, EXITS)
        student_ptr = pick(perturbed.ptrs, i_exit, EXITS)
        s_clean = pick(clean.strides, i_exit, EXITS)
        s_student = pick(perturbed.strides, i_exit, EXITS)

        if CLASSES <= BLOCK_K:
            b_clean = load_logits(clean_ptr, s_clean, at, 0, CLASSES, ALIGN, LEADS, BLOCK_K)
            b_student = load_logits(student_ptr, s_student, at, 0, CLASSES, ALIGN, LEADS, BLOCK_K)
            clean_softmax = softmax_of_block(b_clean)
            student = softmax_of_block(b_student)
            if not (MEAN_TEACHER or FINAL_TEACHER):
                b_teacher = b_clean
        else:
            clean_softmax = softmax_of_rows(clean_ptr, s_clean, at, CLASSES, ALIGN, LEADS, BLOCK_K)
            student = softmax_of_rows(student_ptr, s_student, at, CLASSES, ALIGN, LEADS, BLOCK_K)
        if not (MEAN_TEACHER or FINAL_TEACHER):
            teacher = clean_softmax

        weight = pick(config.exit_weights, i_exit, EXITS)
        # The largest probability is 1 / sum; the sum is at least 1, but for rounding of a mean, unless the logits are
        # NaN, or all infinite.
        b_confident = (m_row & (config.min_confidence * teacher[2] <= 1.0) & (teacher[2] >= 0.5)).to(tl.float32)
        b_divergence = tl.zeros([ROWS], tl.float32)
        for i_class in range(0, CLASSES + lead, BLOCK_K):
            if CLASSES > BLOCK_K:
                b_clean = load_logits(clean_ptr, s_clean, at, i_class, CLASSES, ALIGN, LEADS, BLOCK_K)
                b_student = load_logits(student_ptr, s_student, at, i_class, CLASSES, ALIGN, LEADS, BLOCK_K)
                b_teacher = b_clean
                if FINAL_TEACHER:
                    b_teacher = load_logits(teacher_ptr, s_teacher, at, i_class, CLASSES, ALIGN, LEADS, BLOCK_K)
            o_class, _ = classes_of_block(at, i_class, CLASSES, BLOCK_K)
            b_is_label = o_class[None, :] == b_label[:, None]
            if HARD:
                b_is_target = o_class[None, :] == teacher[1][:, None]
                b_divergence += tl.sum(tl.where(b_is_target, log_normalizer(student) - b_student, 0.0), axis=1)
                b_target = b_is_target.to(tl.float32)
            else:
                if MEAN_TEACHER and CLASSES <= BLOCK_K:
                    b_target, b_log_target = b_mean, b_log_mean
                elif MEAN_TEACHER:
                    b_target = mean_probability(clean, normalizers, at, i_class, EXITS, CLASSES, ALIGN, LEADS, BLOCK_K)
                    b_log_target = tl.log(b_target)
                else:
                    b_target = probabilities(b_teacher, teacher)
                    b_log_target = b_teacher - log_normalizer(teacher)
                b_log_ratio = b_log_target - (b_student - log_normalizer(student))
                # A class that the teacher rules out, as it does excess ones, adds nothing, whatever the student's is.
                b_divergence += tl.sum(tl.where(b_target != 0.0, b_target * b_log_ratio, 0.0), axis=1)

            if perturbed.grad_ptrs is not None:
                b_share = probabilities(b_student, student)
                # Where a share is 0 its target may be none, or not finite.
                b_of_teacher = (consistency_share * b_confident)[:, None] * (b_share - b_target)
                b_of_label = b_supervised_share[:, None] * (b_share - b_is_label.to(tl.float32))
                b_difference = tl.where(consistency_share > 0.0, b_of_teacher, 0.0)
                b_difference += tl.where((b_supervised_share != 0.0)[:, None], b_of_label, 0.0)
                grad_ptr = pick(perturbed.grad_ptrs, i_exit, EXITS)
                b_factor = tl.full([ROWS], 1.0, tl.float32)
                scale = weight * of_perturbed
                store_gradient(grad_ptr, at, i_class, b_difference, b_factor, scale, CLASSES, ALIGN, LEADS, BLOCK_K)
            if clean.grad_ptrs is not None:
                b_difference = probabilities(b_clean, clean_softmax) - b_is_label.to(tl.float32)
                b_difference = tl.where((b_label == _UNLABELLED)[:, None], 0.0, b_difference)
                b_factor = tl.where(b_label == _UNLABELLED, 1.0, b_one)
                grad_ptr = pick(clean.grad_ptrs, i_exit, EXITS)
                scale = weight / labelled
                store_gradient(grad_ptr, at, i_class, b_difference, b_factor, scale, CLASSES, ALIGN, LEADS, BLOCK_K)

        o_label = b_label.to(tl.int64)
        b_label_logit = tl.load(clean_ptr + o_row * s_clean + o_label, mask=m_label, other=0.0).to(tl.float32)
        b_supervised = b_one * (clean_softmax[0] + tl.log(clean_softmax[2]) - b_label_logit)
        b_supervised = tl.where(b_label == _UNLABELLED, 0.0, b_supervised)
        b_label_logit = tl.load(student_ptr + o_row * s_student + o_label, mask=m_label, other=0.0).to(tl.float32)
        b_supervised_perturbed = b_one * (student[0] + tl.log(student[2]) - b_label_logit)
        b_supervised_perturbed = tl.where(b_label == _UNLABELLED, 0.0, b_supervised_perturbed)
        b_consistency = tl.where(m_row, b_confident * b_divergence, 0.0)
        partial_ptr = partials_ptr + i_exit * blocks + i_block
        tl.store(partial_ptr, tl.sum(b_supervised, axis=0))
        tl.store(partial_ptr + EXITS * blocks, tl.sum(b_consistency, axis=0))
        tl.store(partial_ptr + 2 * EXITS * blocks, tl.sum(b_confident, axis=0))
        tl.store(partial_ptr + 3 * EXITS * blocks, tl.sum(b_supervised_perturbed, axis=0))

    tl.debug_barrier()
    if tl.atomic_add(work_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        sum_up(partials_ptr, losses, config, labelled, rows, blocks, EXITS, TERMS, BLOCK_SUM)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(gradient_ptrs, factors, scale_ptr, labelled_ptr, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Multiplies gradients in place; the programs of each take its blocks in turn.

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
        i_block = (tl.program_id(0) // COUNT).to(tl.int64)
        for i_entry in range(i_block * BLOCK, size, tl.num_programs(0) // COUNT * BLOCK):
            o_entry = i_entry + tl.arange(0, BLOCK)
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
    is_mean = config.teacher == "mean"
    itemsize, strides = clean.ptrs[0].element_size(), (*clean.strides, *perturbed.strides)
    # Rows begin at multiples of the one or, by the other, all at the same distance from such.
    aligned, together = alignment(itemsize, *strides), alignment(itemsize, *(stride - classes for stride in strides))
    # Where the mean of the exits teaches, a program holds one more block of a row, and where rows begin anywhere it
    # masks the ends of each: no more than these fit.
    is_small = is_mean or (classes > _CLASS_BLOCK and together > aligned)
    class_block = _CLASS_BLOCK // 2 if is_small else _CLASS_BLOCK
    block_k = block_size(classes, class_block if classes <= class_block else class_block // 2)
    row_block = max(1, _TILE // block_k)
    leads = classes > block_k and together > aligned
    terms = block_size(4 * exits, 1 << 30)
    # Of short rows more programs are better; of long ones, or many exits, one for all would take too many registers.
    own = exits if row_block == 1 and classes <= 1024 and exits <= 8 else 1
    blocks = triton.cdiv(rows, row_block)
    partials = losses.loss_ptr.new_empty(4, exits, blocks)
    labels = labels.contiguous()
    numbers = config.consistency_weight, config.supervise_perturbed, config.min_confidence
    with on_device_of(labels):
        launch(count_labelled_kernel, 1, labels, work, rows, BLOCK=_BLOCK)
        launch(
            consistent_exit_loss_kernel,
            blocks * exits // own,
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
            ALIGN=together if leads else aligned,
            LEADS=leads,
            ROWS=row_block,
            BLOCK_K=block_k,
            TERMS=terms,
            BLOCK_SUM=max(1, _SUM_TILE // terms),
            OWN=own,
            num_warps=4 if classes <= class_block // 2 else 8 if classes <= class_block or is_small else 16,
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
        most = _PROGRAMS_PER_PROCESSOR * num_processors(scale.device) // len(given)
        launch(
            scale_kernel,
            max(1, min(triton.cdiv(size, _BLOCK), most)) * len(given),
            tuple(gradient for _, gradient in given),
            None if factors is None else tuple(zip(*(factors[i] for i, _ in given), strict=True)),
            scale,
            labelled,
            size,
            COUNT=len(given),
            BLOCK=_BLOCK,
        )
