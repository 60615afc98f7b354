"""Functions that keep what they gave (``functools.lru_cache``): what is kept no recording would see made."""

import functools
import gc
import weakref
from typing import Any

import torch
from torch import nn

from ._frames import tensors_of

__all__ = ["empty_caches"]

_CACHE = type(functools.lru_cache(lambda: None))
_KNOWN = weakref.WeakKeyDictionary[
    nn.Module, list[Any]
]()  # the caches of the process, since a module is recorded


def empty_caches(module: nn.Module) -> None:
    """Empty each cache that keeps a tensor before a module runs; its function will compute that again."""
    if module not in _KNOWN:
        _KNOWN[module] = [weakref.ref(item) for item in gc.get_objects() if type(item) is _CACHE]
    for cache in [known() for known in _KNOWN[module]]:
        if cache is not None and cache.cache_info().currsize and _keeps_tensors(gc.get_referents(cache)):
            cache.cache_clear()


def _keeps_tensors(kept: list[Any]) -> bool:
    trees = [tree for tree in kept if isinstance(tree, torch.Tensor | tuple | list | dict)]
    return next(tensors_of(trees, torch.Tensor), None) is not None
