"""Copies into row-major memory: every copy that a conversion makes.

Owns where a copy lies and what makes it: XLA's transposition (`xla_copy`), slabs in the cache (`_relayout`), one
plain copy (`_row_major`), or one call for many small ones (`_together`); and the threads that do so (`_executor`).
Refuses nothing: layouts were checked before. Knows no layers and no rules. Gives `row_major_copies` to the
conversion and to the optimizer state, `xla_copy` and `copy_threads` to the writing of files, `copy_into` and
`Together` to the link.
"""

from . import _xla_copy as xla_copy
from ._exchangeable import WIDER, as_exchangeable
from ._executor import copy_threads
from ._relayout import copy_into
from ._row_major import cast_to, row_major_copies
from ._together import Together

__all__ = [
    "WIDER",
    "Together",
    "as_exchangeable",
    "cast_to",
    "copy_into",
    "copy_threads",
    "row_major_copies",
    "xla_copy",
]
