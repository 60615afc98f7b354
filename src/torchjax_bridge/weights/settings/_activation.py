"""Activations: a module in torch, a function in Flax, each with settings of its own.

The classic difference is the GELU: torch's default is ``x * Phi(x)``, JAX's the tanh approximation
(D. Hendrycks and K. Gimpel, "Gaussian error linear units", 2016, section 2).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from torch import nn

from ._difference import Difference, differs

__all__ = ["activation_differences", "is_activation"]


@dataclass(frozen=True)
class _Twin:
    """The JAX functions that are a torch activation.

    Attributes:
        functions: The same function under all its names.
        settings: For each argument of the function: torch's attribute, and the function's default.
        read: Turns torch's value into JAX's.
    """

    functions: tuple[Callable[..., Any], ...]
    settings: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    read: Callable[[Any], Any] = lambda value: value


_TWINS: Mapping[type, _Twin] = {
    nn.ReLU: _Twin((jax.nn.relu,)),
    nn.ReLU6: _Twin((jax.nn.relu6,)),
    nn.GELU: _Twin((jax.nn.gelu,), {"approximate": ("approximate", True)}, lambda value: value == "tanh"),
    nn.SiLU: _Twin((jax.nn.silu, jax.nn.swish)),
    nn.Sigmoid: _Twin((jax.nn.sigmoid,)),
    nn.Tanh: _Twin((jnp.tanh, jax.nn.tanh)),
    nn.ELU: _Twin((jax.nn.elu,), {"alpha": ("alpha", 1.0)}),
    nn.CELU: _Twin((jax.nn.celu,), {"alpha": ("alpha", 1.0)}),
    nn.SELU: _Twin((jax.nn.selu,)),
    nn.LeakyReLU: _Twin((jax.nn.leaky_relu,), {"negative_slope": ("negative_slope", 0.01)}),
    nn.Hardtanh: _Twin((jax.nn.hard_tanh,)),
    nn.Hardswish: _Twin((jax.nn.hard_swish, jax.nn.hard_silu)),
    nn.Hardsigmoid: _Twin((jax.nn.hard_sigmoid,)),
    nn.Mish: _Twin((jax.nn.mish,)),
    nn.Softplus: _Twin((jax.nn.softplus,)),
    nn.Softsign: _Twin((jax.nn.soft_sign,)),
    nn.LogSigmoid: _Twin((jax.nn.log_sigmoid,)),
    nn.Softmax: _Twin((jax.nn.softmax,)),
    nn.LogSoftmax: _Twin((jax.nn.log_softmax,)),
}


def is_activation(module: nn.Module) -> bool:
    """Whether a torch module is a known activation."""
    return type(module) in _TWINS


def activation_differences(module: nn.Module, function: Any) -> Iterator[Difference]:
    """Compare a torch activation with what the Flax model holds in its place.

    A function outside ``jax.nn`` (a lambda, one of the caller's) passes: nothing shows what it computes.
    """
    twin = _TWINS.get(type(module))
    if twin is None:
        return
    arguments: dict[str, Any] = {}
    while isinstance(function, partial):
        arguments = {**function.keywords, **arguments}
        function = function.func
    known = next((other for other in _TWINS.values() if _is_one_of(function, other.functions)), None)
    if known is None:
        return
    name, fix = _name(twin.functions[0]), _jax_expression(twin, module)
    if known is not twin:
        pair = ("activation", type(module).__name__)
        yield from differs("activation", name, _name(known.functions[0]), torch=pair, fix=fix)
        return
    for argument, (attribute, default) in twin.settings.items():
        value = getattr(module, attribute)
        have = arguments.get(argument, default)
        yield from differs(argument, twin.read(value), have, torch=(attribute, value), fix=fix)


def _is_one_of(function: Any, functions: tuple[Callable[..., Any], ...]) -> bool:
    return any(function is other for other in functions)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def _jax_expression(twin: _Twin, module: nn.Module) -> str:
    """How the torch activation is written in JAX."""
    given = [
        f"{argument}={twin.read(getattr(module, attribute))!r}"
        for argument, (attribute, default) in twin.settings.items()
        if twin.read(getattr(module, attribute)) != default
    ]
    name = f"jax.nn.{_name(twin.functions[0])}"
    return f"partial({name}, {', '.join(given)})" if given else name
