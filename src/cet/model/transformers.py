"""Exits in the models of Hugging Face transformers, found by their lists of layers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cet.model.early_exit import EarlyExit

_TOKENS, _SAMPLES = 16, 4000
"""Lengths of the examples that are made up, in tokens and in audio samples."""


def layer_paths(model: nn.Module, every: int) -> list[str]:
    """The paths of every ``every``-th layer of the longest list of layers, without the last layer.

    Raises:
        TypeError, ValueError: where that leaves no exit.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1 and len(module) > 1
    }
    if not lists or not hasattr(model, "config"):
        raise TypeError(
            f"{type(model).__name__} is no model of transformers with a list of layers; name its exits yourself: "
            "cet.EarlyExit(model, exits=[...], example_inputs=...)"
        )
    path = max(lists, key=lambda name: len(lists[name]))
    num_layers = len(lists[path])
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every is {every!r}; give a number of layers")
    if not 1 <= every < num_layers:
        raise ValueError(
            f"every is {every}, which leaves no exit among {num_layers} layers; give 1 to {num_layers - 1}"
        )
    return [f"{path}.{index}" for index in range(every - 1, num_layers - 1, every)]


def example_inputs_for(model: Any) -> dict[str, Tensor]:
    """Inputs of two rows for a model of text, images or audio, noise of the sizes that its config names.

    Raises:
        TypeError: for a model of another kind.
    """
    name, config = getattr(model, "main_input_name", None), model.config
    if name == "input_ids":
        ids = torch.arange(2 * _TOKENS).reshape(2, _TOKENS) % config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width)}
    elif name == "input_values" and hasattr(config, "conv_stride"):
        inputs = {
            "input_values": torch.randn(2, _SAMPLES),
            "attention_mask": torch.ones(2, _SAMPLES, dtype=torch.int64),
        }
    else:
        raise TypeError(f"no example can be made up for {type(model).__name__}; give example_inputs={{...}}")
    weight = next(model.parameters())
    return {
        key: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }


class SignedForward:
    """``forward`` of one model, under the signature of its backbone: trainers keep of a batch what that names."""

    def __init__(self, model: EarlyExit) -> None:
        self.model = model
        names = [*inspect.signature(model.backbone.forward).parameters, "labels"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        plain = dict.fromkeys(name for name in names if name not in ("args", "kwargs"))
        self.__signature__ = inspect.Signature([inspect.Parameter(name, keyword, default=None) for name in plain])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)
