"""Which intermediate values are kept from a forward pass, and how the rest are had again.

JAX hands its pullback every value that it multiplies by, many of which are a cheap step away from another: a
broadcast scale as large as the activations, ``1 - y`` beside ``y``. XLA would keep them all, because they
are outputs. Here a residual that cheap operations make from values kept anyway, or from smaller ones, is
dropped, and the pullback computes it again inside its own kernels. A network with BatchNorm keeps half as many
bytes, which is what it keeps in native torch. (The idea is that of the partitioner in torch's AOTAutograd,
https://dev-discuss.pytorch.org/t/min-cut-optimal-recomputation-i-e-activation-checkpointing-with-aotautograd/467,
without its search for the optimum.)

What is computed twice may differ in the last bit, since XLA fuses each time as it sees fit. A gradient that is a
smooth function of a residual differs by a rounding error, no more. But a step (a comparison, a sign, an index
cast from a float) tells apart what differs in the last bit: ``y == y.max()`` would find no maximum in the ``y``
of the second time, and its gradient would be lost. So steps are taken again only of values that are the same
bits both times, and what code of the user's own reads in the backward pass (`read_by_code`) is kept.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

__all__ = ["Plan", "plan_residuals", "read_by_code"]

# Cheap primitives whose results are the same bits each time they are computed from the same bits.
_EXACT = frozenset(
    {
        *("broadcast_in_dim", "copy", "iota", "reshape", "squeeze", "transpose"),
        *("abs", "clamp", "imag", "max", "min", "neg", "real", "select_n", "sign"),
        *("and", "not", "or", "xor", "eq", "ge", "gt", "is_finite", "le", "lt", "ne"),
    }
)
# Primitives that move data, or do a handful of flops an element; XLA fuses them into what reads them.
_CHEAP = _EXACT | {"add", "add_any", "convert_element_type", "integer_pow", "mul", "square", "sub"}

# Primitives that run code of their own, all of it linear where it is a part of a linear program.
_TRANSPARENT = frozenset({"closed_call", "cond", "jit", "pjit", "scan", "scatter-add", "while"})

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


def read_by_code(linear: ClosedJaxpr, count: int) -> tuple[int, ...]:
    """Which of the first ``count`` arguments of a linear program some code in it reads as it likes.

    A ``custom_vjp`` rule and a checkpointed function are given residuals, and may compare them with each other.
    """
    equations = linear.jaxpr.eqns
    read = {var for eqn in equations if _runs_code(eqn) for var in eqn.invars if not _is_literal(var)}
    return tuple(i for i, var in enumerate(linear.jaxpr.invars[:count]) if var in read)


def _runs_code(equation: Any) -> bool:
    transparent = equation.primitive.name in _TRANSPARENT
    for param in equation.params.values():
        for part in param if isinstance(param, tuple | list) else (param,):
            inner: Any = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                if not transparent or any(map(_runs_code, inner.eqns)):
                    return True
            elif not transparent and _is_function(part):
                return True
    return False


def _is_function(part: Any) -> bool:
    """Whether a parameter of an equation is Python code, which jax may hold in a wrapper of its own."""
    return (callable(part) and not isinstance(part, type)) or hasattr(part, "call_wrapped")


def plan_residuals(
    jaxpr: ClosedJaxpr, count: int, residuals: Sequence[Any], pinned: Collection[int] = (), *, thin: bool
) -> Plan:
    """Choose what to keep of the ``residuals`` (variables) of a jaxpr with ``count`` results.

    Those at the positions ``pinned`` are not computed again. With ``thin=False`` every residual is kept that is no
    argument, result or constant.
    """
    inner = jaxpr.jaxpr
    inputs, constants = set(inner.invars), set(inner.constvars)
    results = {var for var in inner.outvars[:count] if not _is_literal(var)}
    wanted = list(dict.fromkeys(var for var in residuals if not _is_literal(var)))
    free = inputs | constants | (results & set(wanted))
    search = _Search(inner, free, thin)
    search.keep(residuals[i] for i in pinned if not _is_literal(residuals[i]))
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
        self._exact = {*jaxpr.invars, *jaxpr.constvars}
        for eqn in jaxpr.eqns:
            exact = eqn.primitive.name in _EXACT or not any(map(_is_smooth, eqn.invars))
            if exact and self._of_exact(eqn):
                self._exact.update(eqn.outvars)

    def keep(self, variables: Iterable[Any]) -> None:
        self._kept.update(list(variables))

    def is_cheap(self, var: Any) -> bool:
        """Whether computing this again is cheap, once its operands are there."""
        if var in self._kept:
            return True
        equation = self._made_by[var]
        if not self._thin or equation.primitive.name not in _CHEAP or len(equation.outvars) != 1:
            return False
        return not _is_step(equation) or self._of_exact(equation)

    def _of_exact(self, equation: Any) -> bool:
        """Whether what an equation reads is the same bits each time: integers, or made of arguments exactly."""
        return all(_is_literal(var) or var in self._exact or not _is_smooth(var) for var in equation.invars)

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
            stack += [operand for operand in self._made_by[at].invars if not _is_literal(operand)]
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
                stack += [v for v in self._made_by[var].invars if not _is_literal(v)]
        ordered = sorted(needed, key=lambda var: self.order[var])
        return tuple(self._made_by[var] for var in ordered), list(used)


def _is_step(equation: Any) -> bool:
    """Whether a change in the last bit of an operand may change all of the result."""
    return equation.primitive.name in ("select_n", "sign") or not _is_smooth(equation.outvars[0])


def _is_smooth(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _is_literal(var: Any) -> bool:
    return isinstance(var, Literal)


def _total(variables: Iterable[Any]) -> int:
    return sum(map(_nbytes, variables))


def _nbytes(var: Any) -> int:
    aval = var.aval
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 1)
