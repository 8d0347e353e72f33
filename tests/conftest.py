"""Fixtures that several test files share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import cet
from families import FAMILIES, Family

Built = tuple[Family, cet.EarlyExit]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Each test draws the same numbers, and leaves the generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest) -> Built:
    """A family and its multi-exit model in eval mode, its logits spread such that scores differ between rows."""
    family = FAMILIES[request.param]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = family.build()
    model = cet.EarlyExit(backbone, family.exits, family.inputs(2)).eval()
    with torch.no_grad():
        for head, logits in zip(model.heads, model.exit_logits(**family.inputs(16)), strict=False):
            spread = logits.std(dim=0).mean()
            head.linear.bias.sub_(logits.mean(dim=0)).div_(spread)
            head.linear.weight.div_(spread)
    return family, model
