"""What can run here: backends, runners, installed extras; and for what is missing, why and the fix."""

from __future__ import annotations

import re
from importlib import metadata

import torch
from torch import nn

import cet
from cet.cli.doctor.finding import Finding
from cet.measure.host import installed_version
from cet.ops.backend import cuda_extension, interprets_triton, kernels
from cet.runtime.cuda_graphs import why_no_switch

GPU_FIX = "install a PyTorch that is built for CUDA, on a machine with an NVIDIA GPU and its driver"


def backends() -> list[Finding]:
    """What can run the operations, by the names that :class:`cet.ops.use_backend` takes."""
    return [_reference(), _compiled_extension(), _triton()]


def runners() -> list[Finding]:
    """What can run batches, by the names that ``EarlyExit(..., runner=...)`` takes."""
    eager = Finding("eager", True, "any device; runs where nothing else is asked for")
    no_device = _no_cuda_device()
    if no_device:
        built = f"cet is installed {'with' if cuda_extension() else 'without'} its CUDA extension"
        device = Finding("device", False, f"{no_device}; {built}", GPU_FIX)
        return [eager, Finding("graphs", False, no_device, GPU_FIX), device]
    devices = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    graphs = Finding("graphs", True, f"{devices}; where asked for")
    reason, _, fix = (why_no_switch() or "").partition("; ")
    return [eager, graphs, Finding("device", not reason, reason or graphs.detail, fix or None)]


def extras() -> list[Finding]:
    """The optional dependencies of cet, by the name under which pip installs them."""
    findings = []
    for extra, packages in _extra_packages().items():
        versions = {package: installed_version(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        if missing:
            findings.append(
                Finding(extra, False, f"not installed: {', '.join(missing)}", f"pip install 'cet[{extra}]'")
            )
        else:
            findings.append(Finding(extra, True, ", ".join(f"{p} {v}" for p, v in versions.items())))
    return findings


def _reference() -> Finding:
    where = f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU thread(s)"
    try:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model = cet.EarlyExit(net, ["0"], (torch.zeros(2, 4),)).eval()
        model.policy = cet.ExitPolicy(thresholds=(float("inf"),))
        left = model.predict(torch.zeros(3, 4)).exit_index.tolist()
    except Exception as error:  # whatever fails, a diagnosis must come out
        fix = None if isinstance(error, ValueError) else "install a supported PyTorch"
        return Finding("reference", False, f"{where}: {type(error).__name__}: {error}", fix)
    if left != [0, 0, 0]:
        return Finding("reference", False, f"{where}: a batch of 3 left at exits {left}", "install a supported PyTorch")
    return Finding("reference", True, f"{where}; a small net ran")


def _compiled_extension() -> Finding:
    try:
        built = kernels()
    except ValueError as error:
        return Finding("cpp", False, str(error))
    if built is None:
        fix = "install cet again where a C++17 compiler is, with CET_BUILD_CPP=1 to see why it fails"
        return Finding("cpp", False, "installed without the compiled kernels; the reference serves", fix)
    return Finding("cpp", True, f"compiled kernels for the CPU, with {built.capability} instructions")


def _triton() -> Finding:
    version = installed_version("triton")
    if version is None:
        return Finding("triton", False, "the package triton is not installed", "pip install triton")
    if interprets_triton():
        return Finding("triton", True, f"triton {version} interprets its kernels (TRITON_INTERPRET): right, but slow")
    no_device = _no_cuda_device()
    if no_device:
        return Finding("triton", False, f"kernels for triton {version}; {no_device}", GPU_FIX)
    return Finding("triton", True, f"kernels for triton {version}; they serve after cet.ops.use_backend('triton')")


def _no_cuda_device() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return f"PyTorch, built for CUDA {torch.version.cuda}, finds no usable device"
    return None


def _extra_packages() -> dict[str, list[str]]:
    """Distribution names per extra, read off cet's own metadata; an extra may include an extra declared before it."""
    packages: dict[str, list[str]] = {}
    for requirement in metadata.requires("cet") or ():
        match = re.fullmatch(r"([\w.-]+)(?:\[([\w-]+)\])?[^;]*;\s*extra == ['\"]([\w-]+)['\"]", requirement)
        if match is not None:
            package, of_package, extra = match.groups()
            packages.setdefault(extra, []).extend(packages[of_package] if package == "cet" else [package])
    return packages
