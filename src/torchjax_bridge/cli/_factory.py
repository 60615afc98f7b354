"""``package.module:factory``: a model's structure, built without its memory.

The factory is called without arguments, on torch's meta device and under JAX's abstract evaluation, whichever
framework it turns out to be of. It may also build abstractly itself.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import torch
import typer
from flax import nnx
from flax.errors import FlaxError
from torch import nn

__all__ = ["build", "flax_template", "torch_model"]

# What code that is not ours may raise; everything else is a fault of the interpreter or of ours.
_THEIRS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    FlaxError,
)


def torch_model(spec: str | None, debug: bool) -> nn.Module | None:
    """The torch module that ``--model`` builds, on the meta device."""
    if spec is None:
        return None
    made = build(spec, debug)
    if not isinstance(made, nn.Module):
        raise typer.BadParameter(f"--model {spec} gives a {type(made).__name__}, not a torch.nn.Module.")
    return made


def flax_template(spec: str | None, debug: bool) -> Any:
    """The Flax template that ``--template`` builds, with shapes for arrays."""
    if spec is None:
        return None
    made = build(spec, debug)
    if not isinstance(made, nnx.Module | nnx.State | Mapping):
        raise typer.BadParameter(
            f"--template {spec} gives a {type(made).__name__}, not an nnx.Module, an nnx.State or linen variables."
        )
    return made


def build(spec: str, debug: bool) -> Any:
    """What a factory gives, abstractly: a module on the meta device, or a tree of ``jax.ShapeDtypeStruct``.

    Raises:
        typer.BadParameter: There is no such factory, or it raised.
    """
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise typer.BadParameter(f"{spec!r} is no factory: say it like package.module:factory.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        factory: Any = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        return _abstractly(factory)
    except _THEIRS as err:
        if debug:
            raise
        reason = (str(err).splitlines() or [""])[0]
        raise typer.BadParameter(f"{spec}: {type(err).__name__}: {reason}") from err
    except SystemExit as err:
        # A script without a guard around its main: nothing was done, so 0 would be a lie.
        raise typer.BadParameter(
            f"{spec}: the module ends the program when it is imported or called (SystemExit: {err}). Put what it "
            "runs under if __name__ == '__main__'."
        ) from err


def _abstractly(factory: Any) -> Any:
    if not callable(factory) or isinstance(factory, nn.Module | nnx.Module):
        return factory  # a model that the module keeps ready
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        kind: Any = factory
        return nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0)))
    made: list[Any] = []

    def probe() -> None:
        made.append(factory())

    # Under the trace nothing is computed and nothing is allocated, whichever framework the factory uses.
    with torch.device("meta"):
        jax.eval_shape(probe)
    thing = made.pop()
    if isinstance(thing, nn.Module) or not _is_traced(thing):
        return thing
    if isinstance(thing, nnx.Module):
        return nnx.eval_shape(factory)
    return jax.eval_shape(factory)


def _is_traced(thing: Any) -> bool:
    leaves = jax.tree.leaves(nnx.state(thing) if isinstance(thing, nnx.Module) else thing)
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
