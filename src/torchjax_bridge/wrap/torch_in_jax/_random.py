"""Random numbers in wrapped torch code come from a JAX key.

``jax.random`` draws the noise that the code's random operators need, and the noise enters the torch code as
further arrays. So the code is a pure function of its arrays: the noise is equal in the forward and the
backward pass, and differs between the lanes of a ``vmap`` over keys. torch's own generators are neither read
nor advanced.

Owns the ``key=`` argument, the drawing, and the replacement of random operators. ``_samplers`` turns noise
into the result of each operator.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError, TransformError

from ._graph import Graph
from ._samplers import Draw, is_random, sampler_of
from ._torch_internals import MISSING, OpOverload, TorchDispatchMode

__all__ = ["Replay", "check_no_draws", "draw_noise", "forbid_draws", "has_key", "take_key"]


def has_key(fn: Callable[..., Any]) -> bool:
    """Whether torch code itself has an argument named ``key``."""
    try:
        return "key" in inspect.signature(fn).parameters
    except (ValueError, TypeError):
        return False


def take_key(kwargs: dict[str, Any], own: bool) -> Any:
    """Take the PRNG key out of the keyword arguments; ``own``: the code itself has an argument named ``key``.

    Raises:
        ArgumentError: The argument is no key, and the code has none of that name.
    """
    key = kwargs.get("key")
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return kwargs.pop("key")
    if own:
        return None
    raw = kwargs.pop("key", None)
    if raw is None:
        return None
    if getattr(raw, "dtype", None) != np.uint32:
        raise ArgumentError(f"key= takes a JAX PRNG key (jax.random.key(0)), and got {what_kind(raw)}.")
    return jax.random.wrap_key_data(jnp.asarray(raw))


def draw_noise(key: jax.Array, draws: Sequence[Draw]) -> list[jax.Array]:
    """An independent array for each draw; JAX can trace this."""
    flat = {"uniform": jax.random.uniform, "normal": jax.random.normal}
    noise: dict[int, jax.Array] = {}
    # All uniform noise is one draw, cut into pieces, and so is all normal noise: less to compile.
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
            noise[i] = _draw_integers(jax.random.fold_in(key, len(flat) + i), draw)
    return [noise[i] for i in range(len(draws))]


def _draw_integers(key: jax.Array, draw: Draw) -> jax.Array:
    if draw.kind == "integers":
        return jax.random.randint(key, draw.shape, draw.low, draw.high, jnp.int32)
    return jax.random.permutation(key, jnp.arange(draw.shape[0], dtype=jnp.int32))


class Replay(TorchDispatchMode):
    """While active, random operators use ``noise``, in order."""

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
        sampler = sampler_of(func, args, kwargs)
        if noise is None or tuple(noise.shape) != sampler.draw.shape:
            raise _other_draws(func)
        return sampler.make(noise)


def check_no_draws(graph: Graph) -> Graph:
    """The graph, if no operator in it draws: `Replay` should have replaced all that do.

    Raises:
        TransformError: One draws, because the code drew again where it had no noise left.
    """
    for node in graph.nodes.nodes:
        if isinstance(node.target, OpOverload) and is_random(node.target, node.args, node.kwargs):
            raise _other_draws(node.target)
    return graph


def forbid_draws() -> AbstractContextManager[Any]:
    """Random operators raise inside. For code that depends on values, whose draws are not known beforehand."""
    return nullcontext() if MISSING is not None else _ForbidDraws()


class _ForbidDraws(TorchDispatchMode):
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
