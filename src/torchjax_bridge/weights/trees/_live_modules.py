"""The modules of a live Flax model and their settings, by path.

An nnx model is a tree of live modules. The modules of a linen model exist only while it runs: it is run on
shapes, which computes nothing, and each module is recorded when it is called. Knows no weights and no
matching.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen
import jax
from flax import nnx

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import SettingsError
from torchjax_bridge.exchange import Path

from ..settings import FlaxLayer, flax_layer
from ._flax_tree import FlaxTree

__all__ = ["LinenModel", "as_linen", "layers_below", "linen_path", "live_linen", "live_nnx", "rng_streams"]

LinenModel = tuple[flax.linen.Module, Mapping[str, Any] | None]


def as_linen(flax_model: Any) -> LinenModel | None:
    """The linen module, and its variables if given; None for an nnx module.

    Raises:
        SettingsError: It is neither.
    """
    if isinstance(flax_model, nnx.Module):
        return None
    if isinstance(flax_model, flax.linen.Module):
        if flax_model.scope is not None:
            module, variables = flax_model.unbind()
            return module, variables
        return flax_model, None
    if isinstance(flax_model, tuple) and len(flax_model) == 2:
        module, variables = flax_model
        if isinstance(module, flax.linen.Module) and isinstance(variables, Mapping):
            return module, variables
    raise SettingsError(
        f"{what_kind(flax_model)} is no live Flax model: pass an nnx.Module, or a linen module with its "
        "variables as (module, variables)."
    )


def live_nnx(tree: FlaxTree) -> dict[Path, FlaxLayer]:
    """The settings of every nnx module, by its path in the tree."""
    return {node.path: flax_layer(node.module) for node in tree.root.walk() if node.module is not None}


def live_linen(run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[Path, FlaxLayer]]:
    """The result of a linen ``init`` or ``apply`` on shapes, and the settings of every module that it called."""
    found: dict[Path, FlaxLayer] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            found.setdefault(linen_path(context.module), flax_layer(context.module))
        return call(*args, **kwargs)

    with flax.linen.intercept_methods(look):
        shapes = jax.eval_shape(lambda *arrays: run(*arrays, **kwargs), *args)
    return shapes, found


def linen_path(module: flax.linen.Module) -> Path:
    """The path of a bound linen module, in the form that plans use."""
    return tuple(int(name) if name.isdecimal() else name for name in module.path)


def rng_streams() -> dict[str, jax.Array]:
    """Random streams for a linen module. It uses ``params`` in place of a missing one."""
    return {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def layers_below(layers: Mapping[Path, FlaxLayer], path: Path) -> Iterator[tuple[Path, FlaxLayer]]:
    """The modules at a path and below it."""
    return ((where, layer) for where, layer in layers.items() if where[: len(path)] == path)
