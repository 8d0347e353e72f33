"""The scores in Triton: what csrc/softmax_stats.h is to the CPU, statement by statement.

A score is a branch of :func:`score_of` on what :func:`softmax_stats` gathers, and one of :func:`exits`
if low means sure.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp is taken as 0 below; it keeps 0 * -inf out of the entropy.
_EXP_UNDERFLOW = tl.constexpr(-87.3)


@triton.jit
def softmax_stats(b_logits, temperature, SCORE: tl.constexpr):
    """SoftmaxStats of csrc/softmax_stats.h for each row of logits ``(ROWS, K)``, -Inf in excess columns.

    These are the max, the second largest, and the sums of ``exp(z)`` and ``z exp(z)`` for ``z = (x - max) / t``.
    """
    b_max = tl.max(b_logits, axis=1)
    b_second = b_max
    if SCORE == "margin":  # the only score that needs it
        o_class = tl.arange(0, b_logits.shape[1])
        b_first = tl.argmax(b_logits, axis=1)
        b_second = tl.max(tl.where(o_class[None, :] == b_first[:, None], float("-inf"), b_logits), axis=1)
    b_offset = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_shifted = (b_logits - b_offset[:, None]) / temperature
    b_exp = tl.exp(b_shifted)
    return b_max, b_second, tl.sum(b_exp, axis=1), tl.sum(b_exp * tl.maximum(b_shifted, _EXP_UNDERFLOW), axis=1)


@triton.jit
def rescaled(stats, b_max, temperature):
    """The sums relative to a max that is at least their own; those of logits that are all -Inf are 0.

    Far below it they vanish, also where the way there is not finite, or times a sum is not.
    """
    b_shift = tl.where(stats[2] == 0.0, 0.0, (stats[0] - b_max) / temperature)
    b_scale = tl.exp(b_shift)
    return stats[2] * b_scale, (stats[3] + tl.maximum(b_shift, _EXP_UNDERFLOW) * stats[2]) * b_scale


@triton.jit
def merge_stats(one, other, temperature):
    """The statistics of two blocks of a row together."""
    b_max = tl.maximum(one[0], other[0])
    b_second = tl.maximum(tl.minimum(one[0], other[0]), tl.maximum(one[1], other[1]))
    b_sum, b_weighted = rescaled(one, b_max, temperature)
    b_sum2, b_weighted2 = rescaled(other, b_max, temperature)
    return b_max, b_second, b_sum + b_sum2, b_weighted + b_weighted2


@triton.jit
def score_of(stats, temperature, CLASSES: tl.constexpr, SCORE: tl.constexpr):
    """Scores of some rows; these may depend on the statistics, the temperature and the number of classes."""
    b_max, b_second, b_sum, b_weighted = stats
    if SCORE == "entropy":
        b_score = tl.log(b_sum) - b_weighted / b_sum
    elif SCORE == "confidence":
        b_score = 1.0 / b_sum
    else:
        tl.static_assert(SCORE == "margin")
        b_score = (1.0 - tl.exp((b_second - b_max) / temperature)) / b_sum
    # The largest adds 1, unless one is NaN or +Inf or all are -Inf.
    return tl.where(b_sum >= 1.0, b_score, float("nan"))


@triton.jit
def exits(b_score, threshold, SCORE: tl.constexpr):
    """The exit mask. Every comparison with NaN is false, so a row whose score is NaN goes on."""
    return b_score <= threshold if SCORE == "entropy" else b_score >= threshold
