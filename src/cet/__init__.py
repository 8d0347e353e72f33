"""cet: consistent early exit for PyTorch classifiers.

Names are imported when they are first used, so that the command line answers before torch is loaded. Which names there
are, and where they come from, is in ``__init__.pyi``.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
