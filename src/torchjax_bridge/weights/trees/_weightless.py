"""What has no weights and still belongs together: activations and dropouts, which no plan pairs.

They are paired by their names or their order inside two modules that the plan has paired. Compares nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from torchjax_bridge.exchange import Path

from ..settings import FlaxLayer, is_activation

__all__ = ["between_layers", "dropouts_beside", "functions"]

Dropouts = Mapping[Path, Mapping[Path, FlaxLayer]]
"""The dropouts of a Flax model: by the path of the module that holds them, then by their own."""


def _children(module: nn.Module) -> Iterator[tuple[str | int, nn.Module]]:
    for name, child in module.named_children():
        yield int(name) if name.isdecimal() else name, child


def functions(module: nn.Module, layer: FlaxLayer) -> Iterator[tuple[str | int, nn.Module, Any]]:
    """The children of a torch module in whose place the Flax module holds a function."""
    ours = dict(_children(module))
    found = {name: child for name, child in ours.items() if is_activation(child)}
    items = list(layer["layers"]) if found and layer.kind == "Sequential" else []
    same = len(items) == len(ours)
    for name, child in found.items():
        held = items[name] if same and isinstance(name, int) and name < len(items) else layer[str(name)]
        if callable(held):
            yield name, child, held


def dropouts_beside(
    module: nn.Module, flax_path: Path, dropouts: Dropouts
) -> Iterator[tuple[str | int, nn.Module, Path, FlaxLayer]]:
    """The dropouts of a module beside those of its twin: by name, else in order if there are as many."""
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


def between_layers(
    module: nn.RNNBase, parent: nn.Module | None, flax_path: Path, dropouts: Dropouts
) -> Iterator[tuple[Path, FlaxLayer | None]]:
    """What drops between the layers of a recurrent torch layer, which in Flax is a layer among the cells.

    It is looked for in the twin and beside it, where the names that torch's ``parent`` has are other layers'; None
    stands for the one that is missing.
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
