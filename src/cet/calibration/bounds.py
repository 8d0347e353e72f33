"""P-values for "the mean is larger than a bound", from samples that are independent, whatever their distribution.

Each is a number ``p`` with ``P(p <= u) <= u`` for every ``u`` when the claim to be refuted, a mean above the bound, is
true: a small one refutes it. None needs more than independence, so what they certify holds for any model and data.

=====================  =============================================================================================
:func:`paired`         differences of two right-or-wrong answers; exact, so nothing is lost to an inequality
:func:`binomial`       events, such as disagreements; exact
:func:`betting`        any bounded values; adapts to their variance
:func:`bentkus`        any bounded values, by Hoeffding's and Bentkus' inequalities; only their mean is used
=====================  =============================================================================================
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUISANCE_RATIO = 1.06
"""How much further apart the nuisance values lie, one after another, at which the exact test looks for its maximum."""


def paired(lost: int, won: int, num_samples: int, bound: float) -> float:
    """The exact unconditional p-value of "the final exit is right more often than the policy, by more than ``bound``".

    Both answer the same samples, so only those count on which one of them is right: the test is far sharper than one of
    the policy's errors. Outcomes are ordered by the score statistic of Tango (1998, Stat. Med. 17, 891-908), and the
    p-value is the largest probability, over every rate of won samples, of an outcome that speaks as strongly against
    the claim (Hsueh, Liu, Chen 2001, Biometrics 57, 478-483). The rates looked at lie so close that the maximum is met
    to a hundredth of itself.

    Args:
        lost: samples that only the final exit gets right.
        won: samples that only the policy gets right.
        num_samples: all samples, ``lost + won`` or more.
        bound: in [0, 1).
    """
    statistic = float(_score_statistic(lost, won, num_samples, bound))
    return 1.0 if statistic >= 0 else _paired_tail(statistic, num_samples, bound)


class PairedTest:
    """Whether :func:`paired` stays within a level, for many outcomes of one number of samples.

    The p-value grows with the statistic, so an outcome between two that are known needs no new sum.
    """

    def __init__(self, num_samples: int, bound: float) -> None:
        self.num_samples, self.bound = num_samples, bound
        self._known: list[tuple[float, float]] = []  # statistic and p-value, both ascending

    def statistics(self, lost: Ints, won: Ints) -> Floats:
        """Of outcomes, ``(m,)``: how strongly each speaks for the claim."""
        return _score_statistic(lost, won, self.num_samples, self.bound)

    def rejects(self, statistic: float, level: float) -> bool:
        """Whether the claim is refuted by an outcome of this statistic: ``paired(lost, won, ...) <= level``."""
        if statistic >= 0:
            return False
        place = bisect_left(self._known, (statistic, -1.0))
        if place < len(self._known) and self._known[place][1] <= level:
            return True
        if place > 0 and self._known[place - 1][1] > level:
            return False
        p_value = _paired_tail(statistic, self.num_samples, self.bound)
        insort(self._known, (statistic, p_value))
        return p_value <= level


@lru_cache(1024)
def paired_test(num_samples: int, bound: float) -> PairedTest:
    """One test per number of samples and bound, with what it knows already."""
    return PairedTest(num_samples, bound)


def binomial(events: int, num_samples: int, bound: float) -> float:
    """The exact p-value of "the event is more frequent than ``bound``"."""
    return float(special.bdtr(events, num_samples, bound))


def bentkus(mean: float, num_samples: int, bound: float) -> float:
    """The Hoeffding-Bentkus p-value of "the mean of values in [0, 1] is larger than ``bound``" (Bates et al. 2021,
    arXiv 2101.02703, section 3.1.1; the form of Angelopoulos et al. 2021, arXiv 2110.01052, equation 4).
    """
    if mean >= bound:
        return 1.0
    divergence = special.rel_entr(mean, bound) + special.rel_entr(1 - mean, 1 - bound)
    hoeffding = math.exp(-num_samples * divergence)
    # A sum that rounding has lifted above a whole number is that number.
    return min(1.0, hoeffding, math.e * float(special.bdtr(math.ceil(num_samples * mean - 1e-9), num_samples, bound)))


def betting(values: ArrayLike, low: float, high: float, bound: float, level: float) -> float:
    """The p-value of "the mean of values in [``low``, ``high``] is larger than ``bound``" by betting against it
    (Waudby-Smith & Ramdas 2023, J. R. Stat. Soc. B 86, section 4; arXiv 2010.09686).

    A gambler bets on each value in turn, as is best for the spread of those before; were the claim true, the capital
    would ever exceed ``1 / p`` with probability ``p`` at most (Ville's inequality).

    Args:
        values: ``(n,)``, independent, in an order that was drawn at random; their means may differ as long as the claim
            is about the mean of every one of them.
        low, high: what the values cannot leave.
        bound: in (``low``, ``high``).
        level: the p-value that is hoped for; it decides how much is bet, and is no matter of validity.
    """
    if not np.size(values):
        return 1.0
    unit = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    null, count = (bound - low) / (high - low), np.arange(1, len(unit) + 1)
    mean = (0.5 + unit.cumsum()) / (count + 1)
    variance = (0.25 + ((unit - mean) ** 2).cumsum()) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])[: len(unit)]
    stake = np.minimum(np.sqrt(-2 * math.log(level) / (len(unit) * before)), MAX_STAKE / (1 - null))
    log_capital = np.log1p(-stake * (unit - null)).cumsum()
    if unit.mean() > null:  # a lucky streak on the way is no reason to certify what the samples as a whole deny
        return 1.0
    return math.exp(-max(float(log_capital.max(initial=0.0)), 0.0))


MAX_STAKE = 0.9
"""The most that :func:`betting` stakes, as a fraction of what a single value could take all of."""


def _score_statistic(lost: ArrayLike, won: ArrayLike, num_samples: int, bound: float) -> Floats:
    """``lost - won`` against ``bound * num_samples``, over its deviation at the likeliest rates of the claim."""
    lost, won = np.asarray(lost, dtype=np.float64), np.asarray(won, dtype=np.float64)
    half = (lost + won) * (1 - bound) + 2 * bound * (lost - num_samples)
    rate = (half + np.sqrt(half**2 + 8 * num_samples * won * bound * (1 - bound))) / (4 * num_samples)
    variance = num_samples * (2 * rate + bound * (1 - bound))
    excess = lost - won - num_samples * bound
    result: Floats = np.divide(excess, np.sqrt(variance), out=np.zeros_like(excess), where=variance > 0)
    return result


def _paired_tail(statistic: float, num_samples: int, bound: float) -> float:
    """The largest probability, over the rate of won samples, of a statistic that is not larger."""
    of_rate, won, chance, lost_rate = _outcomes(num_samples, bound)
    most_lost = _most_lost(statistic + 1e-9, np.arange(won.max() + 1), num_samples, bound)[won]
    below = np.where(most_lost < 0, 0.0, special.bdtr(np.maximum(most_lost, 0), num_samples - won, lost_rate))
    return min(1.0, float(np.bincount(of_rate, chance * below).max()))


@lru_cache(16)
def _outcomes(num_samples: int, bound: float) -> tuple[Ints, Ints, Floats, Floats]:
    """Rates of won samples, and for each the numbers of them that occur with any chance to speak of.

    The rates lie densest near 0, where single samples show; elsewhere the statistic has nearly the same distribution.

    Returns:
        In four arrays ``(m,)``, one entry per rate and number: the position of the rate; the number; its chance; and at
        the edge of the claim, with which probability one of the samples that are not won is lost.
    """
    most = num_samples * (1 - bound) / 2
    means = np.linspace(0, math.sqrt(min(10.0, most)), 61) ** 2
    if most > means[-1]:
        steps = math.ceil(math.log(most / means[-1]) / math.log(NUISANCE_RATIO))
        means = np.append(means, np.geomspace(means[-1], most, steps + 1)[1:])
    reach = 8 * np.sqrt(means) + 12
    first = np.maximum(means - reach, 0).astype(np.int64)
    count = np.minimum(means + reach, num_samples).astype(np.int64) + 1 - first
    of_rate = np.repeat(np.arange(len(means)), count)
    won = np.arange(count.sum()) - np.repeat(count.cumsum() - count - first, count)
    rate = (means / num_samples)[of_rate]
    return of_rate, won, stats.binom.pmf(won, num_samples, rate), np.minimum((rate + bound) / (1 - rate), 1.0)


def _most_lost(statistic: float, won: Ints, num_samples: int, bound: float) -> Ints:
    """The largest number of lost samples with at most this statistic, -1 where even 0 has more, by bisection: the
    statistic grows with it."""
    low, high = np.full_like(won, -1), num_samples - won
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = _score_statistic(middle, won, num_samples, bound) <= statistic
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low
