"""A JAX function at fixed shapes, and everything derived from it, each traced and compiled once.

A `JaxProgram` is a jaxpr: the user's Python ran once and is not asked again. Its derivatives and its vmap are
programs too, so they can be derived in turn, to any depth. Its linearisation at a point is in ``_linearized``.
Of torch it knows only which dtypes it has.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from torchjax_bridge.errors import DtypeError
from torchjax_bridge.exchange import torch_dtype

from .._cache import Cache
from .._settings import x64
from ._abstract_values import batched, conj, merge, smooth, strong, struct
from ._notes import Noted

__all__ = ["DERIVED_CACHE_SIZE", "JaxProgram", "Origin", "cotangent_names", "derive", "has_torch_dtype"]

# How many derived programs one program keeps: each pattern of "which inputs, which outputs" is one.
DERIVED_CACHE_SIZE = 64

Arrays = list[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The function that programs are derived from."""

    title: str
    """What to call it in an error message."""
    door: str = "as_torch_function"
    """What wrapped it."""
    pins: dict[Any, Any] = field(default_factory=dict)
    """What must live as long as it does, because graphs that torch compiled name it."""

    def pin(self, thing: Any, key: Any) -> Any:
        """Keep ``thing``, and give a weak reference to it, for a graph to hold.

        A graph lives until the code that Dynamo made for it is gone, and JAX's tracebacks, in all that was traced
        or compiled while that code ran, hold the code where no garbage collector looks.
        """
        self.pins[key] = thing
        return weakref.proxy(thing)


class JaxProgram:
    """A function of flat lists of arrays.

    Attributes:
        inputs: The abstract value (shape, dtype) of each argument.
        outputs: The abstract value of each result.
        smooth_inputs: Positions of the arguments with a float or complex dtype.
        smooth_outputs: Positions of the results with a float or complex dtype.
        lendable: For each result, whether torch has its dtype (it has no PRNG keys).
        names: What to call each argument in an error message.
        origin: The function it was derived from.
        x64: Whether it was traced with 64-bit types on; it must run so, too.
        derived: The programs derived from it, each made once.
        run: Call it: arrays (or numbers) in, arrays out. No result shares memory with an argument, with
            a constant of the function, or with another result.
    """

    def __init__(self, jaxpr: ClosedJaxpr, names: Sequence[str], origin: "Origin") -> None:
        self.jaxpr = jaxpr
        self.names = tuple(names)
        self.origin = origin
        self.inputs = tuple(jaxpr.in_avals)
        self.outputs = tuple(jaxpr.out_avals)
        self.smooth_inputs = smooth(self.inputs)
        self.smooth_outputs = smooth(self.outputs)
        self.lendable = tuple(map(has_torch_dtype, self.outputs))
        self.lends_all = all(self.lendable)
        self.lends_none = not any(self.lendable)
        self.x64 = x64()
        self.run: Callable[..., Arrays] = _compiled(jaxpr)
        self.derived = Cache(DERIVED_CACHE_SIZE)

    @classmethod
    def trace(
        cls,
        function: Callable[..., Sequence[Any]],
        inputs: Sequence[Any],
        names: Sequence[str],
        origin: "Origin",
    ) -> "JaxProgram":
        """Trace ``function`` of positional arrays that returns a sequence of arrays."""
        return cls(jax.make_jaxpr(function)(*map(struct, inputs)), names, origin)

    def describe(self) -> str:
        """What is called with what: ``f(args[0]: float32[8,64])``."""
        inputs = zip(self.names, self.inputs, strict=True)
        return f"{self.origin.title}({', '.join(f'{name}: {aval.str_short()}' for name, aval in inputs)})"

    @functools.cached_property
    def live(self) -> frozenset[int]:
        """The positions of the arguments on which a result or an effect depends."""
        jaxpr = self.jaxpr.jaxpr
        needed = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
        for eqn in reversed(jaxpr.eqns):
            if eqn.effects or not needed.isdisjoint(eqn.outvars):
                needed.update(var for var in eqn.invars if not isinstance(var, Literal))
        return frozenset(i for i, var in enumerate(jaxpr.invars) if var in needed)

    def vjp(self, wrt: tuple[int, ...], seen: tuple[int, ...]) -> "JaxProgram":
        """The program ``(*arguments, *cotangents of the results seen) -> cotangents of wrt``.

        Results not in ``seen`` are absent, rather than given a zero cotangent: ``0 * inf`` is no gradient.
        """
        return self.derived.get(
            ("vjp", wrt, seen), lambda: derive(self, "differentiated", self._vjp, wrt, seen)
        )

    def jvp(self, wrt: tuple[int, ...]) -> "JaxProgram":
        """The program ``(*arguments, *tangents of wrt) -> tangents of the smooth results``."""
        return self.derived.get(("jvp", wrt), lambda: derive(self, "differentiated", self._jvp, wrt))

    def vmap(self, axes: tuple[int | None, ...], size: int) -> "JaxProgram":
        """The program over a batch, whose axis is ``axes[i]`` in argument ``i``, and first in the results."""
        return self.derived.get(("vmap", axes, size), lambda: derive(self, "batched", self._vmap, axes, size))

    def _vjp(self, wrt: tuple[int, ...], seen: tuple[int, ...]) -> "JaxProgram":
        function, count = jaxpr_as_fun(self.jaxpr), len(self.inputs)

        def backward(*arguments: Any) -> list[Any]:
            primals, cotangents = arguments[:count], arguments[count:]

            def restricted(*moving: Any) -> list[Any]:
                results = function(*merge(primals, wrt, moving))
                return [results[i] for i in seen]

            _, pullback = jax.vjp(restricted, *(primals[i] for i in wrt))
            return conj(pullback(conj(cotangents)))

        return JaxProgram.trace(
            backward,
            [*self.inputs, *(strong(self.outputs[i]) for i in seen)],
            [*self.names, *cotangent_names(seen, self)],
            self.origin,
        )

    def _jvp(self, wrt: tuple[int, ...]) -> "JaxProgram":
        function, count = jaxpr_as_fun(self.jaxpr), len(self.inputs)

        def forward(*arguments: Any) -> list[Any]:
            primals, tangents = arguments[:count], arguments[count:]

            def restricted(*moving: Any) -> list[Any]:
                results = function(*merge(primals, wrt, moving))
                return [results[i] for i in self.smooth_outputs]

            return jax.jvp(restricted, [primals[i] for i in wrt], list(tangents))[1]

        return JaxProgram.trace(
            forward,
            [*self.inputs, *(strong(self.inputs[i]) for i in wrt)],
            [*self.names, *(f"the tangent of {self.names[i]}" for i in wrt)],
            self.origin,
        )

    def _vmap(self, axes: tuple[int | None, ...], size: int) -> "JaxProgram":
        function = jax.vmap(jaxpr_as_fun(self.jaxpr), in_axes=axes, axis_size=size)
        inputs = [batched(aval, axis, size) for aval, axis in zip(self.inputs, axes, strict=True)]
        return JaxProgram.trace(function, inputs, self.names, self.origin)


def derive(program: JaxProgram, what: str, build: Callable[..., Any], *arguments: Any) -> Any:
    """Build what is derived from a program; an error says that it was being derived."""
    with Noted(lambda _: f"while JAX {what} {program.describe()}"):
        return build(*arguments)


def _compiled(jaxpr: ClosedJaxpr) -> Callable[..., Arrays]:
    """Jit a jaxpr, copying the outputs that JAX would forward from an argument, a constant or each other."""
    function = jaxpr_as_fun(jaxpr)
    taken: set[Any] = {*jaxpr.jaxpr.invars, *jaxpr.jaxpr.constvars}
    forwarded: list[bool] = []
    for var in jaxpr.jaxpr.outvars:
        forwarded.append(isinstance(var, Literal) or var in taken)
        if not isinstance(var, Literal):
            taken.add(var)

    def run(*arguments: Any) -> Arrays:
        return [_fresh(a) if f else a for a, f in zip(function(*arguments), forwarded, strict=True)]

    return jax.jit(run)


def cotangent_names(seen: Sequence[int], program: JaxProgram) -> list[str]:
    """What to call the cotangents of the results ``seen``."""
    return [f"the cotangent of result {i} of {len(program.outputs)}" for i in seen]


def has_torch_dtype(aval: Any) -> bool:
    """Whether torch can hold an array of this abstract value."""
    try:
        torch_dtype(aval.dtype)
    except DtypeError:
        return False
    return True


def _fresh(array: Any) -> Any:
    """A copy in memory of its own; PRNG keys stay JAX's and immutable, so they need none."""
    is_key = jnp.issubdtype(jax.typeof(array).dtype, jax.dtypes.prng_key)  # a literal may be a Python bool
    return array if is_key else jnp.array(array, copy=True)
