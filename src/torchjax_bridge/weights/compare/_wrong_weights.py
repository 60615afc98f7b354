"""What a Flax layer holds in place of the weights that the plan moves there.

Compares arrays exactly, up to their dtype, and names what is there instead: another layer's weights, the same
in another order, or something else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from torchjax_bridge.exchange import Path, join_path

from ..pairing import Move
from ._probes import Diagnosis, find_permutation, has_moved_rows

__all__ = ["wrong_weights"]

_Arrays = list[np.ndarray]


def wrong_weights(
    torch_path: Path,
    flax_path: Path,
    moves: Mapping[Path, Sequence[Move]],
    values: Callable[[Move], tuple[_Arrays, _Arrays]],
) -> Iterator[Diagnosis]:
    """A diagnosis for every array of a Flax layer that differs from torch's.

    Args:
        torch_path: The torch layer.
        flax_path: Its Flax twin.
        moves: What the plan moves, for each torch layer.
        values: For a move: torch's arrays in Flax's layout, and the arrays that Flax holds.
    """
    for move in moves.get(torch_path, ()):
        ours, theirs = values(move)
        for path, want, have in zip(move.flax_paths, ours, theirs, strict=True):
            if not _same(want, have):
                name = f"'{join_path(path)}' of '{join_path(flax_path) or '(root)'}'"
                yield _diagnose(name, torch_path, move, want, have, moves, values)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    scale = np.abs(one.astype(wide)).max(initial=0.0)
    return bool(np.allclose(one.astype(wide), other.astype(wide), rtol=0, atol=1e-6 * scale, equal_nan=True))


def _diagnose(
    name: str,
    torch_path: Path,
    move: Move,
    want: np.ndarray,
    have: np.ndarray,
    moves: Mapping[Path, Sequence[Move]],
    values: Callable[[Move], tuple[_Arrays, _Arrays]],
) -> Diagnosis:
    keys = " + ".join(move.torch_keys)
    again = "convert the weights with to_flax"
    for others in moves.values():
        for other in others:
            for theirs in values(other)[0] if other is not move else ():
                if theirs.any() and _same(theirs, have):
                    there = " + ".join(other.torch_keys)
                    message = f"{name} holds torch's '{there}', where '{keys}' belongs"
                    return Diagnosis("swapped siblings", message, f"put each where it belongs, or {again}")
    if has_moved_rows(want, have):
        fix = f'say how the Flax model flattens with rules=[Flatten("{{layer}}", ...)], and {again}'
        return Diagnosis(
            "flatten order", f"{name} holds torch's '{keys}' with its rows in another order", fix
        )
    turned = _found_axes(want, have)
    if turned:
        return Diagnosis("transposed kernel", f"{name} holds torch's '{keys}' {turned}", again)
    apart = float(np.abs(want.astype(np.float64) - have.astype(np.float64)).max()) if want.size else 0.0
    if apart < _ROUNDING * np.abs(want).max(initial=0.0):
        again += ", or, where both were trained, compare with the rtol= that their rounding explains"
    return Diagnosis("weights", f"{name} is not torch's '{keys}': they differ by up to {apart:.3g}", again)


_ROUNDING = 1e-3  # of the largest weight: two models that trained alike are no farther apart


def _found_axes(want: np.ndarray, have: np.ndarray) -> str:
    """How the axes of the array that is there differ; empty if that does not explain it."""
    axes = find_permutation(want, have, _same)
    if axes is not None:
        return f"with the axes {axes} of its Flax layout"
    space = tuple(range(max(want.ndim - 2, 0)))
    if space and _same(np.flip(want, space), have):
        return "turned by 180 degrees"
    if space and (axes := find_permutation(np.flip(want, space), have, _same)) is not None:
        return f"turned by 180 degrees, with the axes {axes} of its Flax layout"
    return ""
