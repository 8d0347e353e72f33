"""The public names of cet.energy, and the modules that they come from."""

from .clock import Clock as Clock
from .clock import MonotonicClock as MonotonicClock
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .domains import CounterFrozenError as CounterFrozenError
from .domains import CounterReading as CounterReading
from .domains import CounterUnstableError as CounterUnstableError
from .domains import DeviceFacts as DeviceFacts
from .domains import DeviceLostError as DeviceLostError
from .domains import DeviceSelectionError as DeviceSelectionError
from .domains import DeviceState as DeviceState
from .domains import Domain as Domain
from .domains import DomainEnergy as DomainEnergy
from .domains import EnergyError as EnergyError
from .domains import EnergyReading as EnergyReading
from .domains import Flag as Flag
from .domains import MigError as MigError
from .domains import NoCounterError as NoCounterError
from .domains import PowerSample as PowerSample
from .domains import Unavailable as Unavailable
from .measurement import Measurement as Measurement
from .measurement import Settings as Settings
from .meter import EnergyMeter as EnergyMeter
from .profile import measured_costs as measured_costs
from .protocol import Workload as Workload
from .protocol import measure as measure
