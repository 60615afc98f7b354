"""``package.module:factory``: a model's structure, built without its memory.

The factory is called without arguments, on torch's meta device and under JAX's abstract evaluation, whichever
framework it turns out to be of. It may also build abstractly itself.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

import jax
import torch
import typer
from flax import linen, nnx
from flax.errors import FlaxError
from torch import nn

from torchjax_bridge.errors import BridgeError

from ._terminal import fail

__all__ = ["build", "flax_model", "flax_template", "running", "torch_model"]

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


@overload
def torch_model(spec: str, debug: bool, *, concrete: bool = False) -> nn.Module: ...
@overload
def torch_model(spec: str | None, debug: bool, *, concrete: bool = False) -> nn.Module | None: ...
def torch_model(spec: str | None, debug: bool, *, concrete: bool = False) -> nn.Module | None:
    """The torch module that ``--model`` builds, on the meta device unless it is to be run."""
    if spec is None:
        return None
    made = build(spec, debug, _really if concrete else _abstractly)
    if not isinstance(made, nn.Module):
        raise typer.BadParameter(f"--model {spec} gives a {type(made).__name__}, not a torch.nn.Module.")
    return made


def flax_template(spec: str | None, debug: bool) -> Any:
    """The Flax template that ``--template`` builds, with shapes for arrays."""
    if spec is None:
        return None
    made = build(spec, debug)
    if isinstance(made, linen.Module):
        raise typer.BadParameter(_needs_variables(spec, made))
    if not isinstance(made, nnx.Module | nnx.State | Mapping):
        raise typer.BadParameter(
            f"--template {spec} gives a {type(made).__name__}, not an nnx.Module, an nnx.State or linen variables."
        )
    return made


def flax_model(spec: str, debug: bool, *, concrete: bool = False) -> Any:
    """A live Flax model: an ``nnx.Module``, or a linen module and its variables, None where it comes alone."""
    made = build(spec, debug, _really if concrete else _abstractly)
    if isinstance(made, nnx.Module):
        return made
    if isinstance(made, linen.Module):
        return made, None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], linen.Module):
        return made
    raise typer.BadParameter(
        f"--template {spec} gives a {type(made).__name__}, which cannot run: say what gives an nnx.Module, a linen "
        "module, or (linen module, variables)."
    )


@contextmanager
def running(debug: bool) -> Iterator[None]:
    """What models raise while they run is one line; errors of this library go on."""
    try:
        yield
    except BridgeError:
        raise
    except _THEIRS as err:
        if debug:
            raise
        raise fail(f"a model cannot run on this: {_in_a_line(err)} (--debug shows where)") from err


def _in_a_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0] if lines else ''}"


def _needs_variables(spec: str, module: linen.Module) -> str:
    """What to write for a linen module, which has no arrays before it is called."""
    name, _, attribute = spec.partition(":")
    kept: Any = sys.modules[name]
    for part in attribute.split("."):
        kept = getattr(kept, part)
    made = attribute if isinstance(kept, linen.Module) else f"{attribute}()"
    factory = f"{attribute.replace('.', '_').lower()}_variables"
    return (
        f"--template {spec} gives a linen module, and a template is its variables, which a call makes. Write into "
        f"{name}, with an input as {type(module).__name__} takes it,\n"
        f"  def {factory}():\n"
        f"      import jax\n"
        f"      return {made}.init(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))\n"
        f"and say --template {name}:{factory}"
    )


def build(spec: str, debug: bool, make: Callable[[Any], Any] | None = None) -> Any:
    """What a factory gives, by default abstractly: a module on the meta device, or ``jax.ShapeDtypeStruct``.

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
        return (make or _abstractly)(factory)
    except _THEIRS as err:
        if debug:
            raise
        raise typer.BadParameter(f"{spec}: {_in_a_line(err)}") from err
    except SystemExit as err:
        # A script without a guard around its main: nothing was done, so 0 would be a lie.
        raise typer.BadParameter(
            f"{spec}: the module ends the program when it is imported or called (SystemExit: {err}). Put what it "
            "runs under if __name__ == '__main__'."
        ) from err


def _really(factory: Any) -> Any:
    if not callable(factory) or isinstance(factory, nn.Module | nnx.Module | linen.Module):
        return factory
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        kind: Any = factory
        return kind(rngs=nnx.Rngs(0))
    return factory()


def _abstractly(factory: Any) -> Any:
    if not callable(factory) or isinstance(factory, nn.Module | nnx.Module | linen.Module):
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
    if isinstance(thing, tuple) and thing and isinstance(thing[0], linen.Module):
        return thing[0]  # its variables were traced, and a run makes new ones
    if isinstance(thing, nn.Module) or not _is_traced(thing):
        return thing
    if isinstance(thing, nnx.Module):
        return nnx.eval_shape(factory)
    return jax.eval_shape(factory)


def _is_traced(thing: Any) -> bool:
    leaves = jax.tree.leaves(nnx.state(thing) if isinstance(thing, nnx.Module) else thing)
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
