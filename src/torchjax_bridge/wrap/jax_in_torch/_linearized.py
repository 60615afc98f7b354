"""A program linearised at a point: first its values and residuals, later its pullback.

Owns where each residual lies: among the arguments, the results, or the outputs added for it. ``_residuals``
says which intermediate values are kept.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from .._cache import Cache
from ._abstract_values import conj, merge, strong, struct
from ._program import DERIVED_CACHE_SIZE, JaxProgram, cotangent_names, derive
from ._residuals import ResidualPlan, plan_residuals

__all__ = ["Linearized"]


class Linearized:
    """A program and its linearisation at a point. The compiled forward pass returns the residuals.

    A residual that is an argument or a result is not output a second time: the argument or result itself is kept.

    Attributes:
        program: The program that is linearised.
        wrt: The positions of the arguments that are differentiated.
        forward: The program ``(*arguments) -> [*results, *residuals]``.
        kept: The positions of results that are residuals, too.
        places: The positions of the pullback's arguments in ``[*arguments, *kept results, *residuals]``.
        array_places: Their positions in ``[*arguments, *results, *residuals]``.
    """

    @classmethod
    def of(cls, program: JaxProgram, wrt: tuple[int, ...]) -> "Linearized":
        """The linearisation in the arguments ``wrt``, made once and kept with the program."""
        return program.derived.get(
            ("linear", wrt), lambda: derive(program, "differentiated", cls, program, wrt)
        )

    def __init__(self, program: JaxProgram, wrt: tuple[int, ...]) -> None:
        self.program = program
        self.wrt = wrt
        function = jaxpr_as_fun(program.jaxpr)
        smooth = program.smooth_outputs
        found: list[Any] = []

        def forward(*primals: Any) -> list[Any]:
            def restricted(*moving: Any) -> tuple[list[Any], list[Any]]:
                results = function(*merge(primals, wrt, moving))
                return [results[i] for i in smooth], results

            _, pushforward, results = jax.linearize(restricted, *(primals[i] for i in wrt), has_aux=True)
            leaves, structure = jax.tree_util.tree_flatten(pushforward)
            traced = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
            found.append((structure, leaves, traced))
            return [*results, *(leaf for leaf, t in zip(leaves, traced, strict=True) if t)]

        jaxpr = jax.make_jaxpr(forward)(*map(struct, program.inputs))
        self._structure, self._leaves, self._traced = found[-1]
        count = len(program.outputs)
        self._residuals = jaxpr.jaxpr.outvars[count:]
        self._constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        self._plan, everything = _thin(jaxpr, count)
        self.forward = JaxProgram(everything, program.names, program.origin)
        self._locate(jaxpr.jaxpr, count)
        self._pullbacks = Cache(DERIVED_CACHE_SIZE)

    def _locate(self, jaxpr: Any, count: int) -> None:
        """Find the position of each variable that the pullback takes."""
        inputs = {var: i for i, var in enumerate(jaxpr.invars)}
        added = {var: i for i, var in enumerate(self._plan.outputs)}
        results: dict[Any, int] = {}
        for i, var in enumerate(jaxpr.outvars[:count]):
            if not isinstance(var, Literal):
                results.setdefault(var, i)
        given = self._plan.given
        self.kept = tuple(sorted(results[v] for v in given if v not in inputs and v not in added))
        kept = {output: len(inputs) + i for i, output in enumerate(self.kept)}
        places, array_places = [], []
        for var in given:
            if var in inputs:
                places.append(inputs[var])
                array_places.append(inputs[var])
            elif var in added:
                places.append(len(inputs) + len(kept) + added[var])
                array_places.append(len(inputs) + count + added[var])
            else:
                places.append(kept[results[var]])
                array_places.append(len(inputs) + results[var])
        self.places, self.array_places = tuple(places), tuple(array_places)

    def pullback(self, seen: tuple[int, ...]) -> JaxProgram:
        """``(*residuals, *cotangents of the results seen) -> cotangents of wrt``."""
        return self._pullbacks.get(seen, lambda: derive(self.program, "transposed", self._pullback, seen))

    def _pullback(self, seen: tuple[int, ...]) -> JaxProgram:
        place = {output: i for i, output in enumerate(self.program.smooth_outputs)}
        chosen = [place[i] for i in seen]
        moving = [struct(self.program.inputs[i]) for i in self.wrt]
        given = [struct(var.aval) for var in self._plan.given]

        def pull(*arguments: Any) -> Sequence[Any]:
            values, cotangents = arguments[: len(given)], arguments[len(given) :]
            residuals = iter(self._plan.evaluate(values, self._constants, self._residuals))
            pairs = zip(self._leaves, self._traced, strict=True)
            leaves = [next(residuals) if traced else leaf for leaf, traced in pairs]
            pushforward = jax.tree_util.tree_unflatten(self._structure, leaves)

            def restricted(*tangents: Any) -> list[Any]:
                results = pushforward(*tangents)
                return [results[i] for i in chosen]

            return conj(jax.linear_transpose(restricted, *moving)(conj(cotangents)))

        cotangents = [strong(self.program.outputs[i]) for i in seen]
        names = ["a residual"] * len(given) + cotangent_names(seen, self.program)
        return JaxProgram.trace(pull, [*given, *cotangents], names, self.program.origin)


def _thin(jaxpr: ClosedJaxpr, count: int) -> tuple[ResidualPlan, ClosedJaxpr]:
    """The plan for the residuals (the outputs after the first ``count``), and the jaxpr with the plan's outputs."""
    outputs, inner = jaxpr.jaxpr.outvars, jaxpr.jaxpr
    plan = plan_residuals(jaxpr, count, outputs[count:], thin=True)
    try:
        return plan, ClosedJaxpr(inner.replace(outvars=[*outputs[:count], *plan.outputs]), jaxpr.consts)
    except (AttributeError, TypeError, AssertionError):
        # This JAX does not allow a jaxpr with other outputs, so use its own.
        plan = plan_residuals(jaxpr, count, outputs[count:], thin=False)
    function = jaxpr_as_fun(jaxpr)
    place = {var: i for i, var in enumerate(outputs) if not isinstance(var, Literal)}
    wanted = [*range(count), *(place[var] for var in plan.outputs)]

    def select(*arguments: Any) -> list[Any]:
        results = function(*arguments)
        return [results[i] for i in wanted]

    return plan, jax.make_jaxpr(select)(*map(struct, jaxpr.in_avals))
