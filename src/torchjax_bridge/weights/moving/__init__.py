"""Bytes into row-major memory: the copies that a conversion makes.

Owns where a copied leaf lies and which of three ways copies it: XLA's own transposition (`xla_copy`), slabs in the
cache (`_relayout`), or one plain copy (`_fresh`). Refuses nothing: layouts were checked before. Knows no
layers and no rules. Gives `fresh` to the conversion and to the optimizer state, and `xla_copy` to the writing of
files.
"""

from . import _xla_copy as xla_copy
from ._fresh import fresh as fresh
from ._numpy_leaf import crossing as crossing

__all__ = ["fresh", "xla_copy"]
