"""Training of multi-exit models, and the data, net and recipes of the demonstration.

Names are imported when they are first used: only the Lightning module and the recipes need the extra ``cet[train]``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cet.data.smartwatch import Split, Windows, find_dataset, load_windows, split_by_person
    from cet.training.heads import train_heads
    from cet.training.lightning import MultiExitTraining
    from cet.training.recipes import (
        AUGMENTATION,
        CONSISTENT,
        JOINT,
        NOISY_LABELS,
        RECIPES,
        Recipe,
        build,
        perturbation,
        train,
    )
    from cet.training.sampling import LabelledShare
    from cet.training.sensor_net import EXITS, SensorNet

__all__ = [
    "AUGMENTATION",
    "CONSISTENT",
    "EXITS",
    "JOINT",
    "NOISY_LABELS",
    "RECIPES",
    "LabelledShare",
    "MultiExitTraining",
    "Recipe",
    "SensorNet",
    "Split",
    "Windows",
    "build",
    "find_dataset",
    "load_windows",
    "perturbation",
    "split_by_person",
    "train",
    "train_heads",
]

_MODULE_OF = {
    **dict.fromkeys(("Split", "Windows", "find_dataset", "load_windows", "split_by_person"), "cet.data.smartwatch"),
    "LabelledShare": "cet.training.sampling",
    "MultiExitTraining": "cet.training.lightning",
    **dict.fromkeys(("EXITS", "SensorNet"), "cet.training.sensor_net"),
    "train_heads": "cet.training.heads",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cet.training' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF.get(name, "cet.training.recipes")), name)
    return value


def __dir__() -> list[str]:
    return __all__
