"""A JAX function at fixed shapes, and everything derived from it, each traced and compiled once.

A `JaxProgram` is a jaxpr: the user's Python ran once and does not run again. Its derivatives and its vmap are
programs too, so these can be differentiated and batched in turn, to any depth. Its linearisation at a point
is in ``_linearized``. Knows nothing of torch but its dtypes.
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
from ._notes import NoteOnError

__all__ = ["DERIVED_CACHE_SIZE", "JaxProgram", "Origin", "cotangent_names", "derive", "has_torch_dtype"]

# How many derived programs one program keeps: one for each choice of inputs and outputs.
DERIVED_CACHE_SIZE = 64

Arrays = list[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The function that programs are derived from."""

    title: str
    """Its name in error messages."""
    wrapper: str = "as_torch_function"
    """The public function that wrapped it."""
    pins: dict[Any, Any] = field(default_factory=dict)
    """Objects that must live as long as it does, because graphs that torch compiled refer to them."""

    def pin(self, thing: Any, key: Any) -> Any:
        """Keep ``thing``, and return a weak reference to it for a graph to hold.

        A graph lives as long as the code that Dynamo made for it. All that JAX traced or compiled while that code
        ran holds it in tracebacks, out of reach of the garbage collector.
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
        exportable: For each result, whether torch has its dtype (it has none for PRNG keys).
        names: The name of each argument in error messages.
        origin: The function from which it was derived.
        x64: Whether it was traced with x64 on; it must run with the same setting.
        derived: The programs derived from it, each made once.
        run: Runs it on arrays or numbers, and returns arrays. No result shares memory with an argument, a constant
            of the function, or another result.
    """

    def __init__(self, jaxpr: ClosedJaxpr, names: Sequence[str], origin: "Origin") -> None:
        self.jaxpr = jaxpr
        self.names = tuple(names)
        self.origin = origin
        self.inputs = tuple(jaxpr.in_avals)
        self.outputs = tuple(jaxpr.out_avals)
        self.smooth_inputs = smooth(self.inputs)
        self.smooth_outputs = smooth(self.outputs)
        self.exportable = tuple(map(has_torch_dtype, self.outputs))
        self.exports_all = all(self.exportable)
        self.exports_none = not any(self.exportable)
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
        """The function and its arguments: ``f(args[0]: float32[8,64])``."""
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

        Other results have no cotangent, rather than one of zeros, because ``0 * inf`` is not a number.
        """
        return self.derived.get(
            ("vjp", wrt, seen), lambda: derive(self, "differentiated", self._vjp, wrt, seen)
        )

    def jvp(self, wrt: tuple[int, ...]) -> "JaxProgram":
        """The program ``(*arguments, *tangents of wrt) -> tangents of the smooth results``."""
        return self.derived.get(("jvp", wrt), lambda: derive(self, "differentiated", self._jvp, wrt))

    def vmap(self, axes: tuple[int | None, ...], size: int) -> "JaxProgram":
        """The program over a batch: axis ``axes[i]`` of argument ``i``, and the first axis of every result."""
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
    """Build something that is derived from a program; a note on an error says so."""
    with NoteOnError(lambda _: f"while JAX {what} {program.describe()}"):
        return build(*arguments)


def _compiled(jaxpr: ClosedJaxpr) -> Callable[..., Arrays]:
    """Jit a jaxpr. Outputs are copied where JAX would forward an argument, a constant or another output."""
    function = jaxpr_as_fun(jaxpr)
    shared: set[Any] = {*jaxpr.jaxpr.invars, *jaxpr.jaxpr.constvars}
    forwarded: list[bool] = []
    for var in jaxpr.jaxpr.outvars:
        forwarded.append(isinstance(var, Literal) or var in shared)
        if not isinstance(var, Literal):
            shared.add(var)

    def run(*arguments: Any) -> Arrays:
        return [_copy(a) if f else a for a, f in zip(function(*arguments), forwarded, strict=True)]

    return jax.jit(run)


def cotangent_names(seen: Sequence[int], program: JaxProgram) -> list[str]:
    """Names for the cotangents of the results ``seen``."""
    return [f"the cotangent of result {i} of {len(program.outputs)}" for i in seen]


def has_torch_dtype(aval: Any) -> bool:
    """Whether torch can hold an array of this abstract value."""
    try:
        torch_dtype(aval.dtype)
    except DtypeError:
        return False
    return True


def _copy(array: Any) -> Any:
    """A copy with memory of its own. PRNG keys stay in JAX, immutable, and need none."""
    is_key = jnp.issubdtype(jax.typeof(array).dtype, jax.dtypes.prng_key)  # a literal may be a Python bool
    return array if is_key else jnp.array(array, copy=True)
