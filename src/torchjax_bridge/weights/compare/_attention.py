"""An attention written by hand, recomputed from its queries, keys and values in the variants that a model may have.

Queries, keys and values are the outputs of three layers or the parts of one. First the variant is found that
gives torch's array. Then one thing at a time is changed until the result is Flax's. Knows nothing about models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np

from ._probes import Close, Diagnosis, NamedArray

__all__ = ["attention_difference"]

_MOST = 2_000_000  # scores of one attention


@dataclass(frozen=True)
class _Variant:
    """How an attention is computed.

    Attributes:
        order: Which of the three parts are the query, the key and the value.
        parts: How the features of one layer are split: into ``q, k, v``, by head first, or last inside each head.
        heads: How many there are.
        scale: The factor of the scores, as code.
        causal: Whether later positions are masked.
        axis: The axis of the scores that sums to one.
        merged: Whether the heads are moved back beside their features before they are merged.
    """

    order: tuple[int, ...]
    parts: str
    heads: int
    scale: str = "head_dim ** -0.5"
    causal: bool = False
    axis: int = -1
    merged: bool = True


def attention_difference(
    ours: np.ndarray, theirs: np.ndarray, known: Sequence[NamedArray], close: Close
) -> Diagnosis | None:
    """What Flax's attention does differently, if both arrays are attentions over known arrays."""
    if ours.ndim != 3 or ours.shape != theirs.shape:
        return None
    for name, parts in _sources(known, ours.shape):
        heads = [count for count in range(1, ours.shape[-1] + 1) if ours.shape[-1] % count == 0]
        heads = [count for count in heads if count * ours.shape[1] * parts[0].shape[1] <= _MOST]
        orders: list[tuple[int, ...]] = [(0, 1, 2)] if len(parts) == 1 else [*permutations(range(3))]
        basic = [
            way
            for kind in (_SPLITS if len(parts) == 1 else ("",))
            for order in orders
            for count in heads
            for way in (
                _Variant(order, kind, count),
                _Variant(order, kind, count, scale="1"),
                _Variant(order, kind, count, causal=True),
            )
        ]
        truth = next((way for way in basic if _gives(way, parts, ours, close)), None)
        if truth is None:
            continue
        for way, says, fix in _variants(truth, heads, one=len(parts) == 1):
            if _gives(way, parts, theirs, close):
                return Diagnosis("attention", f"in the attention of {name} {says}", fix)
    return None


_SPLITS = ("q, k, v", "heads first", "q, k, v in each head, last")


def _sources(known: Sequence[NamedArray], shape: tuple[int, ...]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The arrays that may hold queries, keys and values: one layer's output, or three layers'."""
    outputs = [one for one in known if one.array.ndim == 3 and one.array.shape[0] == shape[0]]
    for one in outputs:
        if one.array.shape == (*shape[:2], 3 * shape[2]):
            yield one.name, [one.array]
    alike = [one for one in outputs if one.array.shape == shape and one.name.startswith("the output")]
    for three in combinations(alike[:5], 3):
        earliest = three[::-1]
        yield (
            f"{earliest[0].name}, {earliest[1].name} and {earliest[2].name}",
            [one.array for one in earliest],
        )


def _gives(way: _Variant, parts: Sequence[np.ndarray], array: np.ndarray, close: Close) -> bool:
    """Whether a variant gives an array; the first sequence alone is tried first, since most variants fail."""
    first = [part[:1] for part in parts]
    return close(array[:1], _compute(way, first)) and close(array, _compute(way, parts))


def _compute(way: _Variant, parts: Sequence[np.ndarray]) -> np.ndarray:
    three = _split_fused(way, parts[0]) if len(parts) == 1 else [_split(part, way.heads) for part in parts]
    query, key, value = (three[place] for place in way.order)
    width = query.shape[-1] * way.heads
    factors = {"1": 1.0, "dim ** -0.5": width**-0.5, "1 / head_dim": 1 / query.shape[-1]}
    scores = query @ key.swapaxes(-1, -2) * query.dtype.type(factors.get(way.scale, query.shape[-1] ** -0.5))
    if way.causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf if way.axis else 0)
    if way.axis:
        scores = np.exp(scores - scores.max(way.axis, keepdims=True))
        scores = scores / scores.sum(way.axis, keepdims=True)
    result = scores @ value
    result = result.swapaxes(1, 2) if way.merged else result
    return result.reshape(len(result), -1, width)


def _split(part: np.ndarray, heads: int) -> np.ndarray:
    return part.reshape(*part.shape[:2], heads, -1).swapaxes(1, 2)


def _split_fused(way: _Variant, fused: np.ndarray) -> list[np.ndarray]:
    n, length, width = fused.shape
    size = width // 3 // way.heads
    if way.parts == "q, k, v":
        return [_split(part, way.heads) for part in np.split(fused, 3, -1)]
    if way.parts == "heads first":
        return list(fused.reshape(n, length, way.heads, 3, size).transpose(3, 0, 2, 1, 4))
    return list(fused.reshape(n, length, way.heads, size, 3).transpose(4, 0, 2, 1, 3))


def _variants(truth: _Variant, heads: Sequence[int], *, one: bool) -> Iterator[tuple[_Variant, str, str]]:
    """The variants that differ in one thing, or in order and parts; each with its description and the fix."""
    names = ("query", "key", "value")
    shown = ", ".join
    for parts in _SPLITS if one else (truth.parts,):
        for order in permutations(range(3)):
            way = replace(truth, order=order, parts=parts)
            if way == truth:
                continue
            roles = {place: role for role, place in zip(names, way.order, strict=True)}
            right = {place: role for role, place in zip(names, truth.order, strict=True)}
            if parts == truth.parts:
                mine, other = (shown(role[place] for place in range(3)) for role in (right, roles))
                yield way, f"Flax takes as {other} what is {mine} in torch", "take them in torch's order"
            else:
                yield (
                    way,
                    f"torch parts the features as {truth.parts}, Flax as {parts}",
                    "part them as torch does",
                )
    for scale in ("1", "dim ** -0.5", "1 / head_dim", "head_dim ** -0.5"):
        if scale != truth.scale:
            says = f"torch multiplies the scores by {truth.scale}, Flax by {scale}"
            yield replace(truth, scale=scale), says, f"multiply them by {truth.scale}"
    where = "over the keys" if truth.axis == -1 else "over the queries"
    yield (
        replace(truth, axis=-2),
        f"torch takes the softmax {where}, Flax over the queries",
        "take it over the last axis",
    )
    yield (
        replace(truth, axis=0),
        "torch takes a softmax of the scores, and Flax none",
        "take jax.nn.softmax of them",
    )
    if truth.causal:
        yield (
            replace(truth, causal=False),
            "torch hides later positions, and Flax does not",
            "mask them in Flax",
        )
    else:
        yield (
            replace(truth, causal=True),
            "Flax hides later positions, and torch does not",
            "do not mask them",
        )
    for count in heads:
        if count != truth.heads:
            yield (
                replace(truth, heads=count),
                f"torch has {truth.heads} heads, Flax {count}",
                f"take {truth.heads}",
            )
    fix = "swap the axes of heads and positions before the reshape"
    yield (
        replace(truth, merged=False),
        "Flax merges the heads without moving them back behind the positions",
        fix,
    )
