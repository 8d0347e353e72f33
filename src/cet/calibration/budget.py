"""What samples may cost: on average, and at worst, which is the last exit that any of them may reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cet.calibration.cost import ExitCosts

ROUNDING = 1e-9
"""By what fraction a cost may be above a budget that was computed from the same costs."""


class BudgetError(ValueError):
    """No policy is within the budget, or none that is keeps the bound; the message says what the least budget is."""


@dataclass(frozen=True)
class Budget:
    """Of a sample, in the unit of the costs.

    Attributes:
        mean: of the mean over new samples; ``None``: no limit.
        worst: of every sample; ``None``: no limit.
    """

    mean: float | None
    worst: float | None

    def __bool__(self) -> bool:
        return self.mean is not None or self.worst is not None

    @classmethod
    def of(cls, mean: Any, worst: Any) -> Budget:
        """Checked.

        Raises:
            ValueError, TypeError: for what is no positive number.
        """
        for name, value in (("mean_budget", mean), ("worst_budget", worst)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} is {value!r}; give a number in the unit of the costs")
            if not 0 < float(value) < math.inf:
                raise ValueError(f"{name} is {value}; give a positive number in the unit of the costs")
        return cls(None if mean is None else float(mean), None if worst is None else float(worst))

    def keeps(self, mean: float, worst: float) -> bool:
        """Whether costs are within it."""
        return all(
            limit is None or cost <= limit * (1 + ROUNDING) for cost, limit in ((mean, self.mean), (worst, self.worst))
        )

    def text(self, unit: str) -> str:
        """In words."""
        parts = [
            f"{what} cost of {limit:.4g} {unit}"
            for what, limit in (("a mean", self.mean), ("a worst-case", self.worst))
            if limit is not None
        ]
        return " and ".join(parts)


def rounded_up(cost: float, digits: int = 6) -> str:
    """A cost with so many digits that is still enough when it is given as a budget, or a loss as a bound."""
    step = 10.0 ** (math.floor(math.log10(cost)) - digits + 1)
    return f"{math.ceil(cost / step - ROUNDING) * step:.{digits}g}"


NO_BUDGET = Budget(None, None)


@dataclass(frozen=True)
class Reach:
    """The exits that a policy may use.

    Attributes:
        exits: their positions, ascending; at the last of them every sample leaves.
        costs: with no exit but these.
        num_early: early exits of the model.
    """

    exits: tuple[int, ...]
    costs: ExitCosts
    num_early: int

    @classmethod
    def within(cls, costs: ExitCosts, budget: Budget) -> Reach:
        """As far as the worst case may go: the deepest exit that a sample can pay for, and of the earlier ones those
        whose heads it can pay for as well, deeper ones first, as they are surer.

        Raises:
            BudgetError: when no exit is within the budget.
        """
        num_early = len(costs.head)
        if not budget:
            return cls(tuple(range(num_early + 1)), costs, num_early)
        alone = np.cumsum(costs.stage) + np.append(costs.head, 0.0)
        for name, limit in (("mean_budget", budget.mean), ("worst_budget", budget.worst)):
            if limit is not None and limit * (1 + ROUNDING) < alone.min():
                raise BudgetError(
                    f"{name} is {limit:.6g} {costs.unit}, and no exit costs less than {rounded_up(alone.min())}; give "
                    f"at least that, the whole model costs {costs.full:.6g}"
                )
        worst = math.inf if budget.worst is None else budget.worst * (1 + ROUNDING)
        last = int(np.flatnonzero(alone <= worst).max())
        exits, left = [last], worst - alone[last]
        for k in reversed(range(last)):
            # An exit at which leaving costs more than at a later one serves nobody.
            if costs.head[k] <= left and alone[k] < alone[exits].min():
                exits.insert(0, k)
                left -= costs.head[k]
        return cls.of(costs, exits)

    @classmethod
    def of(cls, costs: ExitCosts, exits: Sequence[int]) -> Reach:
        """These exits."""
        *early, last = exits
        stage = np.diff(np.cumsum(costs.stage)[list(exits)], prepend=0.0)
        stage[-1] += np.append(costs.head, 0.0)[last]
        heads = tuple(costs.head[k] for k in early)
        return cls(tuple(exits), ExitCosts(tuple(stage), heads, costs.unit), len(costs.head))

    @property
    def closed(self) -> tuple[float, ...]:
        """Thresholds with which nobody leaves before the last of the exits."""
        return (-math.inf,) * (len(self.exits) - 1)

    def columns(self, values: NDArray[Any]) -> NDArray[Any]:
        """Of these exits, from ``(n, E)``, or of the early ones of them from ``(n, E - 1)``."""
        return values[:, list(self.exits if values.shape[1] > self.num_early else self.exits[:-1])]

    def expand(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        """Thresholds of all early exits of the model from those of the early ones of these; low scores leave."""
        found = [-math.inf] * self.num_early
        for k, threshold in zip(self.exits, thresholds, strict=False):
            found[k] = threshold
        if self.exits[-1] < self.num_early:
            found[self.exits[-1]] = math.inf
        return tuple(found)
