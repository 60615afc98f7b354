"""Pairs modules without weights: activations and dropouts, which no plan pairs.

They are paired by name or by order inside two modules that the plan has paired. Compares no settings.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from torchjax_bridge.exchange import Path

from ..settings import FlaxLayer, is_activation

__all__ = ["activation_pairs", "dropout_pairs", "recurrent_dropouts"]

Dropouts = Mapping[Path, Mapping[Path, FlaxLayer]]
"""The dropouts of a Flax model, by the path of the module that holds them, then by their own path."""


def _children(module: nn.Module) -> Iterator[tuple[str | int, nn.Module]]:
    for name, child in module.named_children():
        yield int(name) if name.isdecimal() else name, child


def activation_pairs(module: nn.Module, layer: FlaxLayer) -> Iterator[tuple[str | int, nn.Module, Any]]:
    """The activations of a torch module beside the functions that the Flax module has in their place."""
    ours = dict(_children(module))
    found = {name: child for name, child in ours.items() if is_activation(child)}
    items = list(layer["layers"]) if found and layer.kind == "Sequential" else []
    same = len(items) == len(ours)
    for name, child in found.items():
        held = items[name] if same and isinstance(name, int) and name < len(items) else layer[str(name)]
        if callable(held):
            yield name, child, held


def dropout_pairs(
    module: nn.Module, flax_path: Path, dropouts: Dropouts
) -> Iterator[tuple[str | int, nn.Module, Path, FlaxLayer]]:
    """The dropouts of a module beside those of its twin: by name, else in order if the counts are equal."""
    if not dropouts:
        return
    theirs = {**dropouts.get(flax_path, {}), **dropouts.get((*flax_path, "layers"), {})}
    ours = {name: child for name, child in _children(module) if type(child) in _DROPOUTS}
    for path in list(theirs):
        name = path[-1]
        if isinstance(name, str) and name.startswith("layers_") and name[7:].isdecimal():
            name = int(name[7:])
        if name in ours and path in theirs:
            yield name, ours.pop(name), path, theirs.pop(path)
    if len(ours) == len(theirs):
        for (name, child), (path, layer) in zip(ours.items(), theirs.items(), strict=True):
            yield name, child, path, layer


def recurrent_dropouts(
    module: nn.RNNBase, parent: nn.Module | None, flax_path: Path, dropouts: Dropouts
) -> Iterator[tuple[Path, FlaxLayer | None]]:
    """The dropouts between the layers of a recurrent torch layer. Flax has them as layers among the cells.

    Looks in the twin and beside it, but not at names that ``parent`` has too: these are other layers. Gives None
    for a missing dropout.
    """
    inside = {
        path: layer
        for inner in dropouts.values()
        for path, layer in inner.items()
        if path[: len(flax_path)] == flax_path
    }
    if inside or not module.dropout:
        yield from inside.items()
        return
    taken = dict(_children(parent)) if parent is not None else {}
    beside = dropouts.get(flax_path[:-1], {}) if flax_path else {}
    if all(path[-1] in taken or layer["rate"] != module.dropout for path, layer in beside.items()):
        yield flax_path, None


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
