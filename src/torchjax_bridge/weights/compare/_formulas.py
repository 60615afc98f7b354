"""What a formula of known arrays is, and which two of a list of formulas are torch's array and Flax's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ._probes import ACTIVATIONS, Close, NamedArray, apply_torch

__all__ = [
    "Compute",
    "Formula",
    "Places",
    "activate",
    "compute_activation",
    "matching_pair",
    "phrase",
    "rows_at",
    "sample_rows",
]

Places = slice | np.ndarray
Compute = Callable[[Places], np.ndarray]


@dataclass(frozen=True)
class Formula:
    """A formula: its text, and a function that computes some of its rows (along the last axis)."""

    text: str
    compute: Compute
    of: NamedArray | None = None


def sample_rows(shape: tuple[int, ...]) -> np.ndarray:
    """The indices of up to 48 rows of an array, evenly spaced."""
    rows = int(np.prod(shape[:-1]))
    return np.unique(np.linspace(0, rows - 1, min(rows, 48)).astype(int))


def rows_at(array: np.ndarray, places: Places) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])[places]


def matching_pair(
    ours: np.ndarray, theirs: np.ndarray, formulas: Sequence[Formula], close: Close
) -> tuple[Formula, Formula] | None:
    """The formula that gives torch's array and the one that gives Flax's, if both are among these."""
    few, whole = sample_rows(ours.shape), slice(None)
    found = []
    for array in (ours, theirs):
        some, full = rows_at(array, few), rows_at(array, whole)
        most = 0.1 * float(np.abs(some).max(initial=0.0))  # a cheap test before `close`

        def fits(form: Formula, some: np.ndarray = some, full: np.ndarray = full, most: float = most) -> bool:
            tried = form.compute(few)
            near = bool(np.abs(some - tried).max() <= most)
            return near and close(some, tried) and close(full, form.compute(whole))

        match = next(filter(fits, formulas), None)
        if match is None:
            return None
        found.append(match)
    return (found[0], found[1]) if found[0] is not found[1] else None


def compute_activation(name: str, array: np.ndarray, places: Places) -> np.ndarray:
    return activate(name, rows_at(array, places))


def activate(name: str, array: np.ndarray) -> np.ndarray:
    return apply_torch(ACTIVATIONS[name], array) if name else array


def phrase(name: str, text: str) -> str:
    return f"{name} of {text}" if name else text
