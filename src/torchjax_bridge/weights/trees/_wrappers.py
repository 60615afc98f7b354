"""Modules that only hold another module (``DataParallel``, ``torch.compile``, FSDP, averaging): removed from paths.

Recognises them by their classes in a live module, and by the keys in a bare ``state_dict``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from torchjax_bridge.exchange import Path, split_path

__all__ = ["Unwrap", "unwrap_keys", "unwrap_modules", "wrapped_module"]

# Segments that a wrapper puts into keys, at any depth.
_INFIXES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Likewise, but an attribute of a model may have this name: a wrapper only where every key starts with it.
_PREFIXES = ("module",)


Unwrap = Callable[[Path], Path | None]
"""Maps a raw path to the path without wrappers; None for an entry that belongs to a wrapper itself."""


def unwrap_modules(modules: dict[str, nn.Module]) -> tuple[Unwrap, tuple[str, ...]]:
    """The `Unwrap` of a live module, and a note for each wrapper."""
    seen: dict[str, str] = {}
    wrapped: set[Path] = set()  # the paths at which wrappers hold their modules
    wrappers: set[Path] = set()
    for name, module in modules.items():
        for attribute in (*_INFIXES, *_PREFIXES):
            if attribute in module._modules and _is_wrapper(module, attribute):
                path = split_path(name)
                wrappers.add(path)
                wrapped.add((*path, attribute))
                seen[attribute] = type(module).__name__

    def unwrap(path: Path) -> Path | None:
        if not wrappers:
            return path
        kept = tuple(part for depth, part in enumerate(path) if path[: depth + 1] not in wrapped)
        of_a_wrapper = path in wrappers or (path[:-1] in wrappers and path not in wrapped)
        return None if of_a_wrapper else kept

    notes = tuple(f"looked through {kind} ('{attribute}.')" for attribute, kind in seen.items())
    return unwrap, notes


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds; None of any other module."""
    names = (name for name in (*_INFIXES, *_PREFIXES) if name in module._modules)
    return next((module._modules[name] for name in names if _is_wrapper(module, name)), None)


def _is_wrapper(module: nn.Module, attribute: str) -> bool:
    if attribute in _INFIXES:
        return True
    kind = type(module)
    return len(module._modules) == 1 and kind.__module__.startswith("torch.")


def unwrap_keys(state: dict[str, Any]) -> tuple[Unwrap, tuple[str, ...]]:
    """The same from the keys alone. A prefix is removed only where every tensor's key has it."""
    paths = [split_path(key) for key, value in state.items() if isinstance(value, torch.Tensor)]
    infixes: set[str | int] = {part for path in paths for part in path if part in _INFIXES}
    counters = {path for path in paths if path == ("n_averaged",)}
    bare = [_without(path, infixes) for path in paths if path not in counters]
    depth = 0
    while bare and all(len(path) > depth + 1 and path[depth] in _PREFIXES for path in bare):
        depth += 1
    prefixed = depth > 0

    def unwrap(path: Path) -> Path | None:
        if prefixed and path in counters:
            return None
        return _without(path, infixes)[depth:] if path not in counters else path

    found = sorted(str(part) for part in infixes) + ["module"] * depth
    return unwrap, tuple(f"looked through the prefix '{part}.' of the keys" for part in found)


def _without(path: Path, parts: Iterable[str | int]) -> Path:
    return tuple(part for part in path if part not in parts)
