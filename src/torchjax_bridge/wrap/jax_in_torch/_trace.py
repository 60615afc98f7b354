"""Tracing: the user's JAX function runs once, on tracers, and becomes a program.

Owns the shapes and dtypes that leaves have in JAX, the flattening of results, and the note with the arguments
on an error of the user's own code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import ArgumentError, DtypeError, OutputError, UnsupportedLeafError
from torchjax_bridge.exchange import flatten, jax_dtype, refuse_in_fork, torch_dtype

from .._call import CallStructure
from ._execute import too_wide
from ._notes import NoteOnError
from ._program import JaxProgram, Origin

__all__ = ["ARRAYS", "Trace", "in_numbers", "refuse_nested", "trace"]

ARRAYS = (jax.Array, bool, int, float, complex, np.ndarray, np.generic)
"""The types that JAX accepts as arrays."""
_Tensor = torch.Tensor


@dataclass(frozen=True)
class Trace:
    """The program for one call signature, and how its results nest."""

    program: JaxProgram
    structure: Any
    """The pytree structure of the results."""
    bare: bool
    """Whether the result is one tensor, in no container."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything that a caller remembers about it."""


def trace(
    fn: Callable[..., Any],
    leaves: Sequence[Any],
    call_structure: CallStructure,
    names: Sequence[str],
    origin: Origin,
) -> Trace:
    """Run the user's Python once, on tracers."""
    refuse_in_fork(f"trace {origin.title}")
    inputs = [_abstract(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
    structures: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        args, kwargs = call_structure.unflatten(arrays)
        results, structure = _flatten_results(fn(*args, **kwargs), origin)
        structures.append(structure)
        return results

    with NoteOnError(lambda err: _note(err, origin, names, inputs)):
        program = JaxProgram.trace(flat, inputs, names, origin)
    structure = structures[-1]
    _check_outputs(program, structure)
    bare = structure == jax.tree_util.tree_structure(0)
    return Trace(program, structure, bare)


def _flatten_results(results: Any, origin: Origin) -> tuple[list[Any], Any]:
    """The leaves of the results of the user's function; raise for one that is no array."""
    try:
        leaves, structure = flatten(results)
    except UnsupportedLeafError as err:
        raise OutputError(f"the result of {origin.title} is no pytree: {err}") from err
    if all(isinstance(leaf, ARRAYS) for leaf in leaves):
        return leaves, structure
    for path, leaf in jax.tree_util.tree_flatten_with_path(results)[0]:
        if not isinstance(leaf, ARRAYS) and not hasattr(leaf, "__jax_array__"):
            raise OutputError(
                f"the result{jax.tree_util.keystr(path)} of {origin.title} is a "
                f"{type(leaf).__module__}.{type(leaf).__qualname__}, and only arrays and numbers cross to torch. "
                "Return them alone, or None."
            )
    return leaves, structure


def _abstract(leaf: Any, name: str) -> Any:
    """The shape and dtype that a leaf will have in JAX."""
    if not isinstance(leaf, _Tensor):
        try:
            return jax.typeof(leaf)
        except OverflowError as err:
            raise too_wide(name, leaf) from err
    refuse_nested(leaf, name)
    try:
        wide = jax_dtype(leaf.dtype)
    except DtypeError as err:
        raise DtypeError(f"cannot pass '{name}' to JAX: {err}") from None
    held = jax.dtypes.canonicalize_dtype(wide)
    if held != wide and wide.kind not in "iu":
        raise DtypeError(
            f"cannot pass '{name}' to JAX: dtype {leaf.dtype} needs x64, which is off. Cast it to "
            f'{torch_dtype(held)} first, or call jax.config.update("jax_enable_x64", True).'
        )
    return jax.ShapeDtypeStruct(in_numbers(leaf.shape), held)


def refuse_nested(tensor: _Tensor, name: str) -> None:
    """Raise for a nested tensor, which has no shape."""
    if tensor.is_nested:
        raise ArgumentError(
            f"{name} is a nested tensor, whose rows differ in length. Pad it first, with "
            "torch.nested.to_padded_tensor."
        )


def _check_outputs(program: JaxProgram, structure: Any) -> None:
    """Raise unless torch can hold every result. Only PRNG keys may stay in JAX."""
    if program.exports_all:
        return
    numbered = jax.tree_util.tree_unflatten(structure, range(structure.num_leaves))
    for path, i in jax.tree_util.tree_flatten_with_path(numbered)[0]:
        aval = program.outputs[i]
        if not program.exportable[i] and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
            raise OutputError(
                f"the result{jax.tree_util.keystr(path)} of {program.describe()} is {aval.str_short()}, and "
                f"torch has no dtype for {aval.dtype}. Cast it in the JAX function, for one to jnp.int8 or "
                "jnp.float32."
            )


def _note(err: BaseException, origin: Origin, names: Sequence[str], inputs: Sequence[Any]) -> str:
    """The note on an error: what JAX was tracing, and how to make a number static."""
    lines = [f"while JAX traced {origin.title}, called through {origin.wrapper} with"]
    lines += [f"  {name}: {_short(leaf)}" for name, leaf in zip(names, inputs, strict=True)]
    if isinstance(err, jax.errors.ConcretizationTypeError | jax.errors.TracerIntegerConversionError):
        fix = (
            "name its argument in as_torch_function(..., static_argnames=...); where that holds tensors too, make "
            "it a static field of its class, or an argument of its own"
            if origin.wrapper == "as_torch_function"
            else "fix it in the module: in an attribute, or in a method that as_torch_module(..., method=...) calls"
        )
        lines.append(f"if a Python number is at fault, {fix}")
    return "\n".join(lines)


def _short(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def in_numbers(shape: torch.Size) -> torch.Size:
    """The shape in numbers. A graph that is being traced with symbolic shapes is specialised to them."""
    return torch.Size(map(int, shape))
