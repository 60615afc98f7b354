"""The arrays in what a layer takes or gives, of either framework, as numpy arrays that nobody else holds.

Also how a torch array is laid out in Flax, and how far two arrays are apart. Knows nothing about layers, except
which of torch's have their channels on the second axis.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from torchjax_bridge.exchange import Path

__all__ = [
    "Gap",
    "Value",
    "channels_in_front",
    "flax_layouts",
    "gap",
    "has_one_layout",
    "has_own_forward",
    "nearest_layout",
    "same_values",
    "tolerance",
    "values_in",
    "without_causal_tail",
]


@dataclass(frozen=True, eq=False)
class Value:
    """One array, and the name of its original dtype; dtypes that numpy lacks are held as float32.

    ``path`` is its place in the inputs or outputs of a layer: names where there are some, else indices.
    """

    array: np.ndarray
    dtype: str
    path: Path = ()


def values_in(tree: Any) -> tuple[Value, ...]:
    """Copies of the arrays in tuples, lists, mappings and dataclasses, in order of insertion."""
    return tuple(_values(tree, ()))


def _values(tree: Any, path: Path) -> Iterator[Value]:
    if isinstance(tree, torch.Tensor):
        if not tree.is_meta and tree.layout == torch.strided:
            tensor = tree.detach().resolve_conj().resolve_neg()
            wide = tensor.float() if tensor.is_floating_point() and tensor.dtype not in _NATIVE else tensor
            yield Value(wide.cpu().numpy().copy(), str(tree.dtype).removeprefix("torch."), path)
    elif isinstance(tree, jax.Array | np.ndarray):
        if jax.dtypes.issubdtype(tree.dtype, jax.dtypes.prng_key):
            return
        array = np.array(tree) if isinstance(tree, np.ndarray) else np.asarray(tree)  # JAX's is immutable
        yield Value(array if array.dtype.kind in "fciub" else array.astype(np.float32), tree.dtype.name, path)
    else:
        for name, item in _items(tree):
            yield from _values(item, (*path, name))


def _items(tree: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(tree, Mapping):
        yield from ((str(name), item) for name, item in tree.items())
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        yield from zip(tree._fields, tree, strict=True)
    elif isinstance(tree, list | tuple):
        yield from enumerate(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from ((field.name, getattr(tree, field.name, None)) for field in dataclasses.fields(tree))


_NATIVE = (torch.float16, torch.float32, torch.float64)


# --- layouts -----------------------------------------------------------------------------------------

# torch classes whose second axis is the channels, where Flax has them last.
_CHANNELS_SECOND = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.PReLU,
)  # fmt: skip
_BATCH_SECOND = (nn.RNNBase, nn.MultiheadAttention)  # unless batch_first
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNCellBase)


def channels_in_front(module: nn.Module) -> bool:
    """Whether a torch layer has its channels on the second axis."""
    return isinstance(module, _CHANNELS_SECOND)


def has_one_layout(module: nn.Module) -> bool:
    """Whether the class of a torch layer alone decides how its arrays lie in Flax.

    It does for layers with channels on the second axis. It does not where either of two leading axes may be the
    batch, nor for a subclass with its own ``forward``, which may transpose.
    """
    return isinstance(module, _CHANNELS_SECOND) and not has_own_forward(module)


def has_own_forward(module: nn.Module | None) -> bool:
    """Whether a torch layer has a ``forward`` that is not torch's own."""
    return module is not None and not (type(module).forward.__module__ or "").startswith("torch.")


def _is_over_maps(module: nn.Module | None) -> bool:
    """Whether a norm is over several axes: ``(C, H, W)`` may lie as ``(H, W, C)`` in Flax."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1


def flax_layouts(array: np.ndarray, module: nn.Module | None, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The layouts that a torch array can have in a Flax array of this shape, the likeliest first.

    For a layer of torch's own class the first is right; for a module of the caller's any may be. One side may merge
    leading axes: a Linear takes ``(N, L, C)`` as well as ``(N * L, C)``.
    """
    ways = [array]
    if array.ndim > 2:
        last, second, all_last = (
            np.moveaxis(array, 1, -1),
            np.swapaxes(array, 0, 1),
            np.moveaxis(array, 0, -1),
        )
        if isinstance(module, _CHANNELS_SECOND):
            ways = [last, all_last, array]
        elif _is_over_maps(module):
            ways = [array, last]
        elif has_own_forward(module) or not isinstance(module, (*_BATCH_SECOND, *_LAST)):
            ways = [array, last, second, all_last]
        elif isinstance(module, _LAST) or module.batch_first:
            ways = [array, second]
        else:
            ways = [second, array]
    fitting = [way for way in ways if way.shape == shape]
    if fitting:
        return fitting
    return [
        way.reshape(shape)
        for way in ways
        if way.size == np.prod(shape) and shape and way.ndim and way.shape[-1] == shape[-1]
    ]


def same_values(
    ours: np.ndarray, theirs: np.ndarray, *, whole: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two arrays of different shapes that may hold the same values in the same order, brought to one shape.

    One side may split axes (heads). One side may lack the batch, or have a batch of one: then it is broadcast.
    Whole models must give the same axes, except split ones.
    """
    axes = [tuple(size for size in array.shape if size != 1) for array in (ours, theirs)]
    if ours.size == theirs.size:
        if axes[0] != axes[1] or not whole:
            yield ours.reshape(theirs.shape), theirs
    elif not whole and min(ours.size, theirs.size) > 1:
        larger = max(ours, theirs, key=np.size).shape
        # Not if both must be broadcast, as (N,) and (N, 1).
        if all(_broadcasts(array.shape, larger) for array in (ours, theirs)):
            yield np.broadcast_to(ours, larger), np.broadcast_to(theirs, larger)


def _broadcasts(shape: tuple[int, ...], larger: tuple[int, ...]) -> bool:
    return len(shape) <= len(larger) and all(
        one in (1, other) for one, other in zip(shape[::-1], larger[::-1], strict=False)
    )


def without_causal_tail(array: np.ndarray, module: nn.Module | None, shape: tuple[int, ...]) -> np.ndarray:
    """The output of a causal convolution in torch without its tail, which the code behind it cuts off.

    torch has no causal mode: such a layer pads both sides by the whole reach of its kernel. The output without the
    last ``reach`` positions is what Flax gives with ``padding="CAUSAL"``.
    """
    if not isinstance(module, nn.Conv1d) or module.stride != (1,) or array.ndim != len(shape):
        return array
    reach = module.dilation[0] * (module.kernel_size[0] - 1)
    if module.padding != (reach,) or shape[-2] != array.shape[-1] - reach:
        return array
    return array[..., : shape[-2]]


# --- distances ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """How far two arrays are apart.

    Attributes:
        difference: The largest ``|x - y|``; infinite where one is finite and the other is not.
        relative: The same, divided by the largest ``|x|``.
    """

    difference: float
    relative: float


def gap(ours: np.ndarray, theirs: np.ndarray) -> Gap:
    """The largest difference of two arrays of one shape, and its part of the largest finite ``|ours|``."""
    if not ours.size:
        return Gap(0.0, 0.0)
    wide = np.complex128 if "c" in (ours.dtype.kind, theirs.dtype.kind) else np.float64
    x, y = ours.astype(wide), theirs.astype(wide)
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))
    finite = np.abs(x[np.isfinite(x)])
    difference, scale = float(apart.max()), float(finite.max()) if finite.size else 0.0
    if not difference:
        return Gap(0.0, 0.0)
    return Gap(difference, difference / scale if scale else float("inf"))


def nearest_layout(ways: Sequence[np.ndarray], theirs: np.ndarray) -> tuple[np.ndarray, Gap] | None:
    """The layout of the torch array that is nearest to the Flax array; None where none fits."""
    tried = [(way, gap(way, theirs)) for way in ways]
    return min(tried, key=lambda one: one[1].difference, default=None)


# What passes for rounding, relative to the largest value: that of all earlier layers, in either framework.
_ROUNDING = {"float64": 1e-11, "complex128": 1e-11, "float32": 1e-5, "complex64": 1e-5, "float16": 4e-3}


def tolerance(*dtypes: str) -> float:
    """The relative difference that passes for rounding, by the coarsest of the dtypes."""
    return max(
        (0.0 if name.startswith(("int", "uint", "bool")) else _ROUNDING.get(name, 3e-2) for name in dtypes),
        default=0.0,
    )
