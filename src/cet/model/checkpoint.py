"""The file format of a saved model: safetensors, with everything else as JSON in its header."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cet.files import write_atomically as write_atomically

FORMAT = "cet-early-exit"
FORMAT_VERSION = 1


def write_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write one file, atomically: readers see the old file or the new one, whatever happens.

    Raises:
        OSError: when it cannot be written.
        TypeError: for what is no tensor, and for parts of a tensor that several processes hold.
    """
    header = {"format": FORMAT, "version": FORMAT_VERSION, "torch": torch.__version__, **description}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, and a checkpoint holds tensors only; leave it out")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name} is in parts on several devices; save a model whose weights are gathered")
    if kinds := kinds_of(tensors):
        header["kinds"] = kinds
    # Tied weights share storage, which safetensors refuses, so each tensor is written as a copy.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in plain_tensors(tensors).items()}
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


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and in the place of those that are made of others, as torchao's quantised ones, these: ``weight`` is
    ``weight:qdata`` and ``weight:scale``."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            plain |= plain_tensors({f"{name}:{part}": getattr(tensor, part) for part in names})
        else:
            plain[name] = tensor
    return plain


def like(wanted: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors made of these plain ones as those that are wanted are; the inverse of :func:`plain_tensors`."""
    return {name: _made(tensor, name, plain) for name, tensor in wanted.items()}


def _made(wanted: Tensor, name: str, plain: Mapping[str, Tensor]) -> Tensor:
    if not is_traceable_wrapper_subclass(wanted):
        return plain[name]
    names, context = wanted.__tensor_flatten__()
    parts = {part: _made(getattr(wanted, part), f"{name}:{part}", plain) for part in names}
    made: Tensor = type(wanted).__tensor_unflatten__(parts, context, wanted.shape, wanted.stride())
    return made


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor that is made of others their class, with what it knows besides them."""
    kinds: dict[str, str] = {}
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            _, context = tensor.__tensor_flatten__()
            kinds[name] = re.sub(r" at 0x[0-9a-f]+", "", f"{type(tensor).__name__} {context}")
    return kinds
