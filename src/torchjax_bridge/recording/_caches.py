"""Functions that keep what they gave (``functools.lru_cache``): what is kept no recording would see made."""

import functools
import gc
import weakref
from collections.abc import Collection
from typing import Any

import torch

from ._frames import tensors_of

__all__ = ["empty_caches", "find_caches"]

_CACHE = type(functools.lru_cache(lambda: None))
_FOUND = weakref.WeakSet[Any]()  # those that a recording read from


def empty_caches() -> None:
    """Empty the caches that earlier recordings read from; their functions will compute again."""
    for cache in list(_FOUND):
        cache.cache_clear()


def find_caches(tensors: Collection[torch.Tensor]) -> bool:
    """Remember the caches that keep any of these tensors; whether there are any not yet known."""
    wanted = set(map(id, tensors))
    caches = [item for item in gc.get_objects() if type(item) is _CACHE and item not in _FOUND]
    found = [cache for cache in caches if not wanted.isdisjoint(map(id, _kept(cache)))]
    _FOUND.update(found)
    return bool(found)


def _kept(cache: Any) -> list[torch.Tensor]:
    trees = [item for item in gc.get_referents(cache) if isinstance(item, torch.Tensor | tuple | list | dict)]
    return list(tensors_of(trees, torch.Tensor))
