"""The settings of one Flax layer, the same for nnx and linen."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import flax.linen

__all__ = ["FlaxLayer", "flax_layer"]


@dataclass(frozen=True)
class FlaxLayer:
    """What the constructor of a Flax module was told.

    Attributes:
        kind: The name of Flax's own class that it is, or is derived from (``"Conv"``; ``"Module"`` for a module
            of the caller's).
        name: The name of its class as written.
        flavour: ``"nnx"`` or ``"linen"``.
        values: Its settings by name; for nnx all its attributes, live.
    """

    kind: str
    name: str
    flavour: str
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A setting; None where this class has none of that name."""
        return self.values.get(name)


def flax_layer(module: Any) -> FlaxLayer:
    """The settings of a live nnx module, or of a linen module."""
    kind = type(module)
    known, linen = _sort(kind)
    if linen:
        names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
        values: Mapping[str, Any] = {name: getattr(module, name) for name in names}
    else:
        values = vars(module)
    if known in _WRAPPERS and "layer_instance" in values:
        return flax_layer(values["layer_instance"])
    return FlaxLayer(known, kind.__name__, "linen" if linen else "nnx", values)


def _sort(kind: type) -> tuple[str, bool]:
    """The name of Flax's class in a class's ancestry, and whether it is linen's; asked once a class."""
    if (found := _SORTS.get(kind)) is None:
        flaxs = next((c for c in kind.__mro__ if c.__module__.split(".")[0] == "flax"), kind)
        found = _SORTS[kind] = flaxs.__name__, issubclass(kind, flax.linen.Module)
    return found


_SORTS: WeakKeyDictionary[type, tuple[str, bool]] = WeakKeyDictionary()

# Modules that compute what they hold computes, with other weights.
_WRAPPERS = frozenset({"WeightNorm", "SpectralNorm"})
