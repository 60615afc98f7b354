"""Reads the Flax side: an ``nnx.Module``, an ``nnx.State`` or linen variables become a `FlaxTree`.

Checks nothing about names and shapes: the plan does that before anything is built.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from torchjax_bridge.errors import PlanError

from .._report import what_it_is
from ._flax_tree import FlaxTree
from ._read_linen import read_linen
from ._read_nnx import read_nnx, read_state

__all__ = ["read_flax"]


def read_flax(template: Any) -> FlaxTree:
    """Read an ``nnx.Module``, an ``nnx.State`` or linen variables.

    Raises:
        PlanError: It is none of these (a linen module holds no variables: pass what ``init`` gives).
    """
    if isinstance(template, nnx.Module):
        return read_nnx(template)
    if isinstance(template, nnx.State):
        return read_state(template)
    if isinstance(template, Mapping):
        return read_linen(template)
    raise PlanError(
        f"{what_it_is(template)} is no Flax template: pass an instance of nnx.Module, an nnx.State, or the "
        "variables that a linen module's init (or jax.eval_shape of it) gives."
    )
