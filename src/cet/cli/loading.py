"""What `--model`, `--backbone` and `--data` name."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from torch import nn
from torch.utils import _pytree as pytree

import cet
from cet.cli.errors import LoadError, NoSuchExitError, one_sentence
from cet.cli.parameters import is_checkpoint
from cet.data.batches import check_batch
from cet.energy.workloads import Batch


def torch_device(name: str | None) -> torch.device | None:
    """Where to run; ``None`` where the model is.

    Raises:
        click.BadParameter: for a device on which torch cannot compute.
    """
    if name is None:
        return None
    try:
        number = torch.zeros(1, device=name)
        number.item()  # which a device that only pretends, such as meta, has not
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(
            f"torch, which sees {torch.cuda.device_count()} GPUs, cannot compute on {name!r}; give cpu or cuda:INDEX.",
            param_hint="--device",
        ) from error
    return number.device


def load_model(spec: str, backbone: str | None, device: torch.device | None) -> nn.Module:
    """The model in eval mode.

    Args:
        spec: ``module:name`` of a module or of a function without arguments that returns one, or the path of a
            checkpoint that :meth:`cet.EarlyExit.save` wrote.
        backbone: ``module:name`` of the backbone, which a checkpoint needs.
        device: where to move the model; ``None`` leaves it where it is.

    Raises:
        LoadError: when it cannot be loaded.
    """
    if is_checkpoint(spec):
        if not Path(spec).is_file():
            raise LoadError(f"{spec} is not there; give the file of a checkpoint, or MODULE:NAME")
        if backbone is None:
            raise LoadError(f"{spec} is a checkpoint, which holds no code; name its backbone by --backbone MODULE:NAME")
        try:
            model: nn.Module = cet.load(spec, _module(backbone))
        except (OSError, ValueError) as error:
            raise LoadError(one_sentence(error)) from error
    elif ":" in spec:
        model = _module(spec)
    else:
        raise LoadError(f"{spec!r} is neither MODULE:NAME, such as mynet:build, nor the file of a checkpoint")
    return model.to(device).eval()


def load_early_exit(
    spec: str, backbone: str | None, device: torch.device | None, exits: Sequence[str]
) -> cet.EarlyExit:
    """As :func:`load_model`, a model that has the early exits ``exits``.

    Raises:
        LoadError: when it cannot be loaded, or is something else.
        NoSuchExitError: for an early exit that it has not.
    """
    model = load_model(spec, backbone, device)
    if not isinstance(model, cet.EarlyExit):
        raise LoadError(f"{spec} gives {type(model).__name__}; give a cet.EarlyExit, or a checkpoint of one")
    early = model.exit_names[:-1]
    for name in exits:
        if name not in early:
            raise NoSuchExitError(f"the model has no early exit {name!r}; give one of {', '.join(early)}")
    return model


def load_data(spec: str, samples: int, num_classes: int | None) -> Batch:
    """The first samples of labelled data as one batch.

    Args:
        spec: ``module:name`` of an iterable of batches ``(x, y)``, or of a function without arguments that returns one.
        samples: how many to take at most.
        num_classes: the labels' upper bound; None when not known.

    Raises:
        LoadError: when it cannot be loaded, holds no sample, or holds something else than labelled batches.
    """
    loader = made(spec)
    if not isinstance(loader, Iterable):
        raise LoadError(f"--data {spec} gives {type(loader).__name__}; it must give an iterable of batches (x, y)")
    parts: list[Batch] = []
    rows = 0
    try:
        for batch in loader:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(f"a batch is {type(batch).__name__}; give pairs (x, y)")
            x, y = batch
            rows += check_batch(x, y, num_classes)
            parts.append((x, y))
            if rows >= samples:
                break
    except (Exception, SystemExit) as error:  # whatever the user's own iterable raises
        raise LoadError(f"--data {spec}: {one_sentence(error)}") from error
    if rows == 0:
        raise LoadError(f"--data {spec} gives no sample; give at least one batch (x, y)")
    return _joined(spec, parts, samples)


def _joined(spec: str, parts: list[Batch], samples: int) -> Batch:
    try:
        joined: Batch = pytree.tree_map(lambda *leaves: torch.cat(leaves)[:samples], *parts)
    except (RuntimeError, TypeError, ValueError) as error:
        raise LoadError(f"--data {spec} gives batches that do not fit together ({one_sentence(error)})") from error
    return joined


def _module(spec: str) -> nn.Module:
    module = made(spec)
    if not isinstance(module, nn.Module):
        raise LoadError(f"{spec} gives {type(module).__name__}; it must give a torch.nn.Module")
    return module


def made(spec: str) -> Any:
    """What ``module:name`` is, or what it returns when it is a function."""
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise LoadError(f"{spec!r} is not MODULE:NAME, such as mynet:build")
    if os.sep in module or module.endswith(".py"):
        raise LoadError(f"{spec} names a file; write its module as import does, {Path(module).stem}:{name}")
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = import_module(module)
        for part in name.split("."):
            if not hasattr(value, part):
                raise ValueError(_no_such_name(value, part))
            value = getattr(value, part)
        return value() if callable(value) and not isinstance(value, nn.Module) else value
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise LoadError(f"{spec} cannot be loaded: {one_sentence(error)}") from error


def _no_such_name(owner: Any, name: str) -> str:
    what = f"module {owner.__name__}" if isinstance(owner, ModuleType) else type(owner).__name__
    close = difflib.get_close_matches(name, dir(owner), n=1)
    return f"{what} has no {name!r}; " + (f"did you mean {close[0]!r}?" if close else "give a name that it has")
