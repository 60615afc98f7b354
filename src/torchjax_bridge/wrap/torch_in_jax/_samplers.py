"""The table of torch's random operators: the plain noise that each needs, and its result made of that noise.

Owns the formulas; ``_random`` draws the noise. Refuses operators that plain noise does not suffice for
(Poisson, gamma, binomial), by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torchjax_bridge.errors import TransformError

from ._graph import Spec

__all__ = ["Draw", "Sampler", "is_random", "sampler_of"]

# Tagged as random because of the kernels that they may choose. They draw nothing themselves.
_CHOICES = ("aten::_fused_sdp_choice",)


@dataclass(frozen=True, slots=True)
class Draw:
    """The noise that one random operator needs."""

    kind: str
    """``"uniform"`` in [0, 1), ``"normal"``, ``"integers"`` in [low, high) or ``"permutation"``."""
    shape: tuple[int, ...]
    low: int = 0
    high: int = 0

    @property
    def spec(self) -> Spec:
        integers = self.kind in ("integers", "permutation")
        return Spec(self.shape, torch.int32 if integers else torch.float32)


def is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an ATen operator draws from a generator."""
    if torch.Tag.nondeterministic_seeded not in func.tags or func._schema.name in _CHOICES:
        return False
    call = _Call(func, args, kwargs)
    return call.get("dropout_p") != 0 and call.get("dropout") != 0


@dataclass(frozen=True, slots=True)
class Sampler:
    """The noise for one call, and how to make the call's result of it."""

    draw: Draw
    make: Callable[[torch.Tensor], Any]


class _Call:
    """The arguments of one operator call, by the names of its schema."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name = func._schema.name.removeprefix("aten::")
        # The schema gives the default dtype as a number, which nothing here reads.
        defaults = [a for a in func._schema.arguments if a.has_default_value() and a.name != "dtype"]
        self._values = {a.name: a.default_value for a in defaults}
        self._values |= {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}
        self._values |= kwargs

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, *names: str) -> Any:
        """The first of these arguments that is present and not None."""
        return next((self._values[n] for n in names if self._values.get(n) is not None), None)

    @property
    def like(self) -> torch.Tensor | None:
        value = self.get("self", "input")
        return value if isinstance(value, torch.Tensor) else None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.like is not None:
            return tuple(self.like.shape)
        return tuple(self["size"])

    def result(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` as the operator would return it: written in place, or in the dtype asked for."""
        if self.name.endswith("_"):
            return self["self"].copy_(value)
        dtype = self.get("dtype")
        if dtype is None:
            dtype = self.like.dtype if self.like is not None else torch.get_default_dtype()
        value = value.to(dtype)
        device = self.get("device")
        return value if device is None else value.to(device)

    def integers(self, value: torch.Tensor) -> torch.Tensor:
        """As `result`, for operators with int64 as their default dtype."""
        if self.name.endswith("_") or self.get("dtype") is not None or self.like is not None:
            return self.result(value)
        return value.to(torch.int64)


def _uniform(call: _Call) -> Sampler:
    low, high = call.get("from") or 0.0, call.get("to")
    width = (1.0 if high is None else high) - low
    return Sampler(Draw("uniform", call.shape), lambda u: call.result(u * width + low))


def _standard_normal(call: _Call) -> Sampler:
    return Sampler(Draw("normal", call.shape), call.result)


def _normal(call: _Call) -> Sampler:
    mean, std = call.get("mean"), call.get("std")
    mean, std = 0.0 if mean is None else mean, 1.0 if std is None else std
    shapes = [tuple(v.shape) for v in (mean, std) if isinstance(v, torch.Tensor)]
    if call.name.endswith("_") or not shapes:
        shape, dtype = call.shape, None
    else:
        shape = tuple(torch.broadcast_shapes(*shapes))
        dtype = next(v.dtype for v in (mean, std) if isinstance(v, torch.Tensor))
    return Sampler(
        Draw("normal", shape),
        lambda n: call.result(n * std + mean) if dtype is None else (n * std + mean).to(dtype),
    )


def _bernoulli(call: _Call) -> Sampler:
    chance: Any = call.get("p")
    chance = call.like if chance is None else chance
    return Sampler(Draw("uniform", call.shape), lambda u: call.result(u < chance))


def _dropout(call: _Call) -> Sampler:
    given, p = call["input"], call["p"]

    def make(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if call["train"] is False:
            return given, torch.ones_like(given, dtype=torch.bool)
        kept = u >= p
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        return given * kept * scale, kept

    return Sampler(Draw("uniform", call.shape), make)


def _exponential(call: _Call) -> Sampler:
    rate = call.get("lambd") or 1.0
    return Sampler(Draw("uniform", call.shape), lambda u: call.result(-torch.log1p(-u) / rate))


def _geometric(call: _Call) -> Sampler:
    log_miss = math.log1p(-call["p"]) if call["p"] < 1 else -math.inf
    return Sampler(
        Draw("uniform", call.shape),
        lambda u: call.result(torch.ceil(torch.log1p(-u) / log_miss).clamp(min=1.0)),
    )


def _log_normal(call: _Call) -> Sampler:
    mean, std = call.get("mean"), call.get("std")
    mean, std = 1.0 if mean is None else mean, 2.0 if std is None else std
    return Sampler(Draw("normal", call.shape), lambda n: call.result(torch.exp(n * std + mean)))


def _cauchy(call: _Call) -> Sampler:
    median, sigma = call.get("median") or 0.0, call.get("sigma")
    sigma = 1.0 if sigma is None else sigma
    return Sampler(
        Draw("uniform", call.shape),
        lambda u: call.result(median + sigma * torch.tan(torch.pi * (u - 0.5))),
    )


def _integers(call: _Call) -> Sampler:
    low: int = call.get("low", "from") or 0
    high: int | None = call.get("high", "to")
    if high is None:  # random_() without bounds: all integers that the dtype holds exactly, up to 31 bits
        high = _EXACT.get(call.like.dtype, 2**31 - 1) if call.like is not None else 2**31 - 1
    if not -(2**31) <= low < high <= 2**31 - 1:
        raise TransformError(
            f"aten::{call.name} draws integers in [{low}, {high}); a key draws them within 32 bits. Draw "
            "them outside and pass them as an argument."
        )
    return Sampler(Draw("integers", call.shape, low, high), call.integers)


_EXACT = {
    torch.bool: 2,
    torch.uint8: 2**8,
    torch.int8: 2**7,
    torch.int16: 2**15,
    torch.bfloat16: 2**8 + 1,
    torch.float16: 2**11 + 1,
    torch.float32: 2**24 + 1,
}


def _permutation(call: _Call) -> Sampler:
    return Sampler(Draw("permutation", (call["n"],)), call.integers)


def _multinomial(call: _Call) -> Sampler:
    """Exponential clocks of rates ``probs``: the k that ring first are k draws without replacement."""
    probs, count = call["self"], call["num_samples"]
    replace = call.get("replacement")
    shape = tuple(probs.shape)
    if replace:
        shape = (*shape[:-1], count, shape[-1])

    def make(u: torch.Tensor) -> torch.Tensor:
        clocks = (-torch.log1p(-u)).clamp(min=torch.finfo(torch.float32).tiny)
        if replace:
            return (probs.unsqueeze(-2) / clocks).argmax(-1)
        return (probs / clocks).topk(count, dim=-1).indices

    return Sampler(Draw("uniform", shape), make)


_RULES: dict[str, Callable[[_Call], Sampler]] = {
    "rand": _uniform,
    "rand_like": _uniform,
    "uniform": _uniform,
    "uniform_": _uniform,
    "randn": _standard_normal,
    "randn_like": _standard_normal,
    "normal": _normal,
    "normal_": _normal,
    "normal_functional": _normal,
    "bernoulli": _bernoulli,
    "bernoulli_": _bernoulli,
    "native_dropout": _dropout,
    "exponential": _exponential,
    "exponential_": _exponential,
    "geometric": _geometric,
    "geometric_": _geometric,
    "log_normal": _log_normal,
    "log_normal_": _log_normal,
    "cauchy": _cauchy,
    "cauchy_": _cauchy,
    "randint": _integers,
    "randint_like": _integers,
    "random": _integers,
    "random_": _integers,
    "randperm": _permutation,
    "multinomial": _multinomial,
}


def sampler_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sampler:
    """The sampler for one call of a random operator.

    Raises:
        TransformError: The operator is not in the table.
    """
    return _rule(func)(_Call(func, args, kwargs))


def _rule(func: Any) -> Callable[[_Call], Sampler]:
    namespace, _, name = func._schema.name.partition("::")
    rule = _RULES.get(name) if namespace == "aten" else None
    if rule is None:
        raise TransformError(
            f"{func._schema.name} draws random numbers in a way that cannot be taken from a JAX key. Draw them "
            "outside with jax.random and pass them as an argument."
        )
    return rule
