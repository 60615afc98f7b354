"""The paths of a module that several parents hold: the shortest is its home."""

from collections.abc import Mapping

from torch import nn

__all__ = ["homes"]


def homes(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """The paths of each module by its identity: the shortest first, of equally short ones the earlier.

    Args:
        modules: Every module by path, shared ones by each of their paths.
    """
    found: dict[int, list[str]] = {}
    for path, module in modules.items():
        found.setdefault(id(module), []).append(path)
    return {
        key: sorted(paths, key=lambda path: path.count(".") if path else -1) for key, paths in found.items()
    }
