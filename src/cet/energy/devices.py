"""Which GPUs to measure: torch devices and ``CUDA_VISIBLE_DEVICES``, told by UUID.

The index of a GPU in CUDA is not its index in NVML: CUDA sorts by speed unless ``CUDA_DEVICE_ORDER`` says
``PCI_BUS_ID``, and numbers the visible ones only (CUDA C++ Programming Guide, "CUDA Environment Variables").
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cet.energy.domains import DeviceSelectionError, MigError
from cet.energy.nvml import Gpu

if TYPE_CHECKING:  # measuring other programs needs no torch
    import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_MIG = "NVML knows the joules of the whole GPU only, not those of a MIG instance; measure on a GPU without MIG"


def checked_devices(devices: Sequence[torch.device | str]) -> tuple[torch.device, ...]:
    """The torch devices that are meant.

    Raises:
        ValueError: for what is no device, and for a device of a kind that has no energy counter here.
        TypeError: for one device instead of a sequence.
    """
    import torch

    if isinstance(devices, str | torch.device):
        raise TypeError(f"devices is {devices!r}; give a sequence of devices, such as [{str(devices)!r}]")
    try:
        found = tuple(dict.fromkeys(map(torch.device, devices)))
    except RuntimeError as error:
        raise ValueError(f"devices is {list(devices)}, which torch does not know; give cuda and cpu devices") from error
    for device in found:
        if device.type not in ("cuda", "cpu"):
            raise ValueError(
                f"device {str(device)!r} has no energy counter that can be read; give cuda and cpu devices"
            )
    return found


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA programs see, in CUDA's order.

    Args:
        gpus: all that NVML shows, in NVML's order.
        environ: where ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` are looked up.

    Raises:
        MigError: when one that is named is a MIG instance.
        DeviceSelectionError: when one that is named cannot be told.
    """
    value = environ.get(VISIBLE)
    if value is None:
        return list(gpus)
    entries = [entry.strip() for entry in value.split(",")] if value.strip() else []
    if "-1" in entries:  # the usual way to hide what follows
        entries = entries[: entries.index("-1")]
    kinds = {gpu.name for gpu in gpus}
    by_index = any(entry.isdecimal() for entry in entries)
    if by_index and len(kinds) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        import torch

        if torch.cuda.is_available():
            return [_by_torch(torch.device("cuda", index), gpus) for index in range(torch.cuda.device_count())]
        raise DeviceSelectionError(
            f"{VISIBLE}={value}: CUDA may number GPUs of different kinds otherwise than NVML; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs"
        )
    found = [_named(entry, value, gpus) for entry in entries]
    if len(set(found)) < len(found):
        raise DeviceSelectionError(f"{VISIBLE}={value} names a GPU twice, and CUDA then shows none; name each once")
    return found


def gpu_of(device: torch.device, gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> Gpu:
    """The GPU behind a ``cuda`` device of torch, by UUID; where this torch has no CUDA, by what is visible.

    Raises:
        MigError: when the device is a MIG instance.
        DeviceSelectionError: when there is no such device.
    """
    import torch

    if torch.cuda.is_available():
        return _by_torch(device, gpus)
    visible = visible_gpus(gpus, environ)
    index = device.index or 0
    if index >= len(visible):
        raise DeviceSelectionError(f"device {str(device)!r} does not exist; {len(visible)} GPU(s) are visible")
    return visible[index]


def _by_torch(device: torch.device, gpus: Sequence[Gpu]) -> Gpu:
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise DeviceSelectionError(
            f"device {str(device)!r} does not exist; torch sees {torch.cuda.device_count()} GPU(s)"
        )
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    for gpu in gpus:
        if gpu.uuid == uuid:
            return gpu
    if any(gpu.in_mig_mode() for gpu in gpus):
        raise MigError(f"device {str(device)!r}: {NO_MIG}")
    raise DeviceSelectionError(f"device {str(device)!r} is {uuid}, which NVML does not show")


def _named(entry: str, value: str, gpus: Sequence[Gpu]) -> Gpu:
    """The GPU that one entry of ``CUDA_VISIBLE_DEVICES`` means."""
    if entry.startswith("MIG"):
        raise MigError(f"{VISIBLE}={value}: {NO_MIG}")
    if entry.startswith("GPU-"):
        meant = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
        if len(meant) != 1:
            how = "no GPU" if not meant else "more than one GPU"
            raise DeviceSelectionError(
                f"{VISIBLE}={value}: {how} has a UUID that begins with {entry}; see nvidia-smi -L"
            )
        return meant[0]
    if not entry.isdecimal():
        raise DeviceSelectionError(f"{VISIBLE}={value}: {entry!r} is neither an index nor a UUID; see nvidia-smi -L")
    for gpu in gpus:
        if gpu.index == int(entry):
            return gpu
    raise DeviceSelectionError(f"{VISIBLE}={value}: there is no GPU {entry}; NVML shows {len(gpus)}")
