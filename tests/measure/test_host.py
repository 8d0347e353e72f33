"""The facts about the host that stand beside results."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from cet.measure import host


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_tells_whether_tracked_files_were_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CET_COMMIT", raising=False)
    git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert host.commit(tmp_path) == head
    (tmp_path / "untracked").touch()
    assert host.commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert host.commit(tmp_path) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert host.commit(tmp_path) is None


def test_a_copy_without_history_can_be_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CET_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert host.commit(tmp_path) is None
    monkeypatch.setenv("CET_COMMIT", "abc")
    assert host.commit(tmp_path) == "abc"


def test_versions_and_threads_are_those_of_this_process() -> None:
    assert host.versions(["torch", "no-such-package"]) == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": metadata.version("torch"),
        "no-such-package": None,
    }
    facts = host.host_facts()
    assert facts["threads"] == torch.get_num_threads()
    assert int(facts["cores"]) >= 1
    assert facts["processor"]


def test_measuring_imports_nothing_of_the_package_but_itself() -> None:
    for file in Path(host.__file__).parent.glob("*.py"):
        nodes = [*ast.walk(ast.parse(file.read_text()))]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert {name for name in names if name.split(".")[0] == "cet"} <= {
            "cet.measure.rounds",
            "cet.measure.statistics",
            "cet.measure.timers",
        }, file


def test_missing_packages_are_named_with_the_command_that_installs_them() -> None:
    host.require("this test", ["torch", "numpy"], extra="demo")
    with pytest.raises(ModuleNotFoundError, match=r"this test needs a-b and c-d; pip install 'cet\[demo\]'"):
        host.require("this test", ["torch", "a-b", "c-d"], extra="demo")
