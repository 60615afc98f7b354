"""The settings of one Flax layer, the same for nnx and linen."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen
from flax import nnx

__all__ = ["FlaxLayer", "flax_layer"]


@dataclass(frozen=True)
class FlaxLayer:
    """What the constructor of a Flax module was told.

    Attributes:
        kind: The name of Flax's own class that it is, or is derived from (``"Conv"``; ``"Module"`` for a module
            of the caller's).
        name: The name of its class as written.
        flavour: ``"nnx"`` or ``"linen"``.
        values: Its settings by name.
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
    flaxs = next((c for c in kind.__mro__ if c.__module__.split(".")[0] == "flax"), kind)
    if isinstance(module, flax.linen.Module):
        names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
        values = {name: getattr(module, name) for name in names}
        layer = FlaxLayer(flaxs.__name__, kind.__name__, "linen", values)
    else:
        settings = {
            name: value for name, value in vars(module).items() if not isinstance(value, nnx.Variable)
        }
        layer = FlaxLayer(flaxs.__name__, kind.__name__, "nnx", settings)
    if layer.kind in _WRAPPERS and (inner := layer["layer_instance"]) is not None:
        return flax_layer(inner)
    return layer


# Modules that compute what they hold computes, with other weights.
_WRAPPERS = frozenset({"WeightNorm", "SpectralNorm"})
