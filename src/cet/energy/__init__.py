"""Joules that can be believed: energy counters of GPU and CPU, and a protocol to measure with them.

Missing joules are ``None`` with a reason, never 0, and every figure holds its source.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cet.energy.clock import Clock, MonotonicClock
from cet.energy.domains import (
    CounterFrozenError,
    CounterReading,
    CounterUnstableError,
    DeviceFacts,
    DeviceLostError,
    DeviceSelectionError,
    DeviceState,
    Domain,
    DomainEnergy,
    EnergyError,
    EnergyReading,
    Flag,
    MigError,
    NoCounterError,
    PowerSample,
    Unavailable,
)
from cet.energy.meter import EnergyMeter

if TYPE_CHECKING:
    from cet.energy.comparison import Comparison, compare
    from cet.energy.measurement import Measurement, Settings
    from cet.energy.protocol import Workload, measure

__all__ = [
    "Clock",
    "Comparison",
    "CounterFrozenError",
    "CounterReading",
    "CounterUnstableError",
    "DeviceFacts",
    "DeviceLostError",
    "DeviceSelectionError",
    "DeviceState",
    "Domain",
    "DomainEnergy",
    "EnergyError",
    "EnergyMeter",
    "EnergyReading",
    "Flag",
    "Measurement",
    "MigError",
    "MonotonicClock",
    "NoCounterError",
    "PowerSample",
    "Settings",
    "Unavailable",
    "Workload",
    "compare",
    "measure",
]

# The statistics take half a second to import, and a meter does without them.
_MODULE_OF = {
    "Comparison": "comparison",
    "Measurement": "measurement",
    "Settings": "measurement",
    "Workload": "protocol",
    "compare": "comparison",
    "measure": "protocol",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cet.energy' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"cet.energy.{_MODULE_OF[name]}"), name)
    return value
