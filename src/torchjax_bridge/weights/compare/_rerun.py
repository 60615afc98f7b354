"""Runs one Flax layer again on the same input, with other settings, or as an instance of its base class."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.errors
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from torchjax_bridge.exchange import Path

from ..trees import rng_streams
from ._record import MODEL_ERRORS, Call
from ._values import Value, values_in

__all__ = ["Rerun", "rerun_linen", "rerun_nnx"]


class Rerun(Protocol):
    """Runs the layer of a call again; None if it has no such setting, or cannot run."""

    def __call__(
        self, call: Call, settings: Mapping[str, Any], kind: type | None = None
    ) -> tuple[Value, ...] | None:
        """Run it with these settings, and as an instance of its base class ``kind``."""


def rerun_nnx(modules: Mapping[Path, nnx.Module]) -> Rerun:
    """Run copies of the layers of an nnx model."""

    def rerun(call: Call, settings: Mapping[str, Any], kind: type | None = None) -> tuple[Value, ...] | None:
        module = modules.get(call.path)
        if module is None or not all(hasattr(module, name) for name in settings):
            return None
        layer: Any = nnx.clone(module)
        for name, value in settings.items():
            if name == "num_groups":  # nnx keeps the size of a group beside their number
                layer.group_size = layer.group_size * layer.num_groups // value
            setattr(layer, name, value)
        if kind is not None:
            object.__setattr__(layer, "__class__", kind)  # bypasses nnx's __setattr__
        return _run(layer, call, settings)

    return rerun


def rerun_linen(variables: Mapping[str, Any], *, training: bool) -> Rerun:
    """Run layers of a linen model on their part of the variables; the state is mutable as in the model's run."""

    def rerun(call: Call, settings: Mapping[str, Any], kind: type | None = None) -> tuple[Value, ...] | None:
        if not isinstance(call.module, flax.linen.Module):
            return None
        if not all(hasattr(call.module, name) for name in settings):
            return None
        own = {name: part for name, tree in variables.items() if (part := _part(tree, call.path)) is not None}
        layer = call.module.clone(**settings)
        if kind is not None:
            names = [one.name for one in dataclasses.fields(kind) if one.init and one.name != "parent"]
            layer = kind(**{name: getattr(layer, name) for name in names})

        def apply(*args: Any, **kwargs: Any) -> Any:
            state = [name for name in own if name != "params"]
            try:
                return layer.apply(
                    own, *args, rngs=rng_streams(), mutable=state if training else [], **kwargs
                )[0]
            except flax.errors.ModifyScopeVariableError:
                return layer.apply(own, *args, rngs=rng_streams(), mutable=state, **kwargs)[0]

        return _run(apply, call, settings)

    return rerun


def _part(tree: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or str(name) not in tree:
            return None
        tree = tree[str(name)]
    return tree


def _run(layer: Callable[..., Any], call: Call, settings: Mapping[str, Any]) -> tuple[Value, ...] | None:
    args, kwargs = jax.tree.map(_array, call.arguments)
    kwargs = {
        name: value for name, value in kwargs.items() if name not in settings
    }  # now given to the constructor
    try:
        with jax.default_matmul_precision("highest"):
            return values_in(layer(*args, **kwargs))
    except MODEL_ERRORS:  # the input does not fit its settings, or it lives in a scan
        return None


def _array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
