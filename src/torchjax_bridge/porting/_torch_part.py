"""`TorchPart`: a torch module inside a Flax model, as an nnx module of its own.

Owns the variables of the part under torch's names, its mode and its random numbers. `wrap` runs the code.
"""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import OutputError
from torchjax_bridge.exchange import to_jax, torch_dtype
from torchjax_bridge.weights import Entry, Layer, LayerType, Rule
from torchjax_bridge.wrap import as_jax_module

__all__ = ["TorchPart", "fill_unsaved", "part_rules"]

_COLLECTIONS = {"params": "params", "buffers": "batch_stats"}


class TorchPart(nnx.Module):
    """A part of a port that stays in torch: what ``keep=`` puts in the place of a torch module.

    Its parameters are ``nnx.Param`` and its buffers ``nnx.BatchStat``, under torch's names, so that optax trains
    them, `save_flax` saves them and `to_state_dict` brings them back; a buffer that torch does not save is an
    ``nnx.Cache``. Arrays have torch's order of axes. Calls run torch by `as_jax_module`, so every transform of
    JAX applies, and XLA cannot fuse through them. ``model.eval()`` and ``model.train()`` set the mode; in training
    the buffers are updated.

    Args:
        module: The torch module; it is not changed. What it returns may depend on values, its shapes may not.
        rngs: Where random numbers come from in training; a fixed seed by default.

    Raises:
        ExchangeError: A parameter or buffer has no JAX counterpart.

    Memory:
        The variables are copies.

    >>> import jax.numpy as jnp, torch
    >>> part = TorchPart(torch.nn.Linear(3, 2))
    >>> part.eval()
    >>> part(jnp.ones((4, 3))).shape
    (4, 2)
    """

    def __init__(self, module: nn.Module, *, rngs: nnx.Rngs | None = None) -> None:
        self.code = _Code(module)
        saved = module.state_dict()
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in self.code.start["params"].items()})
        self.buffers = nnx.Dict(
            {
                name: nnx.BatchStat(value) if name in saved else nnx.Cache(value)
                for name, value in self.code.start["buffers"].items()
            }
        )
        self.rngs = (rngs or nnx.Rngs(0)).dropout.fork()
        self.deterministic = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, with arrays in the place of tensors."""
        variables = {
            "params": {name: parameter[...] for name, parameter in self.params.items()},
            "buffers": {name: buffer[...] for name, buffer in self.buffers.items()},
        }
        if self.deterministic:
            return self.code.run(variables, *args, **kwargs)
        output, buffers = self.code.run(variables, *args, train=True, key=self.rngs(), **kwargs)
        for name, value in buffers.items():
            self.buffers[name][...] = value
        return output


class _Code:
    """What a part computes, as a function of its variables: a setting to nnx.

    Attributes:
        start: The variables of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = copy.deepcopy(module, {id(tensor): tensor for tensor in module.parameters()}).eval()
        self._apply, self.start = as_jax_module(module)
        self._announces = False

    def run(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What ``apply`` of `as_jax_module` gives."""
        if self._announces:
            return self._apply(variables, *args, **kwargs)
        try:
            return self._apply(variables, *args, **kwargs)
        except OutputError:  # the code asks for values, so the shapes of its output must be announced
            self._apply, _ = as_jax_module(self._module, output_shape=self._shapes)
            self._announces = True
            return self._apply(variables, *args, **kwargs)

    def _shapes(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes of the output, as torch gives them for zeros."""

        def zeros(leaf: Any) -> Any:
            return torch.zeros(leaf.shape, dtype=torch_dtype(leaf.dtype)) if hasattr(leaf, "shape") else leaf

        args, kwargs = jax.tree.map(zeros, (args, kwargs))
        with torch.no_grad():
            output = to_jax(self._module(*args, **kwargs), copy=True)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), output)


def fill_unsaved(model: nnx.Module) -> None:
    """Give the parts of an abstract model the buffers that no ``state_dict`` holds."""
    for _, part in nnx.iter_modules(model):
        if isinstance(part, TorchPart):
            for name, buffer in part.buffers.items():
                if isinstance(buffer, nnx.Cache):
                    part.buffers[name] = nnx.Cache(part.code.start["buffers"][name])


def part_rules(path: str, module: nn.Module) -> tuple[LayerType | Rule, ...]:
    """The rules by which a torch module fills a `TorchPart`: every tensor as it is, under its own name.

    What else ``state_dict`` holds, as of a quantised layer, stays in torch.
    """
    variables = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if not variables:
        return ()
    keeps = tuple(name for name in module.state_dict() if name not in variables)
    kind = type(f"{type(module).__name__} in torch", (nn.Module,), {})  # no other module follows its rule
    return LayerType(path, kind), Rule(kind, _entries, keeps=keeps)


def _entries(layer: Layer) -> list[Entry]:
    return [
        Entry(str(path[-1]), (path,), collection=_COLLECTIONS[str(path[0])])
        for path in layer.flax
        if path[0] in _COLLECTIONS
    ]
