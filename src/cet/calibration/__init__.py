"""Calibration: temperatures and thresholds from held-out samples, and what exits cost."""

from cet.calibration.calibrate import (
    Calibration,
    CalibrationReport,
    ExitReport,
    calibrate,
    drop_interval,
    fit_temperature,
)
from cet.calibration.cost import ExitCosts, exit_costs

__all__ = [
    "Calibration",
    "CalibrationReport",
    "ExitCosts",
    "ExitReport",
    "calibrate",
    "drop_interval",
    "exit_costs",
    "fit_temperature",
]
