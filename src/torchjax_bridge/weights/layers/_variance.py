"""The one formula that differs between torch's BatchNorm and Flax's.

torch normalises a batch with its biased variance and feeds the running variance with the unbiased one
(https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html); Flax feeds it the biased one.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["running_variance"]


def running_variance(
    before: jax.Array,
    after: jax.Array,
    x: jax.Array,
    *,
    axis: int | tuple[int, ...],
    momentum: float,
    axis_name: str | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Torch's running variance from Flax's.

    Args:
        before: The running variance ``(C,)`` before the batch.
        after: What Flax made of it, ``momentum * before + (1 - momentum) * biased``.
        x: The batch.
        axis: The feature axis or axes of ``x``; the others are averaged over.
        momentum: Flax's momentum.
        axis_name: A mapped axis that the statistics are also averaged over.
        mask: Which elements of ``x`` count, broadcastable to it.

    Returns:
        ``momentum * before + (1 - momentum) * biased * n / (n - 1)``, where ``n`` elements make a feature.

    Raises:
        ValueError: One element a feature has no unbiased variance.
    """
    features = {place % x.ndim for place in ((axis,) if isinstance(axis, int) else axis)}
    others = tuple(place for place in range(x.ndim) if place not in features)
    count: Any = prod(x.shape[place] for place in others)
    if mask is not None:
        count = jnp.broadcast_to(mask, x.shape).sum(others, dtype=after.dtype)
    elif axis_name is None and count < 2:
        raise ValueError(f"one value a feature, in {x.shape}, has no unbiased variance; use a larger batch")
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    kept = momentum * before
    return kept + (after - kept) * (count / (count - 1))
