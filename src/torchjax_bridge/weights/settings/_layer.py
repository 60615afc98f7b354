"""The settings of one Flax layer, the same for nnx and linen."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import flax.linen

__all__ = ["FlaxLayer", "flax_layer", "is_flaxs_layer", "overridden_call"]


@dataclass(frozen=True)
class FlaxLayer:
    """The settings of a Flax module.

    Attributes:
        kind: The name of its nearest class of Flax's (``"Conv"``; ``"Module"`` for a module of the caller's).
        name: The name of its own class.
        flavour: ``"nnx"`` or ``"linen"``.
        values: Its settings by name; for nnx all its attributes, live.
        overrides: The class of Flax's whose ``__call__`` it overrides, or None.
    """

    kind: str
    name: str
    flavour: str
    values: Mapping[str, Any]
    overrides: type | None = None

    def __getitem__(self, name: str) -> Any:
        """A setting; None if this class has none of that name."""
        return self.values.get(name)


def flax_layer(module: Any) -> FlaxLayer:
    """The settings of a live nnx module, or of a linen module."""
    kind = type(module)
    known, linen = _flax_class(kind)
    if linen:
        names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
        values: Mapping[str, Any] = {name: getattr(module, name) for name in names}
    else:
        values = vars(module)
    if known in _WRAPPERS and "layer_instance" in values:
        return flax_layer(values["layer_instance"])
    flavour = "linen" if linen else "nnx"
    return FlaxLayer(known, kind.__name__, flavour, values, overridden_call(kind))


def is_flaxs_layer(kind: type) -> bool:
    """Whether a class is a layer of Flax's, or is derived from one."""
    return _flax_class(kind)[0] not in ("Module", "Pytree")


def overridden_call(kind: type) -> type | None:
    """The class of Flax's, or of ours, whose ``__call__`` a subclass overrides; None if it overrides none."""
    if kind not in _CALLS:
        made = [one for one in kind.__mro__ if "__call__" in vars(one)]
        known = next((one for one in made if one.__module__.split(".")[0] in _TRUSTED), None)
        _CALLS[kind] = known if made and known is not made[0] else None
    return _CALLS[kind]


_CALLS: WeakKeyDictionary[type, type | None] = WeakKeyDictionary()
_TRUSTED = ("flax", __name__.split(".")[0])


def _flax_class(kind: type) -> tuple[str, bool]:
    """The name of the nearest ancestor of Flax's, and whether it is linen's; cached for each class."""
    if (found := _FLAX_CLASSES.get(kind)) is None:
        flaxs = next((c for c in kind.__mro__ if c.__module__.split(".")[0] == "flax"), kind)
        found = _FLAX_CLASSES[kind] = flaxs.__name__, issubclass(kind, flax.linen.Module)
    return found


_FLAX_CLASSES: WeakKeyDictionary[type, tuple[str, bool]] = WeakKeyDictionary()

# Modules that compute what the module inside them computes, with other weights.
_WRAPPERS = frozenset({"WeightNorm", "SpectralNorm"})
