"""Which intermediate values are kept from a forward pass, and how the rest are had again.

JAX hands its pullback every value that it multiplies by, many of which are a cheap step away from another: a
broadcast scale as large as the activations, ``1 - y`` beside ``y``. XLA would keep them all, because they
are outputs. Here a residual that cheap operations make from values kept anyway, or from smaller ones, is
dropped, and the pullback computes it again inside its own kernels. A network with BatchNorm keeps half as many
bytes, which is what it keeps in native torch. (The idea is that of the partitioner in torch's AOTAutograd,
https://dev-discuss.pytorch.org/t/min-cut-optimal-recomputation-i-e-activation-checkpointing-with-aotautograd/467,
without its search for the optimum.)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal

__all__ = ["Plan", "plan_residuals"]

# Primitives that move data, or do a handful of flops an element; XLA fuses them into what reads them.
_CHEAP = frozenset(
    {
        *("broadcast_in_dim", "convert_element_type", "copy", "iota", "reshape", "squeeze", "transpose"),
        *(
            "abs",
            "add",
            "add_any",
            "clamp",
            "imag",
            "integer_pow",
            "max",
            "min",
            "mul",
            "neg",
            "real",
            "sign",
        ),
        *("square", "sub", "select_n", "and", "not", "or", "xor"),
        *("eq", "ge", "gt", "is_finite", "le", "lt", "ne"),
    }
)

# A value this many steps away, or made of this many others, is no longer cheap.
_MOST_STEPS = 12
_MOST_LEAVES = 6


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pullback is given, and the rest of its residuals.

    Attributes:
        given: The variables whose values it is given: arguments, results, and those of `made`.
        made: The variables that the forward pass must output for it.
        equations: The equations that compute the other residuals, in running order.
    """

    given: tuple[Any, ...]
    made: tuple[Any, ...]
    equations: tuple[Any, ...]

    def evaluate(
        self, values: Iterable[Any], constants: Mapping[Any, Any], wanted: Sequence[Any]
    ) -> list[Any]:
        """The values of the variables (or literals) ``wanted``, from those of ``given``."""
        known = {**constants, **dict(zip(self.given, values, strict=True))}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        for equation in self.equations:
            (variable,) = equation.outvars
            known[variable] = equation.primitive.bind(*map(read, equation.invars), **equation.params)
        return [read(atom) for atom in wanted]


def plan_residuals(jaxpr: ClosedJaxpr, count: int, residuals: Sequence[Any], thin: bool) -> Plan:
    """Choose what to keep of the ``residuals`` (variables) of a jaxpr with ``count`` results.

    With ``thin=False`` every residual is kept that is no argument, result or constant.
    """
    inner = jaxpr.jaxpr
    inputs, constants = set(inner.invars), set(inner.constvars)
    results = {var for var in inner.outvars[:count] if not isinstance(var, Literal)}
    wanted = list(dict.fromkeys(var for var in residuals if not isinstance(var, Literal)))
    free = inputs | constants | (results & set(wanted))
    search = _Search(inner, free, thin)
    search.keep(var for var in wanted if not search.is_cheap(var))
    search.keep_what_serves_several(wanted)
    # In running order, so that each finds the choices for all that came before it.
    for var in sorted(wanted, key=lambda var: search.order.get(var, -1)):
        search.keep(search.fewest_bytes(var))
    equations, used = search.equations(wanted)
    given = tuple(var for var in used if var not in constants)
    return Plan(given, tuple(var for var in given if var not in free), equations)


class _Search:
    """What is kept so far, and what each choice would cost."""

    def __init__(self, jaxpr: Any, free: set[Any], thin: bool) -> None:
        self.order = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        self._kept = set(free)
        self._made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._thin = thin

    def keep(self, variables: Iterable[Any]) -> None:
        self._kept.update(list(variables))

    def is_cheap(self, var: Any) -> bool:
        """Whether computing this again is cheap, once its operands are there."""
        if var in self._kept:
            return True
        equation = self._made_by[var]
        return self._thin and equation.primitive.name in _CHEAP and len(equation.outvars) == 1

    def fewest_bytes(self, var: Any) -> set[Any]:
        """What to keep beside what is kept, so that ``var`` can be had."""
        leaves = self._leaves(var)
        return {var} - self._kept if leaves is None or _total(leaves) >= _nbytes(var) else leaves

    def keep_what_serves_several(self, wanted: Sequence[Any]) -> None:
        """Keep a value that is no residual where it makes more bytes of residuals cheap than it has.

        A normalisation keeps its input less the mean twice, once for the variance: the input serves both.
        """
        served: dict[Any, list[tuple[Any, set[Any]]]] = {}
        for var in wanted:
            leaves = self._leaves(var)
            if var not in self._kept and leaves and len(leaves) <= _MOST_LEAVES:
                for leaf in leaves:
                    served.setdefault(leaf, []).append((var, leaves))
        for leaf, users in served.items():
            saved = [_nbytes(var) - _total(leaves - {leaf} - self._kept) for var, leaves in users]
            if sum(n for n in saved if n > 0) > _nbytes(leaf):
                self.keep([leaf])

    def _leaves(self, var: Any) -> set[Any] | None:
        """What has to be kept to compute ``var`` again by cheap steps; None if that takes too many."""
        leaves: set[Any] = set()
        seen: set[Any] = set()
        stack = [var]
        while stack:
            at = stack.pop()
            if at in self._kept or at in seen:
                continue
            if not self.is_cheap(at):
                leaves.add(at)
                continue
            seen.add(at)
            if len(seen) > _MOST_STEPS:
                return None
            stack += [operand for operand in self._made_by[at].invars if not isinstance(operand, Literal)]
        return leaves

    def equations(self, wanted: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """The equations that lead from what is kept to what is wanted, and what is used of it."""
        needed: set[Any] = set()
        used: dict[Any, None] = {}
        stack = list(wanted)
        while stack:
            var = stack.pop()
            if var in self._kept:
                used[var] = None
            elif var not in needed:
                needed.add(var)
                stack += [v for v in self._made_by[var].invars if not isinstance(v, Literal)]
        ordered = sorted(needed, key=lambda var: self.order[var])
        return tuple(self._made_by[var] for var in ordered), list(used)


def _total(variables: Iterable[Any]) -> int:
    return sum(map(_nbytes, variables))


def _nbytes(var: Any) -> int:
    aval = var.aval
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 1)
