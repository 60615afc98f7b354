"""TRANSLATIONS: what each function of torch is in JAX, whatever the order of axes of its arguments.

Owns one table, by torch's public names. Refuses functions and arguments that have no exact counterpart. Gives
`translate_function` to the translation of a model.
"""

from . import (
    _attention,
    _convolution,
    _creation,
    _elementwise,
    _fourier,
    _grouped,
    _indexing,
    _linalg,
    _losses,
    _normalization,
    _norms,
    _packed,
    _pooling,
    _products,
    _random,
    _reductions,
    _refused,
    _reshaping,
    _resizing,
    _sampling,
    _scans,
    _scatter,
    _shapes,
    _splitting,
    _unary,
)
from ._table import is_elementwise, operation, table_name, translate_function

__all__ = ["is_elementwise", "operation", "table_name", "translate_function"]

# Each of these fills the table.
FAMILIES = (
    _attention,
    _convolution,
    _creation,
    _elementwise,
    _fourier,
    _grouped,
    _indexing,
    _linalg,
    _losses,
    _normalization,
    _norms,
    _packed,
    _pooling,
    _products,
    _random,
    _reductions,
    _refused,
    _reshaping,
    _resizing,
    _sampling,
    _scans,
    _scatter,
    _shapes,
    _splitting,
    _unary,
)
