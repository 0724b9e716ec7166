"""perpkit: see what pruning does to a neural network, and get its quality back cheaply.

The public names stand in `__init__.pyi`, one flat list; each is imported when first used, so that
`import perpkit` does not wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
