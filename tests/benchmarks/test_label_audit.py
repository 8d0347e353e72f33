"""benchmarks.label_audit: an audit comes back from its file, and how rankings are judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cet
from benchmarks.label_audit import Audited, rankings, rows_of


def test_rankings_are_judged_by_the_wrong_recordings(tmp_path: Path) -> None:
    """Eight recordings of two rows; 5 and 2 have a wrong name, and are ranked first and third."""
    group = torch.arange(16) // 2
    doubt = torch.tensor([0.1, 0.2, 0.32, 0.3, 0.35, 0.9, 0.15, 0.25])[group]
    true = torch.zeros(16, dtype=torch.int64)
    label = ((group == 5) | (group == 2)).long()
    suggested = torch.where(group == 2, 1, 0)
    audit = cet.LabelAudit(2 * doubt - 1, doubt, suggested, label, torch.zeros(16).long(), tuple(group.tolist()))
    given = torch.stack([1 - doubt, doubt], 1)
    probability = torch.where(label[:, None] == 1, given.flip(1), given).numpy()
    path = tmp_path / "audit.npz"
    Audited(audit, probability, true.numpy()).write(path)
    again = Audited.read(path)
    assert again.audit.groups() == audit.groups()
    np.testing.assert_array_equal(again.probability, probability)
    row = rows_of(10, 0, 4, again)[0]
    assert (row.ranking, row.recordings, row.wrong) == ("cet", 8, 2)
    assert row.found == 0.5
    assert row.auroc == pytest.approx((6 + 5) / 12)  # pairs of a wrong and a right one that are in the right order
    assert row.suggested_right == 0.5
    assert next(iter(rankings(again))) == "cet"
