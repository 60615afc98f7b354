"""``output_shape=``: outputs that the caller announces, because they depend on values.

Owns what may be announced, and the comparison with what was found where both are known.
"""

from typing import Any

import jax

from torchjax_bridge.errors import ArgumentError, OutputError
from torchjax_bridge.exchange import torch_dtype

from .._call import CallStructure
from ._encoding import Encoding
from ._graph import Spec
from ._inspect import Inspection
from ._trace import NeedsValues

__all__ = ["announced_outputs", "check_announced", "is_shape_function", "not_announced"]


def is_shape_function(output_shape: Any) -> bool:
    """Whether ``output_shape=`` is a function of the arguments, rather than the shapes themselves."""
    return callable(output_shape) and not hasattr(output_shape, "dtype")


def announced_outputs(
    output_shape: Any, structure: CallStructure, specs: tuple[Spec, ...]
) -> tuple[tuple[Spec, ...], Any]:
    """The shapes and dtypes that ``output_shape=`` announces for a call, and their pytree structure."""
    if is_shape_function(output_shape):
        structs = [Encoding(spec).struct() for spec in specs]
        args, kwargs = structure.unflatten(structs)
        output_shape = output_shape(*args, **kwargs)
    leaves, treedef = jax.tree_util.tree_flatten(output_shape)
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        raise ArgumentError(
            "output_shape must be a pytree of jax.ShapeDtypeStruct, or a function that returns one; it holds "
            f"{', '.join(sorted({type(leaf).__qualname__ for leaf in leaves}))}."
        )
    return tuple(Spec(tuple(leaf.shape), torch_dtype(leaf.dtype)) for leaf in leaves), treedef


def check_announced(
    output_shape: Any, found: Inspection, structure: CallStructure, specs: tuple[Spec, ...]
) -> None:
    """Raise unless ``output_shape=`` announces the outputs that were found."""
    outs, treedef = announced_outputs(output_shape, structure, specs)
    fits = treedef == found.treedef and all(map(_announces, outs, found.outs))
    if not fits:
        raise OutputError(
            f"output_shape announces {treedef} of {list(outs)}, and the torch function returns "
            f"{found.treedef} of {list(found.outs)}. Correct output_shape, or leave it out."
        )


def not_announced(why: NeedsValues) -> OutputError:
    """The error for a function whose outputs depend on values and were not announced."""
    return OutputError(
        "the shapes of this torch function's output, or its control flow, depend on values, which "
        f"cannot be known before it runs ({why.__cause__}). Pass output_shape= to as_jax_function or "
        "as_jax_module: the output as a pytree of jax.ShapeDtypeStruct, or a function that makes it from "
        "the arguments. (What depends on a number only can take it as a Python number, which is static.)"
    )


def _announces(announced: Spec, found: Spec) -> bool:
    """Whether an announced output is the one found, or the one that JAX will hold for it."""
    held = Encoding.of_output(found, "the output").struct()
    return announced in (found, Spec(held.shape, torch_dtype(held.dtype)))
