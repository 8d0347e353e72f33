"""What the gate means, in plain PyTorch.

Sums, softmax and scores are in float32, whatever the dtype of the features or logits, so that a policy means the same
for a model in half precision. A row whose logits hold a NaN or +Inf has a NaN score, every comparison with NaN is
false, and so it goes on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.compact.definition import order_rows_definition
from cet.ops.definitions import SCORES, Layout, Pool, ScoreName, pool_features

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels compute with, and the number by which they know it."""


def score_definition(logits: Tensor, score: ScoreName, temperature: float | Tensor) -> Tensor:
    """The definition of :func:`exit_score`; the temperature may be a tensor ``()``, which stays on its device."""
    return SCORES[score].definition(log_probabilities(logits, temperature))


def log_probabilities(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """What scores are made of: ``(B, K)`` float32."""
    logits = logits.float()
    # Differences are divided, never the logits: these may overflow, or lose the digits that differ.
    scaled = (logits - logits.detach().amax(dim=1, keepdim=True)) / temperature
    return torch.log_softmax(scaled, dim=1)


def gate_definition(
    logits: Tensor, score: ScoreName, threshold: float | Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`gate`."""
    scores = score_definition(logits.detach(), score, temperature)
    return scores, scores <= threshold if SCORES[score].is_low_when_sure else scores >= threshold


def exit_gate_definition(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of :func:`exit_gate`."""
    logits = F.linear(pool_features(features, layout, pool), weight, bias)
    return logits, *gate_definition(logits, score, threshold, temperature)


def padded_scores_definition(logits: Tensor, decision: Tensor, _count: Tensor, score: ScoreName) -> Tensor:
    """The definition of :func:`cet.ops.padded.padded_scores`."""
    return score_definition(logits.detach(), score, decision[1])


def padded_gate_definition(
    logits: Tensor, decision: Tensor, count: Tensor, num_kept: Tensor, score: ScoreName, _state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`cet.ops.padded.padded_gate`."""
    scores, exit_mask = gate_definition(logits, score, *decision)
    order, number = order_rows_definition(exit_mask, count)
    num_kept.copy_(number)
    return scores, order.int()
