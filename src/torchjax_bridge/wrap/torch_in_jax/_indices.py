"""Indices and labels, widened to int64: many of torch's operators demand that, and JAX lacks it with x64 off.

Owns the table of these operators and their arguments. A uint8 tensor in ``x[...]`` is a mask to torch and is
not widened.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["widen_indices"]

_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32})
_BYTES = frozenset({torch.uint8})

# Every integer tensor among the arguments of these is an index, a label or a length.
_ALL = frozenset(
    (
        *("cross_entropy", "linear_cross_entropy", "nll_loss", "nll_loss_nd", "ctc_loss", "one_hot"),
        *(
            "multi_margin_loss",
            "multilabel_margin_loss",
            "embedding",
            "embedding_bag",
            "_pack_padded_sequence",
        ),
        *("max_unpool1d", "max_unpool2d", "max_unpool3d"),
    )
)
# Of these, one argument is an index, by its position. The others may be values.
_SECOND = ("index_put", "put", "repeat_interleave", "take", "take_along_dim", "tensor_split")
_THIRD = (
    *("gather", "index_add", "index_copy", "index_fill", "index_reduce", "index_select"),
    *("scatter", "scatter_add", "scatter_reduce"),
)
_ONE = {1: _SECOND, 2: _THIRD}
_MASKS = {"__getitem__": 1, "__setitem__": 1, "index_put": 1, "index_put_": 1}
_PLACES = {
    name: place for place, names in _ONE.items() for base in names for name in (base, f"{base}_")
} | _MASKS
_KEYWORDS = frozenset({"index", "indices", "repeats", "sorter", "tensor_indices_or_sections"})
_SORTED = ("searchsorted", "bucketize")


def widen_indices(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a torch function with its indices in int64; None if there is nothing to widen."""
    name = getattr(func, "__name__", "")
    if name in _ALL:
        new = tuple([_wide(arg, _INTEGERS | _BYTES) for arg in args])
        named = {key: _wide(value, _INTEGERS | _BYTES) for key, value in kwargs.items()}
    elif name in _PLACES or name in _SORTED:
        place, dtypes = _PLACES.get(name), _INTEGERS if name in _MASKS else _INTEGERS | _BYTES
        new = tuple([_wide(arg, dtypes) if i == place else arg for i, arg in enumerate(args)])
        named = {key: _wide(value, dtypes) if key in _KEYWORDS else value for key, value in kwargs.items()}
    else:
        return None
    same = all(a is b for a, b in zip((*new, *named.values()), (*args, *kwargs.values()), strict=True))
    return None if same else (new, named)


def _wide(value: Any, dtypes: frozenset[torch.dtype]) -> Any:
    if isinstance(value, torch.Tensor):
        return value.long() if value.dtype in dtypes else value
    if type(value) in (tuple, list):
        wide = type(value)(_wide(item, dtypes) for item in value)
        return value if all(a is b for a, b in zip(wide, value, strict=True)) else wide
    return value
