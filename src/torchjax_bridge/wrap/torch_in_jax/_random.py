"""Random numbers in wrapped torch code come from a JAX key.

The noise that the code's random operators need is drawn by ``jax.random`` and enters the torch code as one
more array, so the code is a pure function of its arrays: equal in the forward and the backward pass,
different for different keys in the lanes of ``vmap``, and torch's own generators are neither read nor
advanced. Owns the drawing and the handing out. What each operator makes of its noise is in
``_samplers``.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torchjax_bridge.errors import TransformError

from ._graph import Graph
from ._samplers import Draw, is_random, sampler_of
from ._torch_internals import MISSING, OpOverload, TorchDispatchMode

__all__ = ["Replay", "draw_noise", "no_draws", "without_draws"]


def draw_noise(key: jax.Array, draws: Sequence[Draw]) -> list[jax.Array]:
    """One array a draw, all independent; traceable by JAX."""
    flat = {"uniform": jax.random.uniform, "normal": jax.random.normal}
    noise: dict[int, jax.Array] = {}
    # All uniform noise is one draw, cut into pieces, and so is all normal noise: one generator to compile.
    for n, (kind, sample) in enumerate(flat.items()):
        places = [i for i, draw in enumerate(draws) if draw.kind == kind]
        sizes = [math.prod(draws[i].shape) for i in places]
        if places:
            whole = sample(jax.random.fold_in(key, n), (sum(sizes),), jnp.float32)
            ends = list(itertools.accumulate(sizes))
            for i, size, end in zip(places, sizes, ends, strict=True):
                noise[i] = whole[end - size : end].reshape(draws[i].shape)
    for i, draw in enumerate(draws):
        if draw.kind not in flat:
            noise[i] = _whole_numbers(jax.random.fold_in(key, len(flat) + i), draw)
    return [noise[i] for i in range(len(draws))]


def _whole_numbers(key: jax.Array, draw: Draw) -> jax.Array:
    if draw.kind == "integers":
        return jax.random.randint(key, draw.shape, draw.low, draw.high, jnp.int32)
    return jax.random.permutation(key, jnp.arange(draw.shape[0], dtype=jnp.int32))


class Replay(TorchDispatchMode):
    """While active, random operators take their noise from ``noise``, in order."""

    def __init__(self, noise: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._noise = iter(noise)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func, args, kwargs):
            return func(*args, **kwargs)
        noise = next(self._noise, None)
        plan = sampler_of(func, args, kwargs)
        if noise is None or tuple(noise.shape) != plan.draw.shape:
            raise _other_draws(func)
        return plan.make(noise)


def without_draws(graph: Graph) -> Graph:
    """The graph, if no operator in it draws: all that do should have been given their noise.

    Raises:
        TransformError: One does, as the code drew again where noise was not at hand.
    """
    for node in graph.nodes.nodes:
        if isinstance(node.target, OpOverload) and is_random(node.target, node.args, node.kwargs):
            raise _other_draws(node.target)
    return graph


def no_draws() -> AbstractContextManager[Any]:
    """Random operators raise: for code that runs as Python, where no noise can be handed out beforehand."""
    return nullcontext() if MISSING is not None else _NoDraws()


class _NoDraws(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_random(func, args, kwargs):
            raise TransformError(
                f"the torch function draws random numbers ({func}) and depends on values, so that they cannot be "
                "taken from a key. Draw them outside with jax.random and pass them as an argument."
            )
        return func(*args, **kwargs)


def _other_draws(func: Any) -> TransformError:
    return TransformError(
        f"the torch function draws other random numbers ({func}) than in its first trace. Code whose draws "
        "change from run to run, or that draws again in its backward (torch.utils.checkpoint), cannot take "
        "its randomness from a key. For checkpointing use jax.checkpoint, or residuals='recompute'."
    )
