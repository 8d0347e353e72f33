"""Training of multi-exit models, and the net and recipes of the demonstration.

Names are imported when they are first used: only the Lightning module and the recipes need the extra ``cet[train]``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
