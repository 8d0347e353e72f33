"""audit_labels: which labels the exits contradict, by row and by group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cet


@pytest.fixture
def model() -> cet.EarlyExit:
    """Its input is the logits, of its exit and of its end; twice as sharp at the end."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model = cet.EarlyExit(net, ["0"], (torch.zeros(2, 3),))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3))
        net[1].weight.copy_(2 * torch.eye(3))
        model.heads[0].linear.weight.copy_(torch.eye(3))
        model.heads[0].linear.bias.zero_()
    return model


X = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 0.5], [1.0, 0, 0], [0, 2.0, 0]])
Y = torch.tensor([0, 2, 2, 1, -100])


def loader(y: torch.Tensor = Y) -> Any:
    return list(zip(X.split(2), y.split(2), strict=True))


def test_suspicion_is_the_margin_of_the_exits_mean(model: cet.EarlyExit) -> None:
    model.train()
    audit = cet.audit_labels(model, loader())
    assert model.training
    mean = (X.softmax(1) + (2 * X).softmax(1)) / 2
    for row, label in enumerate(Y.tolist()[:4]):
        others = max(mean[row, k].item() for k in range(3) if k != label)
        assert audit.suspicion[row].item() == pytest.approx(others - mean[row, label].item())
    assert audit.suspicion[4].isnan()
    assert audit.suggested.tolist() == [0, 1, 2, 0, 1]
    assert audit.contradicting.tolist() == [0, 2, 0, 2, 0]
    assert audit.rows() == [1, 3, 2, 0]
    assert audit.rows(1) == [1]
    assert str(audit).splitlines()[1].split() == ["1", f"{audit.suspicion[1]:.2f}", "2", "1", "2"]


def test_groups_are_ranked_by_their_mean(model: cet.EarlyExit) -> None:
    audit = cet.audit_labels(model, loader(), group=["a", "b", "a", "b", "c"])
    first, second = audit.groups()
    assert (first.group, first.num_rows, second.group, second.num_rows) == ("b", 2, "a", 2)
    mean = (X.softmax(1) + (2 * X).softmax(1)) / 2
    assert first.doubt == pytest.approx(1 - (mean[1, 2] + mean[3, 1]).item() / 2)
    halves = [cet.audit_labels(model, [batch], group="ab") for batch in loader()[:2]]
    assert cet.LabelAudit.joined(halves).groups() == audit.groups()
    with pytest.raises(ValueError, match="audit_labels was given no group"):
        cet.audit_labels(model, loader()).groups()


def test_the_plot_names_the_first_suspects(model: cet.EarlyExit) -> None:
    audit = cet.audit_labels(model, loader(), group=["a", "b", "a", "b", "c"])
    top, whole = audit.plot().axes
    assert [label.get_text() for label in top.get_yticklabels()] == ["b: 1, not 0?", "a: 0"]
    assert [bar.get_width() for bar in top.patches] == [suspect.doubt for suspect in audit.groups()]
    assert whole.lines[0].get_ydata().tolist() == [suspect.doubt for suspect in audit.groups()]
    rows = cet.audit_labels(model, loader()).plot(limit=1).axes
    assert [label.get_text() for label in rows[0].get_yticklabels()] == ["1: 2, not 1?"]
    assert len(rows[1].lines[0].get_ydata()) == 4
    with pytest.raises(ValueError, match="limit is 0; give at least 1"):
        audit.plot(0)


def test_what_cannot_be_audited_is_refused(model: cet.EarlyExit) -> None:
    with pytest.raises(TypeError, match=r"model is Sequential; wrap it in cet\.EarlyExit"):
        cet.audit_labels(model.backbone, loader())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loader yields no labelled row"):
        cet.audit_labels(model, loader(torch.full((5,), -100)))
    with pytest.raises(ValueError, match="group has 2 entries for 5 rows"):
        cet.audit_labels(model, loader(), group=["a", "b"])
    with pytest.raises(ValueError, match="the logits of row 0 are not finite"):
        cet.audit_labels(model, [(torch.full((2, 3), torch.nan), Y[:2])])


def test_mislabelled_groups_are_found() -> None:
    """Waves of three frequencies in twenty recordings, four of them under a wrong name."""
    torch.manual_seed(0)
    recording = torch.arange(20).repeat_interleave(10)
    true = recording % 3
    phase = 6.3 * torch.rand(200, 1, 1)
    x = torch.sin(torch.arange(32) * 0.3 * (1 + true[:, None, None]) + phase) + 0.3 * torch.randn(200, 2, 32)
    y = torch.where(recording % 5 == 0, (true + 1) % 3, true)
    net = nn.Sequential(nn.Conv1d(2, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1))
    net.append(nn.Flatten()).append(nn.Linear(16, 3))
    model = cet.EarlyExit(net, {"1": cet.HeadSpec(layout="channels_first")}, (x[:2],)).train()
    loss_of = cet.ConsistentExitLoss(lambda x: x + 0.3 * torch.randn_like(x), consistency_weight=3.0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, x, y)[0].backward()
        optimizer.step()
    suspects = cet.audit_labels(model, [(x, y)], group=recording).groups()
    assert {suspect.group for suspect in suspects[:4]} == {0, 5, 10, 15}
    assert [suspect.suggested for suspect in suspects[:4]] == [suspect.group % 3 for suspect in suspects[:4]]
