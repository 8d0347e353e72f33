"""The checks and the parts that make an :class:`cet.EarlyExit` out of a backbone and its exits."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cet.callers import level_of_caller
from cet.model.heads import ExitHead, HeadSpec
from cet.model.masks import find_mask, looks_like_mask, real_positions, resampler_of, stride_of
from cet.partition.fingerprint import Fingerprint
from cet.partition.inputs import InputFormat
from cet.partition.private_copy import private_copy
from cet.partition.stages import evaluating, logits_of
from cet.runtime.exits import head_logits

Heads = Mapping[str, nn.Module | HeadSpec | None]


def check_backbone(backbone: Any) -> nn.Module:
    """Refuse what cannot be a backbone.

    Raises:
        TypeError: naming what it is, and what to give instead.
    """
    kind = type(backbone).__name__
    if isinstance(backbone, (torch.export.ExportedProgram, torch.jit.ScriptModule)):
        how = "exported" if isinstance(backbone, torch.export.ExportedProgram) else "scripted or traced"
        raise TypeError(
            f"backbone is {how} ({kind}), which hides its submodules; give the module that it was made from"
        )
    if isinstance(backbone, torch.fx.GraphModule) and "eval" in backbone.__dict__:
        raise TypeError("backbone is the module of an exported program, which has no modes; give the original module")
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone is {kind}; give an nn.Module")
    for path, module in backbone.named_modules():
        if "_orig_mod" in module._modules:
            what = f"submodule {path!r}" if path else "backbone"
            raise TypeError(
                f"{what} is compiled, which hides what is in it; give the module itself, and compile the whole model: "
                "torch.compile(model)"
            )
    if isinstance(backbone, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"backbone is inside {kind}; give its .module, and put the cet.EarlyExit inside {kind}")
    return backbone


def requested_heads(exits: Sequence[str] | Heads) -> dict[str, nn.Module | HeadSpec | None]:
    """The exits by path, each with the head that was asked for.

    Raises:
        TypeError, ValueError: for exits that are no paths, repeated or none.
    """
    if isinstance(exits, str):
        raise TypeError(f"exits is the string {exits!r}; give a list of submodule paths")
    if not isinstance(exits, Iterable):
        raise TypeError(f"exits is {exits!r}; give a list of submodule paths")
    requested: dict[str, nn.Module | HeadSpec | None] = {}
    for path in exits:
        if not isinstance(path, str):
            raise TypeError(f"exits holds {path!r}; give submodule paths as strings")
        if path in requested:
            raise ValueError(f"exit {path!r} is repeated; name each submodule once")
        head = exits[path] if isinstance(exits, Mapping) else None
        if not (head is None or isinstance(head, (nn.Module, HeadSpec))):
            raise TypeError(f"exit {path!r} has the head {head!r}; give an nn.Module, a cet.HeadSpec or None")
        requested[path] = head
    if not requested:
        raise ValueError("exits is empty; name at least one submodule after which a sample may leave")
    return requested


def submodule(backbone: nn.Module, path: str) -> nn.Module:
    """The submodule of an exit.

    Raises:
        ValueError: naming near misses where there is none.
    """
    try:
        if path:
            return backbone.get_submodule(path)
    except AttributeError:
        pass
    known = [name for name, _ in backbone.named_modules() if name]
    close = difflib.get_close_matches(path, known, n=3) or known[:3]
    raise ValueError(
        f"exit {path!r} is no submodule of {type(backbone).__name__}; did you mean {' or '.join(map(repr, close))}?"
    )


def refuse_second_names(paths: Iterable[str], modules: Sequence[nn.Module]) -> None:
    """Refuse two exits that are one module."""
    first: dict[nn.Module, str] = {}
    for path, module in zip(paths, modules, strict=True):
        if first.setdefault(module, path) != path:
            raise ValueError(
                f"exit {path!r} and exit {first[module]!r} are two names of one module, which does not say where to "
                "leave; keep one of them"
            )


def check_logits(logits: Tensor, num_rows: int) -> None:
    """Refuse an output that holds no logits.

    Raises:
        ValueError: with the way out.
    """
    if logits.ndim != 2 or logits.shape[0] != num_rows or logits.shape[1] < 2:
        more = "; for a label per position or pixel there is no early exit" if logits.ndim > 2 else ""
        raise ValueError(
            f"the backbone returns logits of shape {tuple(logits.shape)} for {num_rows} rows; it must return "
            f"(B, K) with at least two classes{more}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"the backbone returns {logits.dtype}; it must return logits of a floating dtype")
    values = logits.detach().float()
    sums = values.sum(dim=1)
    if bool(((values > 0) & (values < 1)).all()) and bool((sums - 1).abs().lt(1e-3).all()):
        raise ValueError(
            "the backbone returns probabilities, as of a softmax, where early exits return logits; leave the softmax "
            "out, and apply it to what the model returns"
        )


def check_train_output(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a backbone that returns more than logits in train mode, as those with auxiliary classifiers do."""
    trial = private_copy(backbone).train()
    for module in trial.modules():
        module._buffers = {
            name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
        }
    devices = sorted({t.device.index or 0 for t in backbone.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            output = trial(*args, **kwargs)
        except Exception:  # its own business: it shows, with its own message, once it is trained
            return
    try:
        logits = logits_of(output)
    except TypeError as error:
        raise TypeError(f"in train mode {error}; switch auxiliary outputs off") from None
    if logits.ndim != 2:
        raise ValueError(
            f"in train mode the backbone returns a tensor of shape {tuple(logits.shape)}; it must return logits (B, K) "
            "in both modes"
        )


def build_head(
    head: nn.Module | HeadSpec | None,
    path: str,
    module: nn.Module,
    features: Tensor,
    num_classes: int,
    backbone: nn.Module,
    input_format: InputFormat,
) -> nn.Module:
    """The head of one exit, for features like ``features``.

    Raises:
        ValueError: for features that it cannot pool, logits of another shape, or a head that mixes rows.
    """
    if not isinstance(head, nn.Module):
        built = (head or HeadSpec()).build(path, module, features, num_classes)
        _attach_mask(built, (head or HeadSpec()).mask, path, features, backbone, input_format)
        _warn_of_opposite_mask(built.spec.mask, path, input_format)
        return built
    if isinstance(head, ExitHead) and head.spec.mask:
        _attach_mask(head, head.spec.mask, path, features, backbone, input_format)
        return head
    with evaluating(head):
        check_head(head, path, features, num_classes, None)
    return head


def check_head(head: nn.Module, path: str, features: Tensor, num_classes: int, mask: Tensor | None) -> None:
    """Refuse a head that does not give logits ``(B, num_classes)``, each row's on its own, or changes its features.

    Raises:
        ValueError: naming the exit.
    """
    for module in head.modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"the head of exit {path!r} normalises by the statistics of the batch, as it is in train mode; call "
                "model.eval()"
            )
    version = features._version
    try:
        logits = head_logits(head, features, mask)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the head of exit {path!r} fails on its features of shape {tuple(features.shape)}: {error}"
        ) from error
    expected = (features.shape[0], num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the head of exit {path!r} gives {got}; it must give logits of shape {expected}")
    if features._version != version:
        raise ValueError(f"the head of exit {path!r} changes its features in place; change a copy instead")
    with torch.no_grad():
        rows = range(len(features))
        alone = torch.cat(
            [head_logits(head, features[r : r + 1], None if mask is None else mask[r : r + 1]) for r in rows]
        )
        again = head_logits(head, features, mask)
    size = 1e-2 * float(logits.detach().abs().nan_to_num().max())
    is_random = not torch.allclose(again, logits, rtol=1e-2, atol=size, equal_nan=True)
    if not is_random and not torch.allclose(alone, logits, rtol=1e-2, atol=size, equal_nan=True):
        raise ValueError(
            f"the head of exit {path!r} mixes the rows of a batch; compute the logits of each row on its own"
        )


class CheckedHeads:
    """The state in which the heads of a model were checked last; a copy of it has checked nothing."""

    def __init__(self) -> None:
        self._state: Fingerprint | None = None

    def __deepcopy__(self, memo: Any) -> CheckedHeads:
        return CheckedHeads()

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckedHeads, ()

    def are_current(self, heads: nn.Module) -> bool:
        """Whether the heads are certainly as they were; takes microseconds."""
        if self._state is None:
            return False
        if self._state.is_current():
            return True
        state = Fingerprint(heads, structure_only=True)
        if self._state.matches(state):
            self._state = state
            return True
        return False

    def accept(self, heads: nn.Module) -> None:
        """Take the heads as they are for checked."""
        self._state = Fingerprint(heads, structure_only=True)


def _attach_mask(
    head: ExitHead,
    wanted: str | bool | None,
    path: str,
    features: Tensor,
    backbone: nn.Module,
    input_format: InputFormat,
) -> None:
    """Tell a head which input is its mask.

    Raises:
        ValueError: for a mask that was asked for and is no input, or does not fit the features.
    """
    names, example = input_format.names, input_format.example
    if wanted is False or (wanted is None and (features.ndim != 3 or head.spec.pool != "mean")):
        return
    name = find_mask(names, example) if wanted is None else str(wanted)
    if name is None:
        return
    if name not in names:
        raise ValueError(f"the mask {name!r} of exit {path!r} is no input; name one of {', '.join(names)}")
    given = example[names.index(name)]
    positions = features.shape[2 if head.spec.layout == "channels_first" else 1] if features.ndim == 3 else 0
    fits = (
        features.ndim == 3 and isinstance(given, Tensor) and given.shape[:1] == features.shape[:1] and given.ndim <= 2
    )
    resampler = resampler_of(backbone) if fits and given.ndim == 2 and given.shape[1] != positions else None
    if fits and resampler is None:
        stride = stride_of(given, positions)
        head.mask_stride = stride
        fits = real_positions(name, given, positions, stride).shape[1] == positions
        fits = fits and (given.ndim == 1 or positions <= given.shape[1])
    if not fits:
        if wanted is not None:
            raise ValueError(
                f"the mask {name!r} of exit {path!r} does not fit its features of shape {tuple(features.shape)}; give "
                "one entry for each position, or mask=False"
            )
        return
    head.spec = replace(head.spec, mask=name)
    head.resampler = resampler


def _warn_of_opposite_mask(name: str | Literal[False] | None, path: str, input_format: InputFormat) -> None:
    if not name:
        return
    given: Tensor = input_format.example[input_format.names.index(name)]
    if not (given if given.ndim == 1 else real_positions(name, given, given.shape[1], 1).any(1)).all():
        warnings.warn(
            f"the mask {name!r} of exit {path!r} leaves nothing real in some row of example_inputs; cet.HeadSpec tells "
            "what a mask of that name means: name it padding_mask, or give its opposite, where it is true at padding",
            stacklevel=level_of_caller(),
        )


def warn_of_unused_masks(
    requested: Heads, heads: Sequence[nn.Module], features: Sequence[Tensor], input_format: InputFormat
) -> list[str]:
    """Name the inputs that look like masks, with the exits that average or see all positions regardless.

    Returns:
        Those exits.
    """
    without = []
    for (path, asked), head, feature in zip(requested.items(), heads, features, strict=True):
        own = isinstance(asked, nn.Module) and not isinstance(asked, ExitHead)
        averages = isinstance(head, ExitHead) and not head.spec.mask and head.spec.pool == "mean"
        undecided = asked is None or (isinstance(asked, HeadSpec) and asked.mask is None)
        if feature.ndim > 2 and (own or (averages and undecided)):
            without.append(path)
    for name, value in zip(input_format.names, input_format.example, strict=True):
        if without and isinstance(value, Tensor) and looks_like_mask(name):
            warn_of_unused_mask(name, without)
    return without


def warn_of_unused_mask(name: str, exits: Sequence[str]) -> None:
    """Tell of an input that looks like a mask and that the heads of some exits do not get."""
    warnings.warn(
        f"input {name!r} looks like a mask, but the heads of {', '.join(map(repr, exits))} do not get it, so that "
        f"padding counts; give cet.HeadSpec(mask={name!r}) for each with an example that has it, or mask=False",
        stacklevel=level_of_caller(),
    )
