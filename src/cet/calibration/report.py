"""What a calibrated policy does on the samples that it was calibrated on: by exit, by class, and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from cet.words import counted, uncertain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CLASSES_SHOWN = 10
"""How many classes the text of a report lists; :meth:`CalibrationReport.to_dict` holds all of them."""


@dataclass(frozen=True)
class ExitReport:
    """One exit on the calibration samples.

    Attributes:
        name: the exit's submodule, or ``"final"``.
        accuracy: of this exit alone on all samples.
        temperature: divides its logits before the softmax.
        threshold: of its score; ``None`` for a closed exit and the final one.
        fraction: of the samples that leave here.
        cost: of a sample that leaves here, the heads of the open exits on the way included.
    """

    name: str
    accuracy: float
    temperature: float
    threshold: float | None
    fraction: float
    cost: float


@dataclass(frozen=True)
class ClassReport:
    """One class that occurs among the calibration samples.

    Attributes:
        label: the class index.
        num_samples: samples with this label.
        recall: the fraction of them that the policy gets right.
        final_recall: the fraction of them that the final exit gets right.
        num_leaving: how many of them leave at each exit, shallow first.
    """

    label: int
    num_samples: int
    recall: float
    final_recall: float
    num_leaving: tuple[int, ...]

    @property
    def drop(self) -> float:
        """The recall that the policy loses."""
        return self.final_recall - self.recall

    @property
    def exit_shares(self) -> tuple[float, ...]:
        """The fraction of the class that leaves at each exit."""
        return tuple(count / self.num_samples for count in self.num_leaving)


@dataclass(frozen=True)
class Claim:
    """One thing of which too large a loss was to be refuted.

    Attributes:
        name: such as ``"accuracy"`` or ``"recall of class 3"``.
        condition: ``"clean"``, or the name of the perturbation.
        num_units: how many independent samples, groups or blocks of samples could tell.
        loss: their mean loss under the policy; of the safest policy tried where none was certified, and ``None`` where
            none was tried.
        p_value: with which probability samples speak as strongly against "more than the bound is lost", were it true;
            ``None`` where none was tried, or an expectation was controlled.
        least_units: how many could certify the bound if none of them lost anything; ``None``: no number of them.
    """

    name: str
    condition: str
    num_units: int
    loss: float | None
    p_value: float | None
    least_units: int | None


@dataclass(frozen=True)
class FrontPoint:
    """One policy on the way from safe to bold, on all calibration samples.

    Attributes:
        thresholds: one per early exit, ``None`` for a closed one.
        cost: mean cost per sample.
        loss: of the metric, against the final exit; the largest over conditions.
        certified: whether it was shown to keep the bound.
        chosen: whether it is the policy of the calibration.
    """

    thresholds: tuple[float | None, ...]
    cost: float
    loss: float
    certified: bool
    chosen: bool


@dataclass(frozen=True)
class Certificate:
    """What a calibration guarantees, and what it rests on.

    Attributes:
        method: how p-values were computed: ``"exact"``, ``"betting"``, ``"bentkus"``; or ``"risk control"`` of the
            expectation.
        metric: what was bounded.
        bound: of its loss on new samples; ``None``: not bounded, the best within a budget was asked for.
        confidence: with what probability over the calibration samples it holds; ``None``: in expectation over them.
        unit: what is independent of each other, and what new ones the bound is about: ``"samples"`` or ``"groups"``.
        num_fit: samples that fitted temperatures and laid the path of policies.
        num_tested: samples that tested it.
        claims: what was tested, under each condition; all of it had to be shown.
        reason: why nothing was certified, and all exits are closed; ``None`` where something was.
        mean_cost: of the certified policy on all calibration samples.
        fitted_cost: what thresholds fitted on all of these samples cost on them, without any guarantee; ``None`` where
            there is a budget.
        front: policies from safe to bold.
        notes: what else one should know.
        conditions: ``"clean"`` and the names of the perturbations.
        mean_budget: what the mean cost of new samples is within, with the same confidence; ``None``: no budget.
        worst_budget: what every sample costs at most, if its logits are finite; ``None``: no budget.
        cost_p_value: of "the mean cost is above the budget"; ``None`` where it cannot be, or an expectation was
            controlled.
        cost_unit: of all costs.
    """

    method: str
    metric: str
    bound: float | None
    confidence: float | None
    unit: str
    num_fit: int
    num_tested: int
    claims: tuple[Claim, ...]
    reason: str | None
    mean_cost: float
    fitted_cost: float | None
    front: tuple[FrontPoint, ...]
    notes: tuple[str, ...]
    conditions: tuple[str, ...] = ("clean",)
    mean_budget: float | None = None
    worst_budget: float | None = None
    cost_p_value: float | None = None
    cost_unit: str = ""

    @property
    def certified(self) -> bool:
        """Whether any sample may leave early under the guarantee."""
        return self.reason is None

    @property
    def least_units(self) -> int | None:
        """How many samples, or groups, of the kind that is scarcest could certify the bound if none lost anything;
        ``None``: no number of them."""
        least = [claim.least_units for claim in self.claims]
        return None if None in least else max((count for count in least if count is not None), default=None)

    @property
    def promise(self) -> str:
        """What is guaranteed, as a sentence."""
        if self.reason is not None:
            return f"nothing is certified, and all exits are closed: {self.reason}"
        how = "in expectation" if self.confidence is None else f"with probability {uncertain(self.confidence)}"
        also = "" if self.conditions == ("clean",) else f", {' as well as '.join(self.conditions)},"
        new = f"on new {self.unit} of the same kind{also}"
        promised = []
        if self.bound is not None:
            one = "hundredth" if self.metric in ("brier", "disagreement", "loss") else "point"
            points = counted(f"{100 * self.bound:.4g}", one)
            kept = f"at most {points}" if self.metric == "disagreement" else f"within {points} of the full model's"
            promised.append(f"{BOUNDED.get(self.metric, self.metric)} {new} is {kept}")
        if self.mean_budget is not None:
            promised.append(f"the mean cost{'' if promised else ' ' + new} is within {self._cost(self.mean_budget)}")
        sentence = f"certified: {how} over the calibration samples, {' and '.join(promised)}" if promised else ""
        if self.worst_budget is not None:
            certain = f"every sample costs at most {self._cost(self.worst_budget)}, unless its logits are not finite"
            sentence = f"{sentence}; {certain}" if sentence else f"certain: {certain}"
        return sentence + "; what is lost is not bounded" * (self.bound is None)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold, the promise included."""
        return _finite({**asdict(self), "certified": self.certified, "promise": self.promise})

    def _cost(self, cost: float) -> str:
        return f"{cost:.4g} {self.cost_unit}".rstrip()

    def front_table(self, unit: str | None = None) -> str:
        """The front as text, one policy a line; ``*`` marks the calibration's, ``+`` others that are certified. Costs
        are in ``unit``, that of the calibration when not given."""
        if not self.front:
            return "   no policy was tried"
        unit = self.cost_unit if unit is None else unit
        lines = [f"   {'cost ' + unit:>14}  {'loss':>8}  thresholds"]
        for point in self.front:
            mark = "*" if point.chosen else "+" if point.certified else " "
            numbers = "  ".join(map(_threshold, point.thresholds))
            lines.append(f" {mark} {point.cost:>14.5g}  {point.loss:>8.4f}  {numbers}")
        return "\n".join(lines)

    def plot_front(self, unit: str | None = None) -> Figure:
        """The front as a matplotlib figure: loss against mean cost, certified policies filled, the chosen one a star;
        dashed lines are the bound and the mean budget.

        Raises:
            ImportError: without matplotlib.
        """
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from cet.plotting import STYLE

        unit = self.cost_unit if unit is None else unit
        with rc_context(STYLE):
            figure = Figure(figsize=(6.4, 4), layout="constrained")
            axes = figure.subplots()
            for limit, line in ((self.bound, axes.axhline), (self.mean_budget, axes.axvline)):
                if limit is not None:
                    line(limit, linestyle="--", color="#888888", linewidth=1)
            for points, style in (
                ([p for p in self.front if p.certified], {"marker": "o", "label": "certified"}),
                ([p for p in self.front if not p.certified], {"marker": "o", "mfc": "white", "label": "not certified"}),
                ([p for p in self.front if p.chosen], {"marker": "*", "markersize": 15, "label": "chosen"}),
            ):
                axes.plot([p.cost for p in points], [p.loss for p in points], linestyle="", color="#0072B2", **style)
            axes.set_xlabel(f"mean cost per sample / {unit}" if unit else "mean cost per sample")
            axes.set_ylabel(f"loss of {self.metric} on the calibration samples")
            axes.legend()
        return figure

    def lines(self) -> list[str]:
        """The certificate as text."""
        tested = sorted(
            (claim for claim in self.claims if claim.loss is not None),
            key=lambda claim: (-(claim.p_value or 0.0), claim.name),
        )
        lines = [self.promise]
        for claim in tested[:MAX_CLAIMS_SHOWN]:
            p_value = "" if claim.p_value is None else f", p = {claim.p_value:.3g}"
            where = "" if claim.condition == "clean" else f" on {claim.condition} input"
            lines.append(
                f"{claim.name}{where}: a loss of {100 * (claim.loss or 0.0):.2f} hundredths in "
                f"{counted(claim.num_units, 'independent unit')}{p_value}; with no loss at all "
                f"{claim.least_units or 'no number'} of them would do"
            )
        if len(tested) > MAX_CLAIMS_SHOWN:
            lines.append(
                f"and {len(tested) - MAX_CLAIMS_SHOWN} more"
                + " with no larger p-value" * (tested[0].p_value is not None)
            )
        if self.cost_p_value is not None:
            lines.append(f"mean cost: {self._cost(self.mean_cost)}, p = {self.cost_p_value:.3g}")
        if self.reason is None and (self.claims or self.mean_budget is not None):  # else nothing was tested
            price = (
                ""
                if self.fitted_cost is None
                else f"; the price of the guarantee: a mean cost of {self.mean_cost:.4g}, where thresholds fitted on "
                f"these samples give {self.fitted_cost:.4g}"
            )
            lines.append(
                f"tested on {counted(self.num_tested, 'sample')} ({self.method}), "
                f"{counted(self.num_fit or 'no', 'other')} laid the path{price}"
            )
        return [*lines, *(f"note: {note}" for note in self.notes)]


BOUNDED = {
    "accuracy": "accuracy",
    "balanced": "mean recall",
    "per_class": "the recall of every class",
    "disagreement": "the share of answers that differ from the full model's",
    "brier": "the Brier score",
}
"""What is bounded, in words, by the name of the metric."""

MAX_CLAIMS_SHOWN = 5
"""How many claims the text of a report lists."""


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibrated policy does on the samples it was calibrated on.

    Attributes:
        num_samples: labelled samples.
        score: the name of the policy's score.
        exits: one :class:`ExitReport` per exit, shallow first.
        classes: one :class:`ClassReport` per class that occurs, by label.
        accuracy: of the policy.
        final_accuracy: of the final exit on all samples.
        drop: ``final_accuracy - accuracy``.
        metric: the name of the metric that was bounded.
        metric_drop: what the metric loses; for ``"per_class"`` the largest loss of recall.
        max_drop: what ``metric_drop`` was allowed to be; ``None``: anything.
        interval: two-sided confidence interval of ``drop`` on samples drawn like these.
        confidence: its level.
        mean_cost: per sample under the policy.
        full_cost: per sample for the backbone alone.
        unit: of all costs.
        certificate: what is guaranteed on new samples; ``None`` where the policy was only fitted on these.
    """

    num_samples: int
    score: str
    exits: tuple[ExitReport, ...]
    classes: tuple[ClassReport, ...]
    accuracy: float
    final_accuracy: float
    drop: float
    metric: str
    metric_drop: float
    max_drop: float | None
    interval: tuple[float, float]
    confidence: float
    mean_cost: float
    full_cost: float
    unit: str
    certificate: Certificate | None = None

    @property
    def warning(self) -> str | None:
        """A sentence about the classes that lose more recall than ``max_drop``; ``None`` when there is none."""
        # A recall is a fraction of at most 2^53 samples: a difference within 1e-9 is rounding.
        losing = [row for row in self.classes if self.max_drop is not None and row.drop > self.max_drop + 1e-9]
        if not losing or self.max_drop is None:
            return None
        worst = max(losing, key=lambda row: row.drop)
        lose = counted(len(losing), "class loses", "classes lose")
        return (
            f"{lose} more recall than {counted(f'{100 * self.max_drop:.4g}', 'point')}, most of all class "
            f"{worst.label}, from {worst.final_recall:.2%} to {worst.recall:.2%} of "
            f"{counted(worst.num_samples, 'sample')}; bound it with metric='per_class' or 'balanced'"
        )

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold, the warning and the promise included."""
        certificate = None if self.certificate is None else self.certificate.to_dict()
        return _finite({**asdict(self), "certificate": certificate, "warning": self.warning})

    def __str__(self) -> str:
        low, high = self.interval
        bounded = "" if self.metric == "accuracy" else f"{self.metric} drops by {100 * self.metric_drop:.2f} points; "
        return "\n".join(
            [
                *self._exit_lines(),
                f"{bounded}accuracy {self.accuracy:.2%} against {self.final_accuracy:.2%} of the final exit, a drop of "
                f"{100 * self.drop:.2f} points ({self.confidence:.0%} interval {100 * low:.2f} to {100 * high:.2f}) "
                f"on {counted(self.num_samples, 'sample')}",
                f"mean cost {self.mean_cost:.4g} {self.unit}, {self.mean_cost / self.full_cost:.1%} of the backbone",
                *(["fitted on these samples: nothing is guaranteed on others"] if self.certificate is None else []),
                *(self.certificate.lines() if self.certificate else []),
                *self._class_lines(),
                *([f"warning: {self.warning}"] if self.warning else []),
            ]
        )

    def _exit_lines(self) -> list[str]:
        width = max(len(row.name) for row in self.exits)
        lines = [f"{'exit':<{width}}  accuracy  temperature  threshold  leaving  {self.unit:>10}"]
        for row in self.exits:
            lines.append(
                f"{row.name:<{width}}  {row.accuracy:>8.2%}  {row.temperature:>11.3f}  {_threshold(row.threshold):>9}  "
                f"{row.fraction:>7.1%}  {row.cost:>10.4g}"
            )
        return lines

    def _class_lines(self) -> list[str]:
        """The classes that lose most recall, in the order of that loss."""
        shown = sorted(self.classes, key=lambda row: (-row.drop, row.label))[:MAX_CLASSES_SHOWN]
        names = [row.name for row in self.exits]
        widths = [max(len(name), 6) for name in names]
        head = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
        lines = [f"class  samples  recall  of final  leaving at: {head}"]
        for row in shown:
            shares = "  ".join(f"{share:>{width}.1%}" for share, width in zip(row.exit_shares, widths, strict=True))
            lines.append(
                f"{row.label:>5}  {row.num_samples:>7}  {row.recall:>6.1%}  {row.final_recall:>8.1%}  {'':<11} {shares}"
            )
        if len(self.classes) > len(shown):
            lines.append(f"and {counted(len(self.classes) - len(shown), 'class that loses', 'classes that lose')} less")
        return lines


def _threshold(value: float | None) -> str:
    """As text: closed, one that every sample passes, or a number."""
    return "-" if value is None else "all" if math.isinf(value) else f"{value:.4g}"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """With infinite thresholds as the strings that ``float`` reads, since JSON has no infinity."""

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite(value)
        if isinstance(value, list | tuple):
            return type(value)(map(written, value))
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    return {key: written(value) for key, value in values.items()}


def drop_interval(lost: int, won: int, num_samples: int, confidence: float) -> tuple[float, float]:
    """Two-sided interval for the difference of two accuracies on the same samples: adjusted Wald interval for paired
    proportions (Bonett & Price 2012, J. Educ. Behav. Stat. 37(4), 479-488).

    Args:
        lost: samples that only the first classifier, the final exit, gets right.
        won: samples that only the second one, the policy, gets right.
        num_samples: all samples.
        confidence: level of the interval, in (0, 1).
    """
    p_lost, p_won = (lost + 1) / (num_samples + 2), (won + 1) / (num_samples + 2)
    difference = p_lost - p_won
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    margin = z * math.sqrt((p_lost + p_won - difference**2) / (num_samples + 2))
    return max(difference - margin, -1.0), min(difference + margin, 1.0)
