"""cet: consistent early exit for PyTorch classifiers.

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cet import energy, ops, perturb
    from cet.calibration import Calibration, CalibrationReport, calibrate
    from cet.cost import ExitCosts, exit_costs
    from cet.early_exit import EarlyExit, ExitOutput, load
    from cet.heads import ExitHead, HeadSpec
    from cet.objective import ConsistentExitLoss
    from cet.policy import ExitPolicy
    from cet.stages import CutError, Stages

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationReport",
    "ConsistentExitLoss",
    "CutError",
    "EarlyExit",
    "ExitCosts",
    "ExitHead",
    "ExitOutput",
    "ExitPolicy",
    "HeadSpec",
    "Stages",
    "calibrate",
    "energy",
    "exit_costs",
    "load",
    "ops",
    "perturb",
]

_MODULE_OF = {
    "Calibration": "calibration",
    "CalibrationReport": "calibration",
    "ConsistentExitLoss": "objective",
    "CutError": "stages",
    "EarlyExit": "early_exit",
    "ExitCosts": "cost",
    "ExitHead": "heads",
    "ExitOutput": "early_exit",
    "ExitPolicy": "policy",
    "HeadSpec": "heads",
    "Stages": "stages",
    "calibrate": "calibration",
    "exit_costs": "cost",
    "load": "early_exit",
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
