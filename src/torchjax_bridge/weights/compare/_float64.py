"""Two models in float64, for a comparison that rounding would decide.

A norm over values that hardly vary magnifies rounding, and so does a deep model. In float64 rounding errors
vanish and mistakes stay. Makes both copies; compares only their weights.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from torchjax_bridge.exchange import Path

from ..trees import read_flax
from ._compare import Bounds, compare
from ._copies import map_arrays
from ._record import MODEL_ERRORS
from ._steps import Step, with_torch_input
from ._twins import Twins
from ._values import gap

__all__ = [
    "FLOAT64_ERRORS",
    "flax_in_float64",
    "in_float64",
    "inputs_in_float64",
    "torch_in_float64",
    "weight_gap",
]

# What a model raises where its code insists on float32, or where it cannot be copied (one under FSDP asserts that).
FLOAT64_ERRORS = (*MODEL_ERRORS, RuntimeError, AssertionError)


@contextmanager
def in_float64() -> Iterator[None]:
    """Make float64 the default dtype of both frameworks, for models that name none."""
    before = torch.get_default_dtype()
    with jax.enable_x64(True), flax.linen.intercept_methods(_with_wide_dtype):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def torch_in_float64(module: nn.Module) -> nn.Module:
    """A copy of a torch model, its floating tensors widened."""
    return copy.deepcopy(module).double()


def flax_in_float64(twins: Twins, *, torchs: bool) -> Any:
    """The Flax model with its floating arrays widened; with torch's weights, or with its own.

    Call it in `in_float64`.
    """
    leaves = twins.flax_tree.root.flat().values()
    wide = {leaf.path: jnp.asarray(leaf.value, jnp.float64) for leaf in leaves if _is_float(leaf.dtype)}
    if torchs:
        wide.update({path: jnp.asarray(want, jnp.float64) for path, want, _ in twins.pairs() if path in wide})
    filled = twins.flax_tree.fill(wide)
    if twins.variables is not None:
        return twins.model, filled
    for node in read_flax(filled).root.walk():
        if node.module is not None:
            _widen_dtype(node.module)
    return filled


def weight_gap(twins: Twins, steps: Sequence[Step], bounds: Bounds) -> float:
    """How far the weights of two models are apart, if that is rounding; infinite if it is more.

    Weights that both sides trained differ by rounding. Each may differ by what passes for rounding, relative to
    the largest of its tensor. It may differ by more (a bias near zero, a mean near zero) if its layer, given
    torch's input, still gives the same output.
    """
    most, near, far = 0.0, {}, set[Path]()
    for path, want, have in twins.pairs():
        if want.shape != have.shape:
            return float("inf")
        if bounds.allow(found := gap(want, have)):
            near[path], most = want, max(most, found.relative)
        else:
            far.add(path)
    if not far:
        return most
    own, torchs = twins.rerun(near), twins.rerun_refilled()
    for step in steps:
        mine = twins.leaves_of(step.torch.path)
        if step.flax is not None and not far.isdisjoint(mine):
            call = with_torch_input(step.flax, step.inputs(bounds))
            one, other = own(call, {}), torchs(call, {})
            output = compare(step.module, one, other, bounds) if one and other else None
            if output is None or not output.ok:
                return float("inf")
            far -= mine
    return most if not far else float("inf")


def inputs_in_float64(tree: Any) -> Any:
    """The inputs of a comparison, with floating tensors widened."""

    def wide(_: Path, array: Any) -> Any:
        is_wide = isinstance(array, torch.Tensor) and array.is_floating_point()
        return array.detach().double() if is_wide else array

    return map_arrays(tree, wide)


def _with_wide_dtype(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    _widen_dtype(context.module)
    return call(*args, **kwargs)


def _widen_dtype(module: Any) -> None:
    """Let a layer compute in float64 where its ``dtype`` says less."""
    said = getattr(module, "dtype", None)
    if isinstance(said, str | np.dtype | type(jnp.float32) | type) and _is_float(jnp.dtype(said)):
        object.__setattr__(module, "dtype", jnp.float64)  # bypasses linen's and nnx's __setattr__


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
