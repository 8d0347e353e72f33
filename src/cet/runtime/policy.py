"""When a sample may leave: a score, one threshold per early exit, one temperature per exit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cet.ops.definitions import SCORE_NAMES
from cet.runtime.scores import PolicyScore, ScoreFunction, check_score, has_kernel
from cet.thresholds import as_numbers, check_thresholds
from cet.words import counted


@dataclass(frozen=True)
class ExitPolicy:
    """The rule by which samples leave.

    Args:
        score: ``"entropy"`` of the softmax in nats (a sample leaves when it is ``<= threshold``),
            ``"confidence"``, its largest probability (``>= threshold``), or ``"margin"``, its largest
            probability minus the second largest (``>= threshold``), or ``"patience"``, how many open exits before
            this one, without a break, have named the same class (``>= threshold``, a whole number; Zhou et al. 2020,
            arXiv 2006.04152). A patience of 1 is the agreement of two successive exits. Or a
            :class:`cet.ScoreFunction` of one's own. The last two are for the eager runner and exported ``.onnx`` files.
        thresholds: one per early exit, shallow first; ``None`` closes that exit.
        temperatures: one per exit, the final one included; logits are divided by it before the softmax
            (Guo et al. 2017, arXiv 1706.04599). It changes scores, never the logits that are returned.
            ``None`` means 1 everywhere.
        survival: one per early exit, the fraction of samples that is expected to be still on its way behind it, as
            calibration found it. It changes no answer: runners that pad batches choose by it what to pad to.
            ``None``: nothing is known.

    Raises:
        ValueError: for an unknown score, a NaN threshold, a confidence or margin that was given in percent,
            a temperature that is not positive and finite, a survival
            outside [0, 1], or lengths that disagree.
    """

    score: PolicyScore = "entropy"
    thresholds: tuple[float | None, ...] = ()
    temperatures: tuple[float, ...] | None = None
    survival: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_score(self.score)
        object.__setattr__(self, "thresholds", as_numbers("thresholds", self.thresholds, optional=True))
        if not isinstance(self.score, ScoreFunction):
            check_thresholds(self.score, self.thresholds)
        if self.survival is not None:
            object.__setattr__(self, "survival", as_numbers("survival", self.survival, optional=False))
            if len(self.survival) != len(self.thresholds):
                raise ValueError(
                    f"survival has {len(self.survival)} entries for {len(self.thresholds)} thresholds; give one each"
                )
            if not all(0 <= fraction <= 1 for fraction in self.survival):
                raise ValueError(f"survival is {self.survival}; give fractions in [0, 1]")
        if self.temperatures is None:
            return
        object.__setattr__(self, "temperatures", as_numbers("temperatures", self.temperatures, optional=False))
        for index, temperature in enumerate(self.temperatures):
            if not 1e-30 <= temperature <= 1e30:  # what float32 can divide by
                raise ValueError(f"temperatures[{index}] is {temperature}; give a positive, finite number")
        if len(self.temperatures) != len(self.thresholds) + 1:
            raise ValueError(
                f"temperatures has {len(self.temperatures)} entries for {len(self.thresholds)} thresholds; "
                f"give {len(self.thresholds) + 1}, one per early exit and one for the final exit"
            )

    @classmethod
    def closed(cls, num_exits: int) -> ExitPolicy:
        """The policy under which every sample runs through all ``num_exits`` exits."""
        return cls(thresholds=(None,) * (num_exits - 1))

    def temperature(self, exit_index: int) -> float:
        """The temperature of one exit."""
        return 1.0 if self.temperatures is None else self.temperatures[exit_index]

    def check_num_exits(self, num_exits: int) -> None:
        """Refuse a policy that was made for another number of exits (the final one counted)."""
        if len(self.thresholds) != num_exits - 1:
            raise ValueError(
                f"policy has {counted(len(self.thresholds), 'threshold')} but the model has "
                f"{counted(num_exits - 1, 'early exit')}; "
                "give one threshold per early exit, None for a closed one"
            )

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold; ``ExitPolicy(**policy.to_dict())`` is the same policy.

        JSON has no infinity, so infinite thresholds are written as the strings that ``float`` reads.

        Raises:
            ValueError: for a score that is a function, which JSON cannot hold.
        """
        if isinstance(self.score, ScoreFunction):
            raise ValueError(
                f"the policy's score {self.score.name!r} is a function, which a file cannot hold; save a policy with "
                "another score, and set this one after loading"
            )
        thresholds = [str(t) if t is not None and math.isinf(t) else t for t in self.thresholds]
        return {
            "score": self.score,
            "thresholds": thresholds,
            "temperatures": self.temperatures,
            "survival": self.survival,
        }


_OTHER_SCORES = (-2, -1)
"""The numbers of a function, and of patience, in a state dict."""


def policy_to_tensor(policy: ExitPolicy) -> Tensor:
    """A policy as float64 numbers ``(1 + E, 4)``, for state dicts: what averages or compares their values does no harm.

    The first row holds the number of the score; each other row whether an exit is open, its threshold, its temperature
    (0 for none) and its survival (-1 for none). A function cannot be held, only that there was one.
    """
    num_early = len(policy.thresholds)
    temperatures = policy.temperatures or (0.0,) * (num_early + 1)
    survival = (*(policy.survival or (-1.0,) * num_early), -1.0)
    number = SCORE_NAMES.index(policy.score) if has_kernel(policy.score) else _OTHER_SCORES[policy.score == "patience"]
    rows = [[float(number), 0.0, 0.0, 0.0]]
    for threshold, temperature, fraction in zip((*policy.thresholds, None), temperatures, survival, strict=True):
        rows.append([float(threshold is not None), threshold or 0.0, temperature, fraction])
    return torch.tensor(rows, dtype=torch.float64)


def policy_from_tensor(numbers: Tensor, own: PolicyScore = "entropy") -> ExitPolicy:
    """The policy that :func:`policy_to_tensor` wrote.

    Args:
        numbers: ``(1 + E, 4)``.
        own: the score of the model now, whose function is taken for one that the numbers cannot hold.

    Raises:
        ValueError: when the numbers are damaged, or there was a function and ``own`` is none.
    """
    if numbers.numel() and numbers.flatten()[0] == _OTHER_SCORES[0] and not isinstance(own, ScoreFunction):
        raise ValueError(
            "the state dict's policy has a function as its score, which it cannot hold; set a policy with that "
            "cet.ScoreFunction first, then load"
        )
    scores: dict[int, PolicyScore] = {**dict(enumerate(SCORE_NAMES)), _OTHER_SCORES[1]: "patience"}
    if isinstance(own, ScoreFunction):
        scores[_OTHER_SCORES[0]] = own
    try:
        (number, *_), *rows = numbers.double().tolist()
        is_open, thresholds, temperatures, survival = zip(*rows, strict=True)
        return ExitPolicy(
            scores[int(number)],
            tuple(t if round(o) else None for o, t in zip(is_open[:-1], thresholds[:-1], strict=True)),
            temperatures if all(temperatures) else None,
            survival[:-1] if len(survival) > 1 and min(survival[:-1]) >= 0 else None,
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the policy in the state dict is damaged ({error}); save the model again") from error
