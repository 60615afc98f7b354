"""What two arrays are, as formulas of earlier arrays: a sum, a gate, a pooling, a choice of channels.

No single step may turn torch's array into Flax's, yet each may be a formula of arrays that both models computed
before. Each formula is computed and compared, so every diagnosis is proved by the numbers. Arrays lie as the
Flax model has them. Knows nothing about models.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np

from ._formulas import (
    Compute,
    Formula,
    Places,
    activate,
    compute_activation,
    matching_pair,
    phrase,
    rows_at,
    sample_rows,
)
from ._probes import ACTIVATIONS, Close, Diagnosis, NamedArray

__all__ = ["differing_formulas"]


def differing_formulas(
    ours: np.ndarray,
    theirs: np.ndarray,
    earlier: Sequence[NamedArray],
    own: Sequence[NamedArray],
    close: Close,
) -> Diagnosis | None:
    """Find one formula that gives torch's array and another that gives Flax's.

    Args:
        ours: torch's array.
        theirs: Flax's, of the same shape.
        earlier: What earlier layers took and gave, where both models agreed; the latest first.
        own: torch's parameters and buffers.
        close: Whether two arrays of one shape are equal but for rounding.
    """
    if ours.shape != theirs.shape or ours.ndim < 2 or ours.dtype.kind != "f" or theirs.dtype.kind != "f":
        return None
    known = _distinct(earlier)
    for probe in (_parameter, _shortcut_alone, _factor, _pooling, _gate, _shortcut, _channels):
        if (found := probe(ours, theirs, own if probe is _parameter else known, close)) is not None:
            return found
    return None


def _distinct(earlier: Sequence[NamedArray]) -> list[NamedArray]:
    """Each array once: the input of a layer is often the output of the one before."""
    found: dict[tuple[object, ...], NamedArray] = {}
    for one in earlier:
        if one.array.dtype.kind == "f" and one.array.ndim > 1:
            found.setdefault((one.array.shape, one.array.reshape(-1)[:64].tobytes()), one)
    return list(found.values())


# --- sums ----------------------------------------------------------------------------------------------


def _parameter(
    ours: np.ndarray, theirs: np.ndarray, own: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """A parameter that one side adds, such as a table of positions."""
    for one in own:
        for array in _broadcastable(one.array, ours.shape):
            for more, less, side, other in ((ours, theirs, "torch", "Flax"), (theirs, ours, "Flax", "torch")):
                if close(more, less + array):
                    fix = f"add it in {other}" if other == "Flax" else "do not add it in Flax"
                    return Diagnosis("parameter", f"{side} adds {one.name}, and {other} does not", fix)
    return None


def _broadcastable(array: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The arrays of this shape that a parameter may be added as: its beginning, or with its channels last."""
    if array.dtype.kind != "f" or not array.any() or not 1 < array.ndim <= len(shape):
        return
    ways = [array, np.moveaxis(array, 1, -1), np.moveaxis(array, 0, -1)] if array.ndim > 2 else [array]
    for way in ways:
        if way.ndim > 1 and way.shape[-2] > shape[-2]:
            way = way[..., : shape[-2], :]
        try:
            if np.broadcast_shapes(way.shape, shape) == shape:
                yield way
        except ValueError:
            continue


def _factor(
    ours: np.ndarray, theirs: np.ndarray, known: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """A term of a sum with another factor: an embedding or a residual that one side scales."""
    apart = ours.astype(np.float64) - theirs
    for one in known:
        if one.array.shape == ours.shape and one.array.any():
            place = np.abs(one.array).argmax()
            factor = float(apart.flat[place] / one.array.flat[place])
            if factor and close(ours, (theirs + factor * one.array).astype(ours.dtype)):
                side = "more" if factor > 0 else "less"
                message = f"torch has {abs(factor):.6g} times {one.name} {side} than Flax"
                return Diagnosis("scale", message, "multiply it by torch's factor in Flax")
    return None


_ACTIVATIONS_BEHIND = ("", "relu", "silu", "gelu(approximate=False)", "tanh")


def _shortcut_alone(
    ours: np.ndarray, theirs: np.ndarray, known: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """A branch that starts elsewhere: before a norm and its activation, say, instead of after."""
    alike = [one for one in known if one.array.shape == ours.shape]
    formulas = [
        Formula(phrase(name, one.name), partial(compute_activation, name, one.array))
        for name, one in product(("", *ACTIVATIONS), alike)
    ]
    if (pair := matching_pair(ours, theirs, formulas, close)) is None:
        return None
    mine, other = pair[0].text, pair[1].text
    return Diagnosis("shortcut", f"torch takes {mine}, Flax {other}", f"take {mine} in Flax")


def _shortcut(
    ours: np.ndarray, theirs: np.ndarray, known: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """A shortcut that starts elsewhere, has another activation or padding, or is missing."""
    alike = [one for one in known if one.array.shape == ours.shape]
    terms = [*_terms(known, ours.shape)]
    for body, behind in product(alike, _ACTIVATIONS_BEHIND):
        start = partial(rows_at, body.array)
        formulas = [Formula("nothing", partial(_compute_sum, behind, start, None))]
        formulas += [
            Formula(term.text, partial(_compute_sum, behind, start, term.compute))
            for term in terms
            if term.of is not body
        ]
        if (pair := matching_pair(ours, theirs, formulas, close)) is not None:
            mine, other = pair[0].text, pair[1].text
            kind = "residual" if "nothing" in (mine, other) else "shortcut"
            return Diagnosis(kind, f"to {body.name} torch adds {mine}, Flax {other}", f"add {mine} in Flax")
    return None


def _compute_sum(behind: str, one: Compute, other: Compute | None, places: Places) -> np.ndarray:
    return activate(behind, one(places) + other(places) if other is not None else one(places))


def _compute_product(
    behind: str, array: np.ndarray, name: str, gate: np.ndarray, places: Places
) -> np.ndarray:
    return activate(behind, rows_at(array, places)) * activate(name, rows_at(gate, places))


def _terms(known: Sequence[NamedArray], shape: tuple[int, ...]) -> Iterator[Formula]:
    """Terms of a sum: a known array, an activation of it, or the array downsampled and padded with channels."""
    for one in known:
        if one.array.shape == shape:
            for name in ("", *ACTIVATIONS):
                yield Formula(phrase(name, one.name), partial(compute_activation, name, one.array), one)
        elif one.array.ndim == len(shape) == 4 and one.array.shape[0] == shape[0]:
            for text, array in _downsampled(one, shape):
                yield Formula(text, partial(rows_at, array), one)


def _downsampled(one: NamedArray, shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """A shortcut without weights: fewer positions, and channels of zeros (option A of ResNet)."""
    array, more = one.array, shape[-1] - one.array.shape[-1]
    steps = [-(-size // small) for size, small in zip(array.shape[1:3], shape[1:3], strict=True)]
    if more < 0 or (more == 0 and steps == [1, 1]):
        return
    for name in ("", "relu"):
        base = activate(name, array)
        ways = {"every position": base} if steps == [1, 1] else {}
        if steps != [1, 1]:
            ways["every second position"] = base[:, :: steps[0], :: steps[1]]
            ways["every second position from the second"] = base[:, 1 :: steps[0], 1 :: steps[1]]
            if all(size % step == 0 for size, step in zip(base.shape[1:3], steps, strict=True)):
                n, h, w, c = base.shape
                apart = base.reshape(n, h // steps[0], steps[0], w // steps[1], steps[1], c)
                ways["the mean of every window"] = apart.mean((2, 4))
                ways["the largest of every window"] = apart.max((2, 4))
        for text, part in ways.items():
            if part.shape[:3] != shape[:3]:
                continue
            for where, pads in {
                "on both sides": (more // 2, more - more // 2), "behind": (0, more), "in front": (more, 0)
            }.items():  # fmt: skip
                padded = np.pad(part, ((0, 0), (0, 0), (0, 0), pads))
                zeros = f" with {more} channels of zeros {where}" if more else ""
                yield f"{text} of {phrase(name, one.name)}{zeros}", padded


# --- products ------------------------------------------------------------------------------------------


def _gate(
    ours: np.ndarray, theirs: np.ndarray, known: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """A gate with another activation, or with none."""
    alike = [one for one in known if one.array.shape == ours.shape]
    gates = [(one, wide) for one in known if (wide := _broadcast_gate(one.array, ours.shape)) is not None]
    for body, before in product(alike, ("", "relu", "silu", "gelu(approximate=False)", "hard_swish")):
        for gate, wide in gates:
            if gate is body:
                continue
            formulas = [
                Formula(phrase(name, gate.name), partial(_compute_product, before, body.array, name, wide))
                for name in ("", *ACTIVATIONS)
            ]
            formulas.append(Formula("nothing", partial(compute_activation, before, body.array)))
            if (pair := matching_pair(ours, theirs, formulas, close)) is not None:
                mine, other = pair[0].text, pair[1].text
                message = f"{phrase(before, body.name)} is multiplied by {mine} in torch, by {other} in Flax"
                return Diagnosis("gate", message, f"multiply by {mine} in Flax")
    return None


def _broadcast_gate(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A gate for each channel, or each element, broadcast to a shape; None if it is none."""
    if array.shape[0] != shape[0] or array.shape[-1] not in (1, shape[-1]):
        return None
    if array.shape != shape:
        if any(size != 1 for size in array.shape[1:-1]):
            return None
        array = array.reshape(shape[0], *(1,) * (len(shape) - 2), array.shape[-1])
    return np.broadcast_to(array, shape)


# --- poolings ------------------------------------------------------------------------------------------

_POOLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the mean": lambda x: x.mean(1),
    "the largest": lambda x: x.max(1),
    "the sum": lambda x: x.sum(1),
    "the smallest": lambda x: x.min(1),
    "the first": lambda x: x[:, 0],
    "the last": lambda x: x[:, -1],
    "the mean without the first": lambda x: x[:, 1:].mean(1),
    "the largest without the first": lambda x: x[:, 1:].max(1),
}


def _pooling(
    ours: np.ndarray, theirs: np.ndarray, known: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """Another reduction of a sequence or a map to one vector."""
    rest = int(np.prod(ours.shape[1:]))
    for one, name in product(known, ("", "relu", "silu", "gelu(approximate=False)", "hard_swish", "tanh")):
        array = one.array
        if array.ndim < 3 or array.shape[0] != ours.shape[0] or array.shape[-1] != rest:
            continue
        positions = activate(name, array).reshape(array.shape[0], -1, array.shape[-1])
        if positions.shape[1] < 2:
            continue
        formulas = [
            Formula(text, partial(_compute_pool, pool, positions, ours.shape))
            for text, pool in _POOLS.items()
        ]
        if (pair := matching_pair(ours, theirs, formulas, close)) is not None:
            mine, other = pair
            message = (
                f"torch takes {mine.text} of the positions of {phrase(name, one.name)}, Flax {other.text}"
            )
            return Diagnosis("pooling", message, f"take {mine.text} in Flax")
    return None


def _compute_pool(
    pool: Callable[[np.ndarray], np.ndarray], array: np.ndarray, shape: tuple[int, ...], places: Places
) -> np.ndarray:
    return rows_at(pool(array).reshape(shape), places)


# --- channels ------------------------------------------------------------------------------------------

_MOST = 2048  # channels that are compared


def _channels(
    ours: np.ndarray, theirs: np.ndarray, known: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """Other channels of known arrays, or another order: swapped halves, another concatenation."""
    few, columns = sample_rows(ours.shape), list[np.ndarray]()
    labels = list[str]()
    for one, name in product(known, ("", "relu")):
        if one.array.shape[:-1] == ours.shape[:-1] and len(labels) < _MOST:
            columns.append(compute_activation(name, one.array, few))
            labels += [f"{number} of {phrase(name, one.name)}" for number in range(one.array.shape[-1])]
    if not columns or len(few) < 4:
        return None
    pool = np.concatenate(columns, -1).T
    found = [_match_channels(rows_at(array, few).T, pool, close) for array in (ours, theirs)]
    if found[0] is None or found[1] is None or found[0] == found[1]:
        return None
    place = next(
        place for place, (mine, other) in enumerate(zip(found[0], found[1], strict=True)) if mine != other
    )
    mine, other = labels[found[0][place]], labels[found[1][place]]
    same = sorted(found[0]) == sorted(found[1])
    what = "the same channels in another order" if same else "other channels"
    return Diagnosis(
        "channels",
        f"Flax takes {what}: channel {place} is channel {mine} in torch, and channel {other} in Flax",
        "look at the halves, concatenations and shuffles in front",
    )


def _match_channels(columns: np.ndarray, pool: np.ndarray, close: Close) -> list[int] | None:
    """For each channel the index of its equal in the pool; None if one has no equal."""
    scale = float(np.abs(columns).max(initial=0.0))
    found = []
    for column in columns:
        apart = np.abs(pool - column).max(1)
        place = int(apart.argmin())
        if not scale or not column.any() or not close(columns, columns + (pool[place] - column)):
            return None
        found.append(place)
    return found
