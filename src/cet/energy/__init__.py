"""Joules that can be believed: energy counters of GPU and CPU, and a protocol to measure with them.

Missing joules are ``None`` with a reason, never 0, and every figure says where it came from.
"""

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

__all__ = [
    "Clock",
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
    "MigError",
    "MonotonicClock",
    "NoCounterError",
    "PowerSample",
    "Unavailable",
]
