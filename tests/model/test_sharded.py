"""Weights that FSDP2 shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_sharded_model_answers_when_it_is_called_and_names_the_way_where_nothing_is_gathered(tmp_path: Path) -> None:
    script = Path(__file__).with_name("sharded.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "store"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.endswith("finished\n"), done.stderr
