"""What was done to one array and not to the other: an activation, a dropout, a scale, a residual, another order.

Each probe computes: it names a relation only if the numbers have it, and never by what is usual. Both arrays
lie as the Flax model has them (channels last); the first is torch's. Knows nothing about models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import isqrt

import numpy as np
import torch
from torch.nn import functional

__all__ = [
    "ACTIVATIONS",
    "Close",
    "Diagnosis",
    "NamedArray",
    "apply_torch",
    "find_permutation",
    "has_moved_rows",
    "run_probes",
]


@dataclass(frozen=True)
class Diagnosis:
    """Why two arrays differ.

    Attributes:
        kind: One word for it, as `Cause` has it.
        message: What it is, as the end of a sentence that begins with the place.
        fix: What to do.
    """

    kind: str
    message: str
    fix: str


@dataclass(frozen=True)
class NamedArray:
    """An array with a name for messages, often an earlier one on which both models agree.

    Attributes:
        name: What it is.
        array: Its values.
        reach: What the models do with it, beside an activation, to make one of the two arrays of it. It gives
        None where that cannot be done.
    """

    name: str
    array: np.ndarray
    reach: Callable[[np.ndarray], np.ndarray | None] = lambda array: array


Close = Callable[[np.ndarray, np.ndarray], bool]
Earlier = Sequence[NamedArray]


def run_probes(
    ours: np.ndarray,
    theirs: np.ndarray,
    earlier: Earlier,
    maps: Sequence[tuple[int, ...]],
    close: Close,
) -> Diagnosis | None:
    """The first relation that two different arrays have.

    Args:
        ours: torch's array.
        theirs: Flax's, of the same shape.
        earlier: What earlier layers took and gave, where both models agreed; the latest first.
        maps: The shapes ``(C, *space)`` of earlier feature maps; the latest first.
        close: Whether two arrays of one shape are equal but for rounding.
    """
    if not ours.size or ours.dtype.kind not in "fc" or theirs.dtype.kind not in "fc":
        return None
    probes = (
        lambda: _flatten_order(ours, theirs, maps, close),
        lambda: _other_activation(ours, theirs, earlier, close),
        lambda: _dropout(ours, theirs, close),
        lambda: _scale(ours, theirs, close),
        lambda: _residual(ours, theirs, earlier, close),
        lambda: _permutation(ours, theirs, close),
    )
    for probe in probes:
        if (found := probe()) is not None:
            return found
    return None


# --- order -------------------------------------------------------------------------------------------


def _flatten_order(
    ours: np.ndarray, theirs: np.ndarray, maps: Sequence[tuple[int, ...]], close: Close
) -> Diagnosis | None:
    """The order of flattened features: ``(C, *space)`` in torch, ``(*space, C)`` in Flax."""
    if ours.ndim != 2:
        return None
    width = ours.shape[1]
    shapes = [shape for shape in maps if np.prod(shape) == width]
    shapes += [_square(channels, width // channels) for channels in range(2, width) if width % channels == 0]
    for channels, *space in shapes:
        shape = (channels, *space)
        turned = ours.reshape(len(ours), channels, -1).swapaxes(1, 2).reshape(ours.shape)
        if close(turned, theirs):
            return Diagnosis(
                "flatten order",
                f"torch flattens {shape}, channels first, and Flax flattens the same map channels last",
                f'convert with rules=[Flatten("{{layer}}", {shape})], or move the channels to the front in Flax '
                "before flattening",
            )
    return None


def _square(channels: int, positions: int) -> tuple[int, ...]:
    side = isqrt(positions)
    return (channels, side, side) if side * side == positions else (channels, positions)


def _permutation(ours: np.ndarray, theirs: np.ndarray, close: Close) -> Diagnosis | None:
    """The same values in another order."""
    axes = find_permutation(ours, theirs, close)
    if axes is not None:
        return Diagnosis(
            "axes",
            f"Flax has torch's values with the axes {axes}",
            "transpose them back, or do not transpose them",
        )
    for axis in range(ours.ndim):
        if close(np.flip(ours, axis), theirs):
            return Diagnosis(
                "axes", f"Flax has torch's values in reverse along axis {axis}", "do not turn them round"
            )
    if ours.dtype.kind == "f" and close(np.sort(ours, axis=None), np.sort(theirs, axis=None)):
        return Diagnosis(
            "order",
            "Flax has the same values in another order",
            "look at the concatenations, reshapes and transposes in front",
        )
    return None


def find_permutation(ours: np.ndarray, theirs: np.ndarray, close: Close) -> tuple[int, ...] | None:
    """The permutation of axes that turns the one array into the other; None if there is none."""
    if ours.ndim > 5:
        return None
    for axes in permutations(range(ours.ndim)):
        turned = ours.transpose(axes)
        if axes != tuple(range(ours.ndim)) and turned.shape == theirs.shape and close(turned, theirs):
            return axes
    return None


def has_moved_rows(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two matrices have the same rows in another order."""
    if ours.ndim != 2 or ours.shape != theirs.shape or np.array_equal(ours, theirs):
        return False
    first, other = (rows[np.lexsort(rows.T[::-1])] for rows in (ours, theirs))
    return np.array_equal(first, other)


# --- values ------------------------------------------------------------------------------------------

_GELU, _TANH_GELU = "gelu(approximate=False)", "gelu(approximate=True)"

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    _GELU: functional.gelu,
    _TANH_GELU: lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu(negative_slope=0.01)": functional.leaky_relu,
    "leaky_relu(negative_slope=0.1)": lambda x: functional.leaky_relu(x, 0.1),
    "leaky_relu(negative_slope=0.2)": lambda x: functional.leaky_relu(x, 0.2),
    "elu": functional.elu,
    "selu": functional.selu,
    "relu6": functional.relu6,
    "softplus": functional.softplus,
    "mish": functional.mish,
    "hard_swish": functional.hardswish,
    "hard_sigmoid": functional.hardsigmoid,
    "log_sigmoid": functional.logsigmoid,
    "soft_sign": functional.softsign,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
}


def _other_activation(
    ours: np.ndarray, theirs: np.ndarray, earlier: Earlier, close: Close
) -> Diagnosis | None:
    """An activation on one side alone, or two different ones of the same earlier array."""
    if ours.dtype.kind == "c" or theirs.dtype.kind == "c" or not ours.ndim:
        return None
    name = _activation(NamedArray("", theirs), ours, close)
    if name is not None:
        return _activation_diagnosis(name, None)
    name = _activation(NamedArray("", ours), theirs, close)
    if name is not None:
        return _activation_diagnosis(None, name)
    for before in earlier:
        if before.array.dtype.kind == "f" and (here := _activation(before, ours, close)):
            there = _activation(before, theirs, close)
            if there and here != there:
                return _activation_diagnosis(here, there)
    return None


def _activation(before: NamedArray, after: np.ndarray, close: Close) -> str | None:
    """The activation that makes one array the other."""
    array = before.array.astype(np.float32) if before.array.dtype.itemsize < 4 else before.array
    reached = before.reach(array)
    if reached is None or reached.shape != after.shape:
        return None
    few = _rows(array) if reached is array else None
    for name, function in ACTIVATIONS.items():
        if few is not None and not close(_rows(after), apply_torch(function, few)):
            continue  # a few rows suffice to say no
        result = before.reach(apply_torch(function, array))
        if result is not None and close(after, result):
            return name
    # The ratio of two slopes looks like a slope, so it counts only for an array in front of both.
    slope = _ratio(after, array, array < 0) if reached is array and before.name else None
    if slope is not None and 0 < slope < 1 and close(after, np.where(array < 0, slope * array, array)):
        return f"leaky_relu(negative_slope={slope:.4g})"
    return None


def apply_torch(function: Callable[[torch.Tensor], torch.Tensor], array: np.ndarray) -> np.ndarray:
    """A torch function of a numpy array."""
    return function(torch.from_numpy(np.array(array))).numpy()


def _rows(array: np.ndarray) -> np.ndarray:
    """Up to 256 rows of an array, evenly spaced; a row lies along the last axis."""
    rows = array.reshape(-1, array.shape[-1])
    return rows[:: max(1, len(rows) // 256)]


def _activation_diagnosis(ours: str | None, theirs: str | None) -> Diagnosis:
    if {ours, theirs} == {_GELU, _TANH_GELU}:
        return Diagnosis("gelu", f"torch computes {ours}, Flax {theirs}", f"call jax.nn.{ours} in Flax")
    if theirs is None:
        return Diagnosis(
            "activation", f"torch applies {ours} and Flax does not", f"call jax.nn.{ours} in Flax"
        )
    if ours is None:
        return Diagnosis(
            "activation", f"Flax applies {theirs} and torch does not", f"take {theirs} out of Flax"
        )
    return Diagnosis("activation", f"torch applies {ours}, Flax {theirs}", f"call jax.nn.{ours} in Flax")


def _dropout(ours: np.ndarray, theirs: np.ndarray, close: Close) -> Diagnosis | None:
    """An active dropout: zeros on one side, and all other elements larger by one factor."""
    for here, there, side, switch in (
        (theirs, ours, "Flax", "call flax_model.eval(), or pass deterministic=True"),
        (ours, theirs, "torch", "call torch_module.eval()"),
    ):
        gone, kept = (here == 0) & (there != 0), (here != 0) & (there != 0)
        factor = _ratio(here, there, kept)
        other = (there == 0) & (here != 0)  # then the other side drops elements too
        if factor is None or factor < _LEAST_DROPOUT or not gone.any() or other.any():
            continue
        if close(np.where(kept, here / factor, 0), np.where(kept, there, 0)):
            rate = 1 - 1 / factor
            return Diagnosis("dropout", f"a dropout of rate {rate:.2g} is active in {side}", switch)
    both = (ours != 0) & (theirs != 0)
    other = (ours == 0) != (theirs == 0)
    if both.any() and other.any() and close(np.where(both, ours, 0), np.where(both, theirs, 0)):
        return Diagnosis(
            "dropout",
            "a dropout is active in both, and each draws a mask of its own",
            "call eval() on both models; masks of two frameworks never agree",
        )
    return None


_LEAST_DROPOUT = 1.001  # the factor of a dropout with a rate of 0.001


def _ratio(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> float | None:
    """One array as a multiple of the other, by their largest element."""
    where = where & np.isfinite(one) & np.isfinite(other)
    if not where.any():
        return None
    place = np.argmax(np.where(where, np.abs(other), 0))
    return float(np.real(one.ravel()[place] / other.ravel()[place]))


def _residual(ours: np.ndarray, theirs: np.ndarray, earlier: Earlier, close: Close) -> Diagnosis | None:
    """The output of an earlier layer, added on one side alone: a residual connection."""
    for one in earlier:
        before, name = one.array, one.name
        if before.shape == ours.shape and before.dtype.kind == "f" and before.any():
            if close(ours, theirs + before):
                return Diagnosis("residual", f"torch adds {name}, and Flax does not", f"add {name} in Flax")
            if close(ours + before, theirs):
                return Diagnosis(
                    "residual", f"Flax adds {name}, and torch does not", f"do not add {name} in Flax"
                )
    return None


def _scale(ours: np.ndarray, theirs: np.ndarray, close: Close) -> Diagnosis | None:
    """One array is a multiple of the other."""
    factor = _ratio(theirs, ours, ours != 0)
    if ours.size < 2 or not factor or not np.isfinite(factor) or not close(ours * factor, theirs):
        return None
    return Diagnosis(
        "scale", f"Flax has {factor:.6g} times torch's values", f"divide by {factor:.6g} in Flax"
    )
