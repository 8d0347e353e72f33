"""cet: consistent early exit for PyTorch classifiers."""

from cet import ops
from cet.early_exit import EarlyExit, ExitOutput, load
from cet.heads import ExitHead, HeadSpec
from cet.objective import ConsistentExitLoss
from cet.policy import ExitPolicy
from cet.stages import CutError, Stages

__all__ = [
    "ConsistentExitLoss",
    "CutError",
    "EarlyExit",
    "ExitHead",
    "ExitOutput",
    "ExitPolicy",
    "HeadSpec",
    "Stages",
    "load",
    "ops",
]
