"""cet: consistent early exit for PyTorch classifiers.

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cet import energy, ops, perturb
    from cet.calibration.calibrate import Calibration, calibrate
    from cet.calibration.cost import ExitCosts, exit_costs
    from cet.calibration.report import CalibrationReport
    from cet.model.check import AnswerMismatchError
    from cet.model.early_exit import EarlyExit
    from cet.model.heads import ExitHead, HeadSpec
    from cet.model.loading import load
    from cet.model.output import ExitOutput, Explanation
    from cet.partition.cache import UncutWarning
    from cet.partition.stages import CutError, Stages
    from cet.runtime.policy import ExitPolicy
    from cet.training.heads import train_heads
    from cet.training.loss import ConsistentExitLoss

__version__ = "0.1.0"

__all__ = [
    "AnswerMismatchError",
    "Calibration",
    "CalibrationReport",
    "ConsistentExitLoss",
    "CutError",
    "EarlyExit",
    "ExitCosts",
    "ExitHead",
    "ExitOutput",
    "ExitPolicy",
    "Explanation",
    "HeadSpec",
    "Stages",
    "UncutWarning",
    "calibrate",
    "energy",
    "exit_costs",
    "load",
    "ops",
    "perturb",
    "train_heads",
]

_MODULE_OF = {
    "AnswerMismatchError": "model.check",
    "Calibration": "calibration",
    "CalibrationReport": "calibration",
    "ConsistentExitLoss": "training.loss",
    "CutError": "partition.stages",
    "EarlyExit": "model.early_exit",
    "ExitCosts": "calibration",
    "ExitHead": "model.heads",
    "ExitOutput": "model.output",
    "ExitPolicy": "runtime.policy",
    "Explanation": "model.output",
    "HeadSpec": "model.heads",
    "Stages": "partition.stages",
    "UncutWarning": "partition.cache",
    "calibrate": "calibration",
    "exit_costs": "calibration",
    "load": "model.loading",
    "train_heads": "training.heads",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cet' has no attribute {name!r}")
    if name not in _MODULE_OF:
        return import_module(f"cet.{name}")
    value = globals()[name] = getattr(import_module(f"cet.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
