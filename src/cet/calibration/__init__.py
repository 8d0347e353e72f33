"""Calibration: temperatures and thresholds from held-out samples, and what exits cost."""

from cet.calibration.calibrate import Calibration, calibrate
from cet.calibration.cost import ExitCosts, exit_costs
from cet.calibration.report import CalibrationReport, ClassReport, ExitReport, drop_interval
from cet.calibration.temperatures import fit_temperature

__all__ = [
    "Calibration",
    "CalibrationReport",
    "ClassReport",
    "ExitCosts",
    "ExitReport",
    "calibrate",
    "drop_interval",
    "exit_costs",
    "fit_temperature",
]
