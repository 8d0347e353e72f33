"""Joules that can be believed: energy counters of GPU and CPU, and a protocol to measure with them.

Missing joules are ``None`` with a reason, never 0, and every figure holds its source. Names are imported when they are
first used: the statistics take half a second to import, and a meter does without them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
