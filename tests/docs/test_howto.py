"""What the how-to pages promise beside running as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import cet

PAGE = Path(__file__).parents[2] / "docs/howto/use-on-a-trained-model.md"


def test_the_page_on_trained_models_leaves_the_backbone_alone_and_teaches_the_heads() -> None:
    first, *others = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
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
