"""The file format of a saved model: safetensors, with everything else as JSON in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from cet.files import write_atomically as write_atomically

FORMAT = "cet-early-exit"
FORMAT_VERSION = 1


def write_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write one file, atomically: readers see the old file or the new one, whatever happens.

    Raises:
        OSError: when it cannot be written.
    """
    header = {"format": FORMAT, "version": FORMAT_VERSION, "torch": torch.__version__, **description}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, and a checkpoint holds tensors only; leave it out")
    # Tied weights share storage, which safetensors refuses, so each tensor is written as a copy.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, to_bytes(plain, metadata={"cet": json.dumps(header)}))


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description that :func:`write_checkpoint` wrote.

    Raises:
        ValueError: when the file is damaged or of another kind or a newer version.
        OSError: when it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)} is no file; give the path that EarlyExit.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("cet", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged or no safetensors file ({error}); save it again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)} was not written by EarlyExit.save; give a file that was")
    version = header.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{os.fspath(path)} has format {version}, and this cet reads up to {FORMAT_VERSION}; update it"
        )
    return tensors, header
