"""A bounded cache that builds each value once, even when many threads ask for it at the same moment.

Knows nothing about keys. ``functools.lru_cache`` may build one value in two threads at once; here the second
thread waits for the first.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

__all__ = ["Cache", "CacheInfo"]


class CacheInfo(NamedTuple):
    """What a cache has done so far, in the fields of ``functools.lru_cache``."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


class Cache:
    """The ``maxsize`` values that were used last, by key.

    >>> cache = Cache(2)
    >>> [cache.get(key, lambda: object()) is not None for key in "aba"]
    [True, True, True]
    >>> cache.info()
    CacheInfo(hits=1, misses=2, maxsize=2, currsize=2)
    """

    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """The value of ``key``; built by ``build()`` if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._hits += 1
                self._entries.move_to_end(key)
            else:
                self._misses += 1
                entry = self._entries[key] = _Entry()
                if len(self._entries) > self._maxsize:
                    self._entries.popitem(last=False)
        if not entry.built:
            self._build(key, entry, build)
        return entry.value

    def _build(self, key: Hashable, entry: "_Entry", build: Callable[[], Any]) -> None:
        with entry.lock:
            if entry.built:
                return
            try:
                entry.value = build()
                entry.built = True
            finally:
                if not entry.built:  # the next call tries again
                    with self._lock:
                        if self._entries.get(key) is entry:
                            del self._entries[key]

    def info(self) -> CacheInfo:
        """Hits and misses since the last `clear`, and the size."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, self._maxsize, len(self._entries))

    def clear(self) -> None:
        """Forget every value, and the counts."""
        with self._lock:
            self._entries.clear()
            self._hits = self._misses = 0


class _Entry:
    __slots__ = ("built", "lock", "value")

    def __init__(self) -> None:
        self.built = False
        # Building may call the wrapped function again, in the same thread, with the same key.
        self.lock = threading.RLock()
        self.value: Any = None
