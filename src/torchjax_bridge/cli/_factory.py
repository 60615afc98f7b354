"""``package.module:factory``: builds the structure of a model without its memory.

Calls the factory without arguments, on torch's meta device and under JAX's abstract evaluation at once, because its
framework is not known before. The factory may also return an abstract model itself.
"""

import importlib
import inspect
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
from jax.sharding import AbstractMesh
from torch import nn

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import BridgeError

from ._terminal import error_exit

__all__ = ["build", "flax_model", "flax_template", "report_model_errors", "torch_model"]

# What user code may raise; anything else is a bug of this library or a fault of the interpreter.
_USER_CODE_ERRORS = (
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
def torch_model(spec: str, debug: bool, *, concrete: bool = False, option: str = ...) -> nn.Module: ...
@overload
def torch_model(
    spec: str | None, debug: bool, *, concrete: bool = False, option: str = ...
) -> nn.Module | None: ...
def torch_model(
    spec: str | None, debug: bool, *, concrete: bool = False, option: str = "--model"
) -> nn.Module | None:
    """The torch module that ``--model``, or another option, builds: on the meta device, unless ``concrete``."""
    if spec is None:
        return None
    built = build(spec, debug, _make_concrete if concrete else _make_abstract)
    if not isinstance(built, nn.Module):
        raise typer.BadParameter(f"{option} {spec} gives {what_kind(built)}, not a torch.nn.Module.")
    return built


def flax_template(spec: str | None, debug: bool, mesh: AbstractMesh | None = None) -> Any:
    """The Flax template that ``--template`` builds, with shapes instead of arrays; ``mesh`` has no devices."""
    if spec is None:
        return None
    built = build(spec, debug, mesh=mesh)
    if isinstance(built, linen.Module):
        raise typer.BadParameter(_variables_hint(spec, built))
    if not isinstance(built, nnx.Module | nnx.State | Mapping):
        raise typer.BadParameter(
            f"--template {spec} gives {what_kind(built)}, not an nnx.Module, an nnx.State or linen variables."
        )
    return built


def flax_model(spec: str, debug: bool, *, concrete: bool = False) -> Any:
    """A Flax model: an ``nnx.Module``, or a linen module and its variables (None if the factory returns none)."""
    built = build(spec, debug, _make_concrete if concrete else _make_abstract)
    if isinstance(built, nnx.Module):
        return built
    if isinstance(built, linen.Module):
        return built, None
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], linen.Module):
        return built
    raise typer.BadParameter(
        f"--template {spec} gives {what_kind(built)}, which cannot run: name a factory of an nnx.Module, a "
        "linen module, or (linen module, variables)."
    )


@contextmanager
def report_model_errors(debug: bool) -> Iterator[None]:
    """Print an error of a running model in one line, and exit with code 1; errors of this library pass through."""
    try:
        yield
    except BridgeError:
        raise
    except _USER_CODE_ERRORS as err:
        if debug:
            raise
        raise error_exit(f"a model cannot run: {_first_line(err)} (--debug shows where)") from err


def _first_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0] if lines else ''}"


def _written(mesh: AbstractMesh) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def _variables_hint(spec: str, module: linen.Module) -> str:
    """The message for a linen module, with the factory of its variables to write."""
    name, _, attribute = spec.partition(":")
    target: Any = sys.modules[name]
    for part in attribute.split("."):
        target = getattr(target, part)
    call = attribute if isinstance(target, linen.Module) else f"{attribute}()"
    factory = f"{attribute.replace('.', '_').lower()}_variables"
    return (
        f"--template {spec} gives a linen module, which has no variables before a call. Write into "
        f"{name}, with an input that {type(module).__name__} takes,\n"
        f"  def {factory}():\n"
        f"      import jax\n"
        f"      return {call}.init(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))\n"
        f"and use --template {name}:{factory}"
    )


def build(
    spec: str, debug: bool, make: Callable[[Any], Any] | None = None, mesh: AbstractMesh | None = None
) -> Any:
    """What a factory returns, by default abstract: a module on the meta device, or ``jax.ShapeDtypeStruct``.

    Without a mesh, the axes that the metadata of a Flax module names stay names.

    Raises:
        typer.BadParameter: There is no such factory, or it raised.
    """
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise typer.BadParameter(f"{spec!r} is not a factory. Write it like package.module:factory.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # like `python -m`
    try:
        factory: Any = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        with nnx.use_eager_sharding(False) if mesh is None else jax.sharding.use_abstract_mesh(mesh):
            return (make or _make_abstract)(factory)
    except _USER_CODE_ERRORS as err:
        if debug:
            raise
        sized = (
            ""
            if mesh is None
            else f". It ran on --mesh {_written(mesh)}, which must size every axis it names"
        )
        raise typer.BadParameter(f"{spec}: {_first_line(err).removesuffix('.')}{sized}") from err
    except SystemExit as err:
        # A script without a guard around its main. Nothing was done, so exit code 0 would be wrong.
        raise typer.BadParameter(
            f"{spec}: the module ends the program when it is imported or called (SystemExit: {err}). Put its "
            "main code under if __name__ == '__main__'."
        ) from err


def _make_concrete(factory: Any) -> Any:
    if not callable(factory) or isinstance(factory, nn.Module | nnx.Module | linen.Module):
        return factory
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        return _constructed(factory)
    return factory()


def _constructed(cls: Any) -> nnx.Module:
    """An nnx module of a class whose constructor takes nothing, or ``rngs`` alone."""
    taken = () if cls.__init__ is object.__init__ else inspect.signature(cls.__init__).parameters.values()
    is_random = any(one.name == "rngs" or one.kind is inspect.Parameter.VAR_KEYWORD for one in taken)
    module: nnx.Module = cls(rngs=nnx.Rngs(0)) if is_random else cls()
    return module


def _make_abstract(factory: Any) -> Any:
    if not callable(factory) or isinstance(factory, nn.Module | nnx.Module | linen.Module):
        return factory  # the name of a model, not of a factory
    if isinstance(factory, type) and issubclass(factory, nnx.Module):
        return nnx.eval_shape(lambda: _constructed(factory))
    results: list[Any] = []

    def probe() -> None:
        results.append(factory())

    # So nothing is computed or allocated, whichever framework the factory uses.
    with torch.device("meta"):
        jax.eval_shape(probe)
    built = results.pop()
    if isinstance(built, tuple) and built and isinstance(built[0], linen.Module):
        return built[0]  # its variables were traced, and a run makes new ones
    if isinstance(built, nn.Module) or not _is_traced(built):
        return built
    if isinstance(built, nnx.Module):
        return nnx.eval_shape(factory)
    return jax.eval_shape(factory)


def _is_traced(tree: Any) -> bool:
    leaves = jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
