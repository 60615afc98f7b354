"""The model that a source makes, alike for nnx and linen: its shapes, its weights, a run of it.

A model of nnx is an ``nnx.Module``. A model of linen is ``(module, variables)``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen, nnx
from torch import nn

from torchjax_bridge.weights import to_flax

from ._linen_calls import MODE
from ._rules import UserRule
from ._torch_part import TorchPart

__all__ = [
    "OPTIMIZED",
    "QUICK",
    "as_constructed",
    "as_function",
    "filled",
    "linen_model",
    "nnx_model",
    "result_of",
    "weights_of",
    "with_arrays",
]

# A program that runs once is quicker to run than to optimize.
QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}
# As by default, whatever ``jax_disable_most_optimizations`` says.
OPTIMIZED: dict[str, Any] = {
    "xla_backend_optimization_level": "3",
    "xla_llvm_disable_expensive_passes": False,
}


def nnx_model(kind: Callable[..., Any], kept: Mapping[str, nn.Module]) -> Any:
    """A model of nnx without values.

    Args:
        kind: The class.
        kept: The modules that stay in torch, by the arguments that stand for them.
    """
    return nnx.eval_shape(
        lambda: kind(**{name: TorchPart(module) for name, module in kept.items()}, rngs=nnx.Rngs(0))
    )


def linen_model(kind: Callable[..., linen.Module], arguments: Sequence[Any], *, has_mode: bool) -> Any:
    """A model of linen without values: the module, and the shapes of its variables.

    Layers that run in one mode alone have weights, too.

    Args:
        kind: The class.
        arguments: What the model is called with.
        has_mode: Whether its call takes the mode.
    """
    module = kind()
    variables: dict[str, Any] = {}
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    for mode in (False, True) if has_mode else (None,):
        settings: dict[str, Any] = {} if mode is None else {MODE: mode}

        def start(given: Any, settings: dict[str, Any] = settings) -> Any:
            return module.init(keys, *given, **settings)

        with contextlib.suppress(NotImplementedError):  # a port that evaluates only
            variables = _united(variables, _on_shapes(start, arguments))
    return module, variables


def _on_shapes(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Any:
    """The shapes that a function of the arguments gives; arguments that are no arrays stay what they are."""
    arrays = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)]
    return jax.eval_shape(lambda arrays: function(with_arrays(arguments, arrays)), arrays)


def _united(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for name, tree in other.items():
        both = isinstance(tree, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _united(found[name], tree) if both else tree
    return found


def filled(torch_module: nn.Module, model: Any, rules: Sequence[UserRule]) -> Any:
    """A model like this one with the weights of a torch module, in evaluation mode."""
    if isinstance(model, tuple):
        module, variables = model
        return module, to_flax(torch_module, variables, rules=tuple(rules))
    made = to_flax(torch_module, model, rules=tuple(rules))
    made.eval()
    return made


def as_constructed(model: Any) -> Any:
    """A model in the mode in which it was constructed, with which the settings of layers are compared."""
    if isinstance(model, tuple):
        return model
    copied = nnx.clone(model)
    copied.train()
    return copied


def weights_of(model: Any) -> Any:
    """What `save_flax` and the like take."""
    return model[1] if isinstance(model, tuple) else model


def result_of(
    model: Any, arguments: Sequence[Any], arrays_of: Callable[[Any], Sequence[Any]]
) -> Sequence[Any]:
    """The arrays in the result of a model in evaluation, compiled.

    Args:
        model: The model.
        arguments: What it is called with.
        arrays_of: Takes the arrays out of the result; what else is there (strings) crosses no ``jax.jit``.
    """
    run, variables, arrays = as_function(model, arguments)
    compiled = jax.jit(lambda *given: list(arrays_of(run(*given))), compiler_options=QUICK)
    return compiled(variables, arrays)


def as_function(model: Any, arguments: Sequence[Any]) -> tuple[Callable[[Any, Any], Any], Any, list[Any]]:
    """A model in evaluation as a function of its variables and of the arrays among its arguments, and these two."""
    arrays = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)]
    if isinstance(model, tuple):
        module, variables = model
        keys = {"dropout": jax.random.key(0)}  # of code that draws in evaluation, too

        def apply(state: Any, arrays: Any) -> Any:
            return module.apply(state, *with_arrays(arguments, arrays), rngs=keys)

        return apply, variables, arrays
    graph, variables = nnx.split(model)
    return lambda state, arrays: nnx.merge(graph, state)(*with_arrays(arguments, arrays)), variables, arrays


def with_arrays(tree: Any, arrays: Sequence[Any]) -> Any:
    """The arguments with their arrays replaced, in order."""
    leaves, structure = jax.tree.flatten(tree)
    given: Iterator[Any] = iter(arrays)
    return jax.tree.unflatten(
        structure, [next(given) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
    )
