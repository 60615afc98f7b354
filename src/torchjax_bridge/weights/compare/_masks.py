"""The masks of an attention: torch's, as Flax's layer takes one.

torch has two, in which True (or minus infinity) hides a position: ``attn_mask (L, S)`` or ``(N * heads, L, S)``,
and ``key_padding_mask (N, S)``. Flax has one, ``(N, heads, L, S)``, in which True shows it. Compares nothing.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np

__all__ = ["flax_masks"]


def flax_masks(
    arrays: tuple[np.ndarray, ...], batch: int, length: int, keys: int
) -> Iterator[np.ndarray | None]:
    """The Flax masks that mean the same as torch's; several where the shapes are ambiguous.

    Args:
        arrays: What torch's attention was given beside query, key and value.
        batch: How many sequences there are.
        length: How many queries each has.
        keys: How many keys each has.
    """
    shown = [one for array in arrays if (one := _shown(array)) is not None]
    if not shown:
        yield None
    for chosen in product(*(list(_readings(one, batch, length, keys)) for one in shown)) if shown else ():
        mask = np.ones((1, 1, 1, 1), bool)
        for one in chosen:
            mask = mask & one
        yield mask


def _shown(array: np.ndarray) -> np.ndarray | None:
    """Where a torch mask shows a position; None for an array that is no mask."""
    if array.dtype == bool:
        return ~array
    if array.dtype.kind != "f" or not np.all((array == 0) | np.isneginf(array)):
        return None
    return array == 0


def _readings(shown: np.ndarray, batch: int, length: int, keys: int) -> Iterator[np.ndarray]:
    if shown.shape == (length, keys):
        yield shown[None, None]
    if shown.shape == (batch, keys):
        yield shown[:, None, None]
    if shown.ndim == 3 and shown.shape[1:] == (length, keys) and len(shown) % batch == 0:
        yield shown.reshape(batch, -1, length, keys)
