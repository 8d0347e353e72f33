"""Reads a saved model back into a backbone of the same architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cet.model.building import check_backbone
from cet.model.checkpoint import kinds_of, like, plain_tensors, read_checkpoint
from cet.model.early_exit import EarlyExit
from cet.model.heads import ExitHead
from cet.partition.inputs import InputFormat
from cet.runtime.policy import ExitPolicy


def load(
    path: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    heads: Mapping[str, nn.Module] | None = None,
) -> EarlyExit:
    """Read what :meth:`EarlyExit.save` wrote, into a backbone of the same architecture.

    Args:
        path: the file.
        backbone: a module whose parameters and buffers have the names and shapes of the saved ones; they are
            overwritten.
        heads: the modules of those exits whose heads were the user's own, by exit path.

    Returns:
        The model in eval mode, with its policy.

    Raises:
        ValueError: when the file is damaged or of another kind, or backbone or heads differ from the saved ones; the
            differences are named and ``backbone`` is unchanged.
        OSError: when the file cannot be read.
    """
    check_backbone(backbone)
    tensors, description = read_checkpoint(path)
    weight = next(backbone.parameters(), None)
    try:
        with torch.random.fork_rng(devices=[]):
            saved_heads = {name: head and ExitHead(**head) for name, head in description["heads"].items()}
            example = InputFormat.example_from(description["inputs"], weight)
        policy = ExitPolicy(**description["policy"])
        policy.check_num_exits(len(saved_heads) + 1)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: its header cannot be read ({error}); save it again") from error
    exits = _with_own_heads(path, saved_heads, heads or {})
    wanted = {"backbone." + name: value for name, value in backbone.state_dict().items()}
    for index, head in enumerate(exits.values()):
        wanted |= {f"heads.{index}.{name}": value for name, value in head.state_dict().items()}
    _check_same_kinds(path, kinds_of(wanted), description.get("kinds", {}))
    _check_same_tensors(path, plain_tensors(wanted), tensors)
    _check_one_value_each(path, plain_tensors(wanted), tensors)
    if weight is not None:
        for head in exits.values():
            head.to(device=weight.device, dtype=weight.dtype)
    model = EarlyExit(backbone, exits, example)
    model.load_state_dict(like(wanted, tensors))
    model.policy = policy
    return model.eval()


def _with_own_heads(
    path: str | os.PathLike[str], saved: Mapping[str, nn.Module | None], own: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The heads of all exits: those that the file describes, and the user's own for the others."""
    wanted = [name for name, head in saved.items() if head is None]
    for name in wanted:
        if name not in own:
            raise ValueError(
                f"{path}: the head of exit {name!r} was a module of your own; pass it as heads={{{name!r}: ...}}"
            )
    for name in own:
        if name not in wanted:
            raise ValueError(f"{path} asks for no head of exit {name!r}; leave it out of heads")
    return {name: own[name] if head is None else head for name, head in saved.items()}


def _check_one_value_each(path: Any, wanted: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot hold what was saved: those that are one, for values that differ, and expanded ones."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in wanted.items():
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise ValueError(
                f"{path} cannot be read into {name}, whose elements share memory as those of an expanded tensor do; "
                "register a copy of it, as .contiguous() makes one"
            )
        if not tensor.numel() or tensor.is_meta:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        other = first.setdefault(place, name)
        if other != name and not torch.equal(saved[name].nan_to_num(), saved[other].nan_to_num()):
            raise ValueError(
                f"{path} has other values for {name} than for {other}, which are one tensor in the model; untie them, "
                "as they were when it was saved"
            )


def _check_same_kinds(path: Any, wanted: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Refuse weights that were quantised in another way than those of the file."""
    for name in sorted(wanted.keys() | saved.keys()):
        here, there = wanted.get(name, "a plain tensor"), saved.get(name, "a plain tensor")
        if here != there:
            raise ValueError(
                f"{path} has {name} as {there} and the model as {here}; quantise the backbone as it was when saved"
            )


def _check_same_tensors(path: Any, wanted: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    missing = [f"{name} is not in the file" for name in wanted.keys() - saved.keys()]
    surplus = [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
    reshaped = [
        f"{name} is {tuple(saved[name].shape)} in the file and {tuple(wanted[name].shape)} in the model"
        for name in wanted.keys() & saved.keys()
        if saved[name].shape != wanted[name].shape
    ]
    differences = sorted(missing + surplus + reshaped)
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"{path} was saved from another architecture: {'; '.join(differences[:4])}{more}; "
            "pass the backbone that it was saved from"
        )
