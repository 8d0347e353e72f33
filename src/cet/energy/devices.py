"""Which GPUs to measure: torch devices and ``CUDA_VISIBLE_DEVICES``, identified by UUID.

The index of a GPU in CUDA is not its index in NVML: CUDA sorts by speed unless ``CUDA_DEVICE_ORDER`` is
``PCI_BUS_ID``, and numbers the visible ones only (CUDA C++ Programming Guide, "CUDA Environment Variables").
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cet.energy.domains import DeviceSelectionError, MigError
from cet.energy.nvml import Gpu

if TYPE_CHECKING:  # measuring other programs needs no torch
    import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
_INDEX = re.compile(r"\+?[0-9]+")  # CUDA reads numbers as C's strtoul does
NO_MIG = "NVML has the joules of the whole GPU only, not those of a MIG instance; measure on a GPU without MIG"


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


class Visible(NamedTuple):
    """What ``CUDA_VISIBLE_DEVICES`` leaves.

    Attributes:
        gpus: those that CUDA programs see, in CUDA's order.
        ignored: why CUDA leaves entries out, as a sentence without a full stop; ``None`` where it takes them all.
    """

    gpus: list[Gpu]
    ignored: str | None = None


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> Visible:
    """The GPUs that CUDA programs see.

    CUDA reads the list up to the first entry that is no index of a GPU and no unique beginning of a UUID, so that a
    word such as ``NoDevFiles``, which SLURM writes, hides all; and it shows no GPU at all when one is named twice. What
    follows digits in an index is ignored, and a list that begins with a UUID ends at the first index.

    Args:
        gpus: all that NVML shows, in NVML's order.
        environ: where ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` are looked up.

    Raises:
        MigError: when one that is named is a MIG instance.
        DeviceSelectionError: when an index may mean another GPU to CUDA than to NVML.
    """
    value = environ.get(VISIBLE)
    if value is None:
        return Visible(list(gpus))
    entries = [entry.strip() for entry in value.split(",")] if value.strip() else []
    if any(entry.startswith("MIG") for entry in entries):
        raise MigError(f"{VISIBLE}={value}: {NO_MIG}")
    by_uuid = bool(entries) and entries[0].startswith("GPU-")
    by_index = bool(entries) and _INDEX.match(entries[0]) is not None
    if by_index and len({gpu.name for gpu in gpus}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        import torch

        if torch.cuda.is_available():
            return Visible([_by_torch(torch.device("cuda", index), gpus) for index in range(torch.cuda.device_count())])
        raise DeviceSelectionError(
            f"{VISIBLE}={value}: CUDA may number GPUs of different kinds otherwise than NVML; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs"
        )
    found: list[Gpu] = []
    for entry in entries:
        if by_uuid:
            meant = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        else:
            index = _INDEX.match(entry)
            meant = [gpu for gpu in gpus if index and gpu.index == int(index[0])]
        if len(meant) != 1:
            if entry.startswith("-"):  # the usual way to hide what follows
                return Visible(found)
            many = "more than one GPU" if meant else "no GPU"
            return Visible(found, f"{VISIBLE}={value} ends for CUDA before {entry!r}, which names {many}")
        if meant[0] in found:
            return Visible([], f"{VISIBLE}={value} names {meant[0].label} twice, and CUDA then shows no GPU")
        found += meant
    return Visible(found)


def gpu_of(device: torch.device, gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> Gpu:
    """The GPU behind a ``cuda`` device of torch, by UUID; where this torch has no CUDA, by what is visible.

    Raises:
        MigError: when the device is a MIG instance.
        DeviceSelectionError: when there is no such device.
    """
    import torch

    if torch.cuda.is_available():
        return _by_torch(device, gpus)
    visible = visible_gpus(gpus, environ).gpus
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
