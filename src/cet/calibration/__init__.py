"""Calibration: temperatures and thresholds from held-out samples, and what exits cost."""

from cet.calibration.calibrate import Calibration, calibrate, calibrate_scores
from cet.calibration.cost import ExitCosts, exit_costs
from cet.calibration.metrics import BoundedLoss
from cet.calibration.report import (
    CalibrationReport,
    Certificate,
    Claim,
    ClassReport,
    ExitReport,
    FrontPoint,
    drop_interval,
)
from cet.calibration.temperatures import fit_temperature

__all__ = [
    "BoundedLoss",
    "Calibration",
    "CalibrationReport",
    "Certificate",
    "Claim",
    "ClassReport",
    "ExitCosts",
    "ExitReport",
    "FrontPoint",
    "calibrate",
    "calibrate_scores",
    "drop_interval",
    "exit_costs",
    "fit_temperature",
]
