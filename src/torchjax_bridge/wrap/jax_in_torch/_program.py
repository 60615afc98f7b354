"""A JAX function at fixed shapes, and everything derived from it, each traced and compiled once.

A `JaxProgram` is a jaxpr: the user's Python ran once and is not asked again. Its derivatives and its vmap are
Programs too, so they can be derived in turn, to any depth. Cotangents follow torch's convention, in which the
gradient of a complex variable is the conjugate of JAX's; that is settled here and nowhere else. Of torch it
knows only which dtypes it has.
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
from ._notes import Noted
from ._residuals import Plan, plan_residuals

__all__ = ["JaxProgram", "Linearized", "Origin", "has_torch_dtype"]

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
        run: Call it: arrays (or numbers) in, arrays out. No result shares memory with an argument, with
            a constant of the function, or with another result.
    """

    def __init__(self, jaxpr: ClosedJaxpr, names: Sequence[str], origin: "Origin") -> None:
        self.jaxpr = jaxpr
        self.names = tuple(names)
        self.origin = origin
        self.inputs = tuple(jaxpr.in_avals)
        self.outputs = tuple(jaxpr.out_avals)
        self.smooth_inputs = _smooth(self.inputs)
        self.smooth_outputs = _smooth(self.outputs)
        self.lendable = tuple(map(has_torch_dtype, self.outputs))
        self.lends_all = all(self.lendable)
        self.lends_none = not any(self.lendable)
        self.x64 = x64()
        self.run: Callable[..., Arrays] = _compiled(jaxpr)
        self._derived = Cache(DERIVED_CACHE_SIZE)

    @classmethod
    def trace(
        cls,
        function: Callable[..., Sequence[Any]],
        inputs: Sequence[Any],
        names: Sequence[str],
        origin: "Origin",
    ) -> "JaxProgram":
        """Trace ``function`` of positional arrays that returns a sequence of arrays."""
        return cls(jax.make_jaxpr(function)(*map(_struct, inputs)), names, origin)

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

    def linear(self, wrt: tuple[int, ...]) -> "Linearized":
        """The program linearised in the arguments ``wrt``: values and residuals, then a pullback."""
        return self._derived.get(
            ("linear", wrt), lambda: _derive(self, "differentiated", Linearized, self, wrt)
        )

    def vjp(self, wrt: tuple[int, ...], seen: tuple[int, ...]) -> "JaxProgram":
        """The program ``(*arguments, *cotangents of the results seen) -> cotangents of wrt``.

        Results not in ``seen`` are absent, rather than given a zero cotangent: ``0 * inf`` is no gradient.
        """
        return self._derived.get(
            ("vjp", wrt, seen), lambda: _derive(self, "differentiated", self._vjp, wrt, seen)
        )

    def jvp(self, wrt: tuple[int, ...]) -> "JaxProgram":
        """The program ``(*arguments, *tangents of wrt) -> tangents of the smooth results``."""
        return self._derived.get(("jvp", wrt), lambda: _derive(self, "differentiated", self._jvp, wrt))

    def vmap(self, axes: tuple[int | None, ...], size: int) -> "JaxProgram":
        """The program over a batch, whose axis is ``axes[i]`` in argument ``i``, and first in the results."""
        return self._derived.get(
            ("vmap", axes, size), lambda: _derive(self, "batched", self._vmap, axes, size)
        )

    def _vjp(self, wrt: tuple[int, ...], seen: tuple[int, ...]) -> "JaxProgram":
        function, count = jaxpr_as_fun(self.jaxpr), len(self.inputs)

        def backward(*arguments: Any) -> list[Any]:
            primals, cotangents = arguments[:count], arguments[count:]

            def restricted(*moving: Any) -> list[Any]:
                results = function(*_merge(primals, wrt, moving))
                return [results[i] for i in seen]

            _, pullback = jax.vjp(restricted, *(primals[i] for i in wrt))
            return _conj(pullback(_conj(cotangents)))

        return JaxProgram.trace(
            backward,
            [*self.inputs, *(_strong(self.outputs[i]) for i in seen)],
            [*self.names, *_cotangent_names(seen, self)],
            self.origin,
        )

    def _jvp(self, wrt: tuple[int, ...]) -> "JaxProgram":
        function, count = jaxpr_as_fun(self.jaxpr), len(self.inputs)

        def forward(*arguments: Any) -> list[Any]:
            primals, tangents = arguments[:count], arguments[count:]

            def restricted(*moving: Any) -> list[Any]:
                results = function(*_merge(primals, wrt, moving))
                return [results[i] for i in self.smooth_outputs]

            return jax.jvp(restricted, [primals[i] for i in wrt], list(tangents))[1]

        return JaxProgram.trace(
            forward,
            [*self.inputs, *(_strong(self.inputs[i]) for i in wrt)],
            [*self.names, *(f"the tangent of {self.names[i]}" for i in wrt)],
            self.origin,
        )

    def _vmap(self, axes: tuple[int | None, ...], size: int) -> "JaxProgram":
        function = jax.vmap(jaxpr_as_fun(self.jaxpr), in_axes=axes, axis_size=size)
        inputs = [_batched(aval, axis, size) for aval, axis in zip(self.inputs, axes, strict=True)]
        return JaxProgram.trace(function, inputs, self.names, self.origin)


class Linearized:
    """A program and its linearisation at a point, which leaves the compiled forward pass as residuals.

    A residual that is an argument or a result is not made a second time: whoever keeps the residuals keeps
    that argument or result.

    Attributes:
        program: The program that is linearised.
        wrt: The positions of the arguments that move.
        forward: The program ``(*arguments) -> [*results, *residuals]``.
        kept: The results that are residuals, too.
        places: Where the pullback's arguments lie in ``[*arguments, *kept results, *residuals]``.
        array_places: Where they lie in ``[*arguments, *results, *residuals]``.
    """

    def __init__(self, program: JaxProgram, wrt: tuple[int, ...]) -> None:
        self.program = program
        self.wrt = wrt
        function = jaxpr_as_fun(program.jaxpr)
        smooth = program.smooth_outputs
        found: list[Any] = []

        def forward(*primals: Any) -> list[Any]:
            def restricted(*moving: Any) -> tuple[list[Any], list[Any]]:
                results = function(*_merge(primals, wrt, moving))
                return [results[i] for i in smooth], results

            _, pushforward, results = jax.linearize(restricted, *(primals[i] for i in wrt), has_aux=True)
            leaves, structure = jax.tree_util.tree_flatten(pushforward)
            traced = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
            found.append((structure, leaves, traced))
            return [*results, *(leaf for leaf, t in zip(leaves, traced, strict=True) if t)]

        jaxpr = jax.make_jaxpr(forward)(*map(_struct, program.inputs))
        self._structure, self._leaves, self._traced = found[-1]
        count = len(program.outputs)
        self._residuals = jaxpr.jaxpr.outvars[count:]
        self._constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        self._plan, everything = _thinned(jaxpr, count)
        self.forward = JaxProgram(everything, program.names, program.origin)
        self._locate(jaxpr.jaxpr, count)
        self._pullbacks = Cache(DERIVED_CACHE_SIZE)

    def _locate(self, jaxpr: Any, count: int) -> None:
        """Where each variable that the pullback is given is found."""
        inputs = {var: i for i, var in enumerate(jaxpr.invars)}
        made = {var: i for i, var in enumerate(self._plan.made)}
        results: dict[Any, int] = {}
        for i, var in enumerate(jaxpr.outvars[:count]):
            if not isinstance(var, Literal):
                results.setdefault(var, i)
        given = self._plan.given
        self.kept = tuple(sorted(results[v] for v in given if v not in inputs and v not in made))
        kept = {output: len(inputs) + i for i, output in enumerate(self.kept)}
        places, array_places = [], []
        for var in given:
            if var in inputs:
                places.append(inputs[var])
                array_places.append(inputs[var])
            elif var in made:
                places.append(len(inputs) + len(kept) + made[var])
                array_places.append(len(inputs) + count + made[var])
            else:
                places.append(kept[results[var]])
                array_places.append(len(inputs) + results[var])
        self.places, self.array_places = tuple(places), tuple(array_places)

    def pullback(self, seen: tuple[int, ...]) -> JaxProgram:
        """``(*residuals, *cotangents of the results seen) -> cotangents of wrt``."""
        return self._pullbacks.get(seen, lambda: _derive(self.program, "transposed", self._pullback, seen))

    def _pullback(self, seen: tuple[int, ...]) -> JaxProgram:
        place = {output: i for i, output in enumerate(self.program.smooth_outputs)}
        chosen = [place[i] for i in seen]
        moving = [_struct(self.program.inputs[i]) for i in self.wrt]
        given = [_struct(var.aval) for var in self._plan.given]

        def pull(*arguments: Any) -> Sequence[Any]:
            values, cotangents = arguments[: len(given)], arguments[len(given) :]
            residuals = iter(self._plan.evaluate(values, self._constants, self._residuals))
            pairs = zip(self._leaves, self._traced, strict=True)
            leaves = [next(residuals) if traced else leaf for leaf, traced in pairs]
            pushforward = jax.tree_util.tree_unflatten(self._structure, leaves)

            def restricted(*tangents: Any) -> list[Any]:
                results = pushforward(*tangents)
                return [results[i] for i in chosen]

            return _conj(jax.linear_transpose(restricted, *moving)(_conj(cotangents)))

        cotangents = [_strong(self.program.outputs[i]) for i in seen]
        names = ["a residual"] * len(given) + _cotangent_names(seen, self.program)
        return JaxProgram.trace(pull, [*given, *cotangents], names, self.program.origin)


def _derive(program: JaxProgram, what: str, build: Callable[..., Any], *arguments: Any) -> Any:
    """Build what is derived from a program; an error says that it was being derived."""
    with Noted(lambda _: f"while JAX {what} {program.describe()}"):
        return build(*arguments)


def _thinned(jaxpr: ClosedJaxpr, count: int) -> tuple[Plan, ClosedJaxpr]:
    """The plan for the residuals, outputs after the first ``count``, and the jaxpr that makes what it needs."""
    outputs, inner = jaxpr.jaxpr.outvars, jaxpr.jaxpr
    plan = plan_residuals(jaxpr, count, outputs[count:], thin=True)
    try:
        return plan, ClosedJaxpr(inner.replace(outvars=[*outputs[:count], *plan.made]), jaxpr.consts)
    except (AttributeError, TypeError, AssertionError):
        # This JAX does not let a jaxpr be given other outputs (or checks that it has its own): keep to its own.
        plan = plan_residuals(jaxpr, count, outputs[count:], thin=False)
    function = jaxpr_as_fun(jaxpr)
    place = {var: i for i, var in enumerate(outputs) if not isinstance(var, Literal)}
    wanted = [*range(count), *(place[var] for var in plan.made)]

    def select(*arguments: Any) -> list[Any]:
        results = function(*arguments)
        return [results[i] for i in wanted]

    return plan, jax.make_jaxpr(select)(*map(_struct, jaxpr.in_avals))


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


def _cotangent_names(seen: Sequence[int], program: JaxProgram) -> list[str]:
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


def _merge(primals: Sequence[Any], wrt: Sequence[int], moving: Sequence[Any]) -> list[Any]:
    merged = list(primals)
    for position, value in zip(wrt, moving, strict=True):
        merged[position] = value
    return merged


def _conj(arrays: Sequence[Any]) -> list[Any]:
    """Between the cotangent conventions of JAX and torch, either way."""
    return [jnp.conj(a) if jnp.issubdtype(a.dtype, jnp.complexfloating) else a for a in arrays]


def _smooth(avals: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact))


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _strong(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _batched(aval: Any, axis: int | None, size: int) -> jax.ShapeDtypeStruct:
    if axis is None:
        return _struct(aval)
    return jax.ShapeDtypeStruct((*aval.shape[:axis], size, *aval.shape[axis:]), aval.dtype)
