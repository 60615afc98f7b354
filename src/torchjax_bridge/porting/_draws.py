"""Random numbers in evaluation: while a port is proved, torch and JAX draw the same ones.

They draw from the same distributions and never the same numbers. So each draw of the proof is a fixed array of the
distribution: quantiles at places that depend on the shape alone, and on no order of axes. Owns also what the port
says of a draw. Changes nothing of torch or JAX: a mode of torch's sees the calls, and the emitted file, a module of
ours, is given another ``jax``.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.overrides import TorchFunctionMode, resolve_name

from torchjax_bridge.recording import RANDOM, Recording

from .operations import table_name

__all__ = ["draw_notes", "same_draws"]


def draw_notes(recording: Recording) -> list[str]:
    """What a user must know of a model that draws random numbers in evaluation, too."""
    sources = (
        node.source
        for frame in recording.top.walk()
        for node in frame.nodes
        if node.function.rpartition(".")[2] in RANDOM | {"gumbel_softmax"}
    )
    lines = dict.fromkeys(f"`{source.text}` ({source})" for source in sources)
    return [f"random numbers that are not torch's: {line} draws them in evaluation, too" for line in lines]


@contextmanager
def same_draws(kind: type) -> Iterator[None]:
    """Let torch code and the code of an emitted file draw fixed numbers.

    Args:
        kind: A class of the file.
    """
    space = vars(sys.modules[kind.__module__])
    own = space.get("jax")
    space["jax"] = _Jax()
    try:
        with _Torch():
            yield
    finally:
        space["jax"] = own


def _places(shape: Any) -> np.ndarray[Any, Any]:
    """Numbers between 0 and 1, spread evenly, as many as an array of the shape has.

    Axes of one size count alike, so the axes may stand in any order.
    """
    total = np.full(tuple(shape), 0.37)
    for axis, size in enumerate(total.shape):
        step = math.sqrt(size + 1.5) % 1
        along = np.arange(size) * step
        total += along.reshape([-1 if place == axis else 1 for place in range(total.ndim)])
    return np.asarray(total % 1 * 0.96 + 0.02)


def _normal(places: Any) -> Any:
    return torch.special.ndtri(torch.from_numpy(np.asarray(places))).numpy()


def _exponential(places: Any) -> Any:
    return -np.log(places)


def _gumbel(places: Any) -> Any:
    return -np.log(-np.log(places))


def _permutation(size: int) -> Any:
    return np.argsort(_places((size,)), kind="stable")


# --- JAX ----------------------------------------------------------------------------------------------------


class _Jax:
    """The package, whose ``random`` draws fixed numbers."""

    random: Any

    def __init__(self) -> None:
        self.random = SimpleNamespace(**vars(jax.random))
        self.random.normal = _drawn(_normal)
        self.random.exponential = _drawn(_exponential)
        self.random.gumbel = _drawn(_gumbel)
        self.random.uniform = _uniform
        self.random.bernoulli = _bernoulli
        self.random.permutation = lambda key, n: jnp.asarray(_permutation(int(n)), jnp.int32)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)


def _drawn(quantile: Callable[[Any], Any]) -> Callable[..., jax.Array]:
    def draw(key: Any, shape: Any = (), dtype: Any = float) -> jax.Array:
        return jnp.asarray(quantile(_places(shape)), dtype)

    return draw


def _uniform(
    key: Any, shape: Any = (), dtype: Any = float, minval: Any = 0.0, maxval: Any = 1.0
) -> jax.Array:
    return jnp.asarray(_places(shape), dtype) * (maxval - minval) + minval


def _bernoulli(key: Any, p: Any = 0.5, shape: Any = None) -> jax.Array:
    return jnp.asarray(_places(jnp.shape(p) if shape is None else shape), jnp.float32) < p


# --- torch --------------------------------------------------------------------------------------------------


class _Torch(TorchFunctionMode):
    """The functions of torch's that draw, with fixed numbers for what they draw."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        full = resolve_name(func) or ""
        draw = _DRAWS.get(table_name(full)) if full else None
        if draw is None or kwargs.get("generator") is not None:  # which are the proof's own
            return func(*args, **kwargs)
        if full.endswith("_") and not full.endswith("__"):
            with torch.no_grad():
                return args[0].copy_(draw(args[0], *args[1:], **kwargs))
        if table_name(full) in ("bernoulli", "gumbel_softmax"):
            return draw(*args, **kwargs)
        like = func(*args, **kwargs)
        return draw(like).to(like.dtype).requires_grad_(like.requires_grad)


def _as(like: torch.Tensor, values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values)).to(like.device, torch.float64)


def _torch_uniform(like: torch.Tensor, *ends: Any, **kwargs: Any) -> torch.Tensor:
    low, high = ({"from": 0.0, "to": 1.0} | dict(zip(("from", "to"), ends, strict=False)) | kwargs).values()
    return _as(like, _places(like.shape)) * (high - low) + low


def _torch_normal(like: torch.Tensor, mean: Any = 0.0, std: Any = 1.0, **kwargs: Any) -> torch.Tensor:
    return _as(like, _normal(_places(like.shape))) * std + mean


def _torch_exponential(like: torch.Tensor, lambd: Any = 1.0) -> torch.Tensor:
    return _as(like, _exponential(_places(like.shape))) / lambd


def _torch_bernoulli(input: torch.Tensor, p: Any = None, **kwargs: Any) -> torch.Tensor:
    places = _as(input, _places(input.shape)).float()
    return (places < (input.detach() if p is None else p)).to(input.dtype)


def _torch_permutation(like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(_permutation(len(like)))


def _torch_gumbel_softmax(
    logits: torch.Tensor, tau: Any = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> torch.Tensor:
    soft = ((logits + _as(logits, _gumbel(_places(logits.shape))).to(logits.dtype)) / tau).softmax(dim)
    if not hard:
        return soft
    chosen = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return chosen - soft.detach() + soft


_DRAWS: dict[str, Callable[..., torch.Tensor]] = {
    "bernoulli": _torch_bernoulli,
    "exponential": _torch_exponential,
    "gumbel_softmax": _torch_gumbel_softmax,
    "normal": _torch_normal,
    "rand": _torch_uniform,
    "rand_like": _torch_uniform,
    "randn": _torch_normal,
    "randn_like": _torch_normal,
    "randperm": _torch_permutation,
    "uniform": _torch_uniform,
}
