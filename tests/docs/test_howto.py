"""The code in the how-to pages runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cet

PAGES = sorted(Path(__file__).parents[2].glob("docs/howto/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_another(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_the_page_on_trained_models_leaves_the_backbone_alone_and_teaches_the_heads() -> None:
    [page] = [page for page in PAGES if page.stem == "use-on-a-trained-model"]
    first, *others = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    made, learned = first.split("# The heads learn")
    names: dict[str, Any] = {}
    exec(made, names)
    before = {name: value.clone() for name, value in names["model"].state_dict().items()}
    for block in ("#" + learned, *others):
        exec(block, names)
    model: cet.EarlyExit = names["model"]
    for name, value in model.state_dict().items():
        if name != "_extra_state":  # the policy
            assert torch.equal(value, before[name]) == name.startswith("backbone."), name
