"""The gate: a score per row, and whether the row leaves.

All arithmetic is in float32, whatever the dtype of the logits, so that a policy means the same for a model in half
precision. A row whose logits hold a NaN or +Inf has a NaN score, every comparison with NaN is false, and so it stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cet.policy import ScoreName


def exit_score(logits: Tensor, score: ScoreName = "entropy", temperature: float = 1.0) -> Tensor:
    """Score every row of ``logits``.

    Args:
        logits: ``(B, K)``, any floating dtype, ``K >= 2``.
        score: ``"entropy"`` in nats, ``"confidence"`` or ``"margin"``, see :class:`cet.ExitPolicy`.
        temperature: divides the logits.

    Returns:
        ``(B,)`` float32.
    """
    logits = logits.float()
    probabilities = torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=1)
    if score == "entropy":
        # entr(0) is 0, so a class ruled out by a logit of -Inf adds nothing.
        entropies: Tensor = torch.special.entr(probabilities).sum(dim=1)
        return entropies
    if score == "confidence":
        return probabilities.amax(dim=1)
    top = probabilities.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def exit_gate(
    logits: Tensor, *, score: ScoreName = "entropy", threshold: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Decide which rows leave.

    Args:
        logits: ``(B, K)``, any floating dtype.
        score: which score, see :func:`exit_score`.
        threshold: rows leave when ``entropy <= threshold``, or ``confidence >= threshold``, or
            ``margin >= threshold``; compared in float32.
        temperature: divides the logits.

    Returns:
        The scores ``(B,)`` float32 and the flags ``(B,)`` bool, true where the row leaves.
    """
    scores = exit_score(logits, score, temperature)
    return scores, scores <= threshold if score == "entropy" else scores >= threshold
