"""Facts about the host that go with every result: processor, cores, threads, platform, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path


def host_facts() -> dict[str, str | int]:
    """The platform, the processor, the number of usable cores and the number of torch's threads."""
    import torch  # exported models look up what is installed in processes without torch

    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of Python under ``"python"``, and of each distribution, ``None`` where it is not installed."""
    return {"python": platform.python_version(), **{package: installed_version(package) for package in packages}}


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; ``None`` when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require(what: str, packages: Sequence[str], *, extra: str) -> None:
    """Refuse to go on without packages of an extra.

    Raises:
        ModuleNotFoundError: when one is not installed, with the command that installs it.
    """
    missing = [package for package in packages if installed_version(package) is None]
    if missing:
        raise ModuleNotFoundError(f"{what} needs {' and '.join(missing)}; pip install 'cet[{extra}]'")


def commit(folder: Path) -> str | None:
    """The commit that is checked out around a folder, with ``-dirty`` behind it if tracked files were changed.

    The environment variable ``CET_COMMIT`` names the commit of a copy without its history. The result is ``None`` where
    neither it nor git knows.
    """
    if named := os.environ.get("CET_COMMIT"):
        return named
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
