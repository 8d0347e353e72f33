"""Which labels the exits of a trained model contradict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cet.data.batches import UNLABELLED, BatchFn, call, read_batches
from cet.model.early_exit import EarlyExit
from cet.partition.stages import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LabelAudit:
    """How strongly the exits contradict each label; rows in the order in which the loader gave them.

    Attributes:
        suspicion: ``(N,)`` float32 in [-1, 1]: the largest probability of another class less that of the label, both
            the mean over the exits. Above 0 the exits together answer something else. NaN for a row without a label.
        doubt: ``(N,)`` float32 in [0, 1]: one less the probability of the label, the mean over the exits; NaN likewise.
        suggested: ``(N,)`` int64, the class that the exits together find likeliest.
        label: ``(N,)`` int64, as given; -100 for a row without one.
        contradicting: ``(N,)`` int64, how many exits answer another class than the label; 0 for a row without one.
        group: whose each row is, such as a recording; empty where that was not given.
    """

    suspicion: Tensor
    doubt: Tensor
    suggested: Tensor
    label: Tensor
    contradicting: Tensor
    group: tuple[Any, ...] = ()

    @classmethod
    def joined(cls, audits: Iterable[LabelAudit]) -> LabelAudit:
        """One audit of all the rows, such as those of folds, each audited by a model that was trained on the others."""
        parts = list(audits)
        return cls(
            torch.cat([part.suspicion for part in parts]),
            torch.cat([part.doubt for part in parts]),
            torch.cat([part.suggested for part in parts]),
            torch.cat([part.label for part in parts]),
            torch.cat([part.contradicting for part in parts]),
            tuple(group for part in parts for group in part.group),
        )

    def rows(self, limit: int | None = None) -> list[int]:
        """Positions of the labelled rows, most suspicious first."""
        order = self.suspicion.argsort(descending=True, stable=True)
        return order[~self.suspicion[order].isnan()].tolist()[:limit]

    def groups(self) -> list[Suspect]:
        """The groups with a labelled row, by the mean doubt of their rows, most first: those whose labels are wrong
        together, as those of a recording under a wrong name are, stand out more than their rows do.

        Raises:
            ValueError: where no groups were given.
        """
        if not self.group:
            raise ValueError("audit_labels was given no group; give one per row, in the order of the loader")
        members: dict[Any, list[int]] = {}
        for row in self.rows():
            members.setdefault(self.group[row], []).append(row)
        suspects = [
            Suspect(
                group,
                float(self.doubt[rows].mean()),
                int(self.label[rows].mode().values),
                int(self.suggested[rows].mode().values),
                len(rows),
            )
            for group, rows in members.items()
        ]
        return sorted(suspects, key=lambda suspect: -suspect.doubt)

    def plot(self, limit: int = 20) -> Figure:
        """The first suspects as a matplotlib figure, most suspicious on top: groups by their doubt where there are,
        else rows by their suspicion, each with its label and what the exits answer; below, all of them in this order.

        Args:
            limit: how many are named, from 1 on.

        Raises:
            ImportError: without matplotlib.
            ValueError: for a limit out of range.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit}; give at least 1")
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from cet.plotting import GREY, STYLE

        if self.group:
            named = [(s.group, s.doubt, s.label, s.suggested) for s in self.groups()]
        else:
            named = [
                (row, float(self.suspicion[row]), int(self.label[row]), int(self.suggested[row])) for row in self.rows()
            ]
        first = named[:limit]
        with rc_context(STYLE):
            figure = Figure(figsize=(6.4, 2.6 + 0.24 * len(first)), layout="constrained")
            top, whole = figure.subplots(2, 1, height_ratios=[0.24 * len(first) + 0.4, 1.6])
            colours = ["#D55E00" if label != suggested else GREY for _, _, label, suggested in first]
            top.barh(range(len(first)), [score for _, score, _, _ in first], color=colours)
            top.set_yticks(range(len(first)), [_question(*suspect) for suspect in first])
            top.invert_yaxis()
            whole.plot(range(1, len(named) + 1), [score for _, score, _, _ in named], color="#0072B2")
            whole.axvline(len(first), linestyle="--", color="#888888", linewidth=1)
            whole.set_xlabel(f"{'groups' if self.group else 'rows'}, most suspicious first")
            top.set_xlabel(score := "mean doubt" if self.group else "suspicion")
            whole.set_ylabel(score)
        return figure

    def __str__(self) -> str:
        """The first ten suspects: groups where there are, else rows."""
        if self.group:
            lines = [f"{'group':>12}      doubt  label  suggested  rows"]
            lines += [
                f"{s.group!s:>12}  {s.doubt:>9.2f}  {s.label:>5}  {s.suggested:>9}  {s.num_rows:>4}"
                for s in self.groups()[:10]
            ]
            return "\n".join(lines)
        lines = [f"{'row':>12}  suspicion  label  suggested  exits against"]
        for row in self.rows(10):
            numbers = (int(column[row]) for column in (self.label, self.suggested, self.contradicting))
            label, suggested, against = numbers
            lines.append(f"{row:>12}  {self.suspicion[row]:>9.2f}  {label:>5}  {suggested:>9}  {against:>13}")
        return "\n".join(lines)


def _question(name: Any, _: float, label: int, suggested: int) -> str:
    return f"{name}: {label}, not {suggested}?" if label != suggested else f"{name}: {label}"


@dataclass(frozen=True)
class Suspect:
    """A group of rows and its mean doubt, with its most frequent label and suggestion."""

    group: Any
    doubt: float
    label: int
    suggested: int
    num_rows: int


def audit_labels(
    model: EarlyExit,
    loader: Iterable[Any],
    *,
    group: Sequence[Any] | Tensor | None = None,
    batch_fn: BatchFn | None = None,
) -> LabelAudit:
    """Find labels that are probably wrong: those which all exits of a trained model contradict.

    The scores are the normalised margin, for rows, and the self-confidence, for groups, of Northcutt et al. 2021 (arXiv
    1911.00068), of the mean of the exits' probabilities. A model that was trained on these very labels has learnt part
    of what is wrong in them: train one on each part of the data, audit the other part by it, and join the audits by
    :meth:`LabelAudit.joined`; keep recordings whole. Rare classes look more suspicious than they are.

    Args:
        model: trained; it runs in eval mode where it is, and has its own modes back afterwards.
        loader: yields batches ``(x, y)``, see :mod:`cet.data.batches`; it must give rows in a fixed order.
        group: whose each row is, in the order of the loader, such as the recording that a window was cut from.
        batch_fn: takes a batch of another form apart: ``batch_fn(batch) -> (x, y)``.

    Raises:
        TypeError: for a model that is no :class:`cet.EarlyExit`, and a loader that does not yield labelled batches.
        ValueError: for a loader without a labelled row, as many groups as there are no rows for, and logits that are
            not finite.
    """
    if not isinstance(model, EarlyExit):
        raise TypeError(f"model is {type(model).__name__}; wrap it in cet.EarlyExit, and train it")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    labels, means, answers = [], [], []
    with torch.no_grad(), evaluating(model):
        for x, y in read_batches(loader, model.num_classes, batch_fn):
            x = pytree.tree_map_only(Tensor, lambda t: t.to(device), x)
            exits = torch.stack([logits.float().softmax(dim=1).cpu() for logits in call(model.exit_logits, x)])
            labels.append(y)
            means.append(exits.mean(dim=0))
            answers.append(exits.argmax(dim=2).T)
    label = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    has_label = label != UNLABELLED
    if not bool(has_label.any()):
        raise ValueError("loader yields no labelled row; give the rows whose labels are to be looked at")
    probability, answer = torch.cat(means), torch.cat(answers)
    if not bool(probability.isfinite().all()):
        row = int((~probability.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"the logits of row {row} are not finite; leave it out, or fill in what is missing")
    groups = () if group is None else tuple(group.tolist() if isinstance(group, Tensor) else group)
    if group is not None and len(groups) != len(label):
        raise ValueError(f"group has {len(groups)} entries for {len(label)} rows; give one per row of the loader")
    given = label.clamp(min=0)[:, None]
    others = probability.scatter(1, given, -1.0).amax(dim=1)
    of_label = probability.gather(1, given).squeeze(1)
    return LabelAudit(
        (others - of_label).masked_fill(~has_label, float("nan")),
        (1.0 - of_label).masked_fill(~has_label, float("nan")),
        probability.argmax(dim=1),
        label,
        ((answer != label[:, None]) & has_label[:, None]).sum(dim=1),
        groups,
    )
