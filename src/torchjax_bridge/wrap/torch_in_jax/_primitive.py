"""The one JAX primitive through which torch runs, and its rules.

Each rule binds the primitive again on another operation (`Op`), so the set is closed. The jvp of a torch
function is a torch function with residuals, and a linear map that takes them. The transpose of a linear map
is a linear map. The batch of any operation is that operation over one more axis; its rules are those of the
operation itself under ``jax.vmap``, so they are written once.

Owns what JAX asks of a primitive: abstract values (with the mesh axes over which they vary inside
``shard_map``), lowering, jvp, transpose and batching. The operations are in ``_ops``; ``_callback`` runs
them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import ad, batching, mlir

from torchjax_bridge.errors import TransformError

from ._callback import call_op, call_op_eagerly
from ._ops import Apply, LinearMap, Op, Save, Vmapped

__all__ = ["bind"]

torch_call_p = Primitive("torch_call")
torch_call_p.multiple_results = True


def bind(op: Op, operands: Sequence[Any]) -> list[Any]:
    """Run an operation on arrays or tracers, under whatever transforms are active."""
    return torch_call_p.bind(*_align_varying_axes(operands), op=op, weak_key=_weak_key())


def _weak_key() -> Jaxpr:
    """A parameter that lets JAX forget the operation.

    JAX caches abstract evaluation by the equation's parameters. It never drops most of them, but it holds jaxprs
    weakly and drops an entry when its jaxpr is gone. Only the equation holds this empty jaxpr, so the entry dies
    with the equation, and with it the operation and the user's function.
    """
    return Jaxpr((), (), (), (), debug_info=_debug_info())


@functools.cache
def _debug_info() -> Any:
    return jax.make_jaxpr(lambda: ())().jaxpr.debug_info


# --- abstract values ------------------------------------------------------------------------------------


def _varying_axes(value: Any) -> frozenset[Any]:
    """The manual mesh axes over which a value differs from device to device."""
    return _varying_axes_of(jax.typeof(value))


def _varying_axes_of(aval: Any) -> frozenset[Any]:
    manual = getattr(aval, "mat", None)  # since jax 0.10; before, the attribute "vma" held the axes
    return manual.varying if manual is not None else getattr(aval, "vma", frozenset())


def _align_varying_axes(operands: Sequence[Any]) -> Sequence[Any]:
    """The operands, cast to vary over the union of their axes; the transpose of the cast sums over devices."""
    axes = [_varying_axes(x) for x in operands]
    union: frozenset[Any] = frozenset().union(*axes)
    if not union:
        return operands
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


def _abstract(*avals: Any, op: Op, weak_key: Jaxpr) -> list[Any]:
    structs = [encoding.struct() for encoding in op.outs]
    first = next((aval for aval in avals if _varying_axes_of(aval)), None)
    if first is None:
        return [jax.core.ShapedArray(s.shape, s.dtype) for s in structs]
    return [
        first.update(
            shape=s.shape,
            dtype=s.dtype,
            weak_type=False,
            sharding=first.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(s.shape))),
        )
        for s in structs
    ]


torch_call_p.def_abstract_eval(_abstract)


# --- running ---------------------------------------------------------------------------------------------


def _impl(*operands: Any, op: Op, weak_key: Jaxpr) -> list[Any]:
    return call_op_eagerly(op, operands)


torch_call_p.def_impl(_impl)


def _lower(context: Any, *operands: Any, op: Op, weak_key: Jaxpr) -> Any:
    platforms = context.module_context.platforms
    known = ("cuda", "rocm") if op.device.type == "cuda" else ("cpu",)  # torch calls AMD's GPUs cuda, too
    if any(platform not in known for platform in platforms):
        raise TransformError(
            f"this torch function was traced for '{op.device}' and is now compiled for {', '.join(platforms)}. "
            "Call it on arrays of that device, or under jax.default_device(...)."
        )
    return mlir.lower_fun(lambda *values: call_op(op, values), multiple_results=True)(context, *operands)


mlir.register_lowering(torch_call_p, _lower)


# --- jvp -------------------------------------------------------------------------------------------------


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], op: Op) -> tuple[list[Any], list[Any]]:
    moving = tuple(
        i
        for i, (tangent, encoding) in enumerate(zip(tangents, op.ins, strict=True))
        if type(tangent) is not ad.Zero and encoding.spec.differentiable
    )
    if isinstance(op, Vmapped):
        return _jvp_vmapped(op, primals, tangents, moving)
    if isinstance(op, LinearMap):
        return _jvp_linear(op, primals, tangents, moving)
    apply: Apply = op.apply if isinstance(op, Save) else op  # type: ignore[assignment]
    if not moving or not apply.program.smooth_outs:
        results = bind(op, primals)
        return results, [_zero(result) for result in results]
    # Residuals for more inputs than have tangents serve, too.
    save = op if isinstance(op, Save) and set(moving) <= set(op.wrt) else apply.with_residuals(moving)
    results = bind(save, primals)
    pushed = bind(
        save.linear_map(moving, transposed=False),
        [*primals, *save.saved_values(results), *(tangents[i] for i in moving)],
    )
    if isinstance(op, Save) and op is not save:
        results = bind(op, primals)
    results = results[: len(op.outs)]
    return results, _float_tangents(apply, results, pushed)


def _float_tangents(apply: Apply, results: Sequence[Any], pushed: Sequence[Any]) -> list[Any]:
    """A tangent for each result: of the float outputs the given one, of integers and residuals zero."""
    return _filled_with_zeros(results, apply.program.smooth_outs, pushed)


def _filled_with_zeros(
    results: Sequence[Any], positions: Sequence[int], tangents: Sequence[Any]
) -> list[Any]:
    """A tangent for each result: the given ones at ``positions``, and zeros elsewhere."""
    given = dict(zip(positions, tangents, strict=True))
    return [given[i] if i in given else _zero(result) for i, result in enumerate(results)]


def _zero(value: Any) -> Any:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def _jvp_linear(
    op: LinearMap, primals: Sequence[Any], tangents: Sequence[Any], moving: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    n, first = len(op.save.ins), op.linear
    # The inputs determine the saved tensors, so the derivative is taken in the inputs.
    moved = [i for i in moving if i < n or i >= first]
    results = bind(op, primals)
    if not moved:
        return results, [_zero(result) for result in results]
    if all(i >= first for i in moved):
        tangent = [ad.instantiate_zeros(t) for t in tangents[first:]]
        return results, bind(op, [*primals[:first], *tangent])
    values = [*primals[:n], *primals[first:]]
    slopes = [*tangents[:n], *tangents[first:]]
    return _jvp(values, slopes, op.as_apply())


def _jvp_vmapped(
    op: Vmapped, primals: Sequence[Any], tangents: Sequence[Any], moving: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    with_tangent: list[int] = []

    def one(values: list[Any], slopes: list[Any]) -> tuple[list[Any], list[Any]]:
        full: list[Any] = [_zero(value) for value in values]
        for i, slope in zip(moving, slopes, strict=True):
            full[i] = slope
        results, pushed = _jvp(values, full, op.base)
        with_tangent[:] = [i for i, t in enumerate(pushed) if type(t) is not ad.Zero]
        return results, [pushed[i] for i in with_tangent]

    results, pushed = jax.vmap(
        one,
        in_axes=(list(op.dims), [op.dims[i] for i in moving]),
        out_axes=(list(op.out_dims), 0),
        axis_size=op.size,
    )(list(primals), [tangents[i] for i in moving])
    return results, _filled_with_zeros(results, with_tangent, pushed)


ad.primitive_jvps[torch_call_p] = lambda primals, tangents, *, op, weak_key: _jvp(primals, tangents, op)


# --- transpose -------------------------------------------------------------------------------------------


def _transpose(cotangents: Sequence[Any], *operands: Any, op: Op, weak_key: Jaxpr) -> list[Any]:
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    if any(i < op.linear for i in unknown):
        raise TransformError(
            "a torch function is not known to be linear, so jax.linear_transpose cannot take it. Use jax.vjp."
        )
    filled = [ad.instantiate_zeros(ct) for ct in cotangents]
    results = _transpose_op(op, list(operands), filled, unknown)
    out: list[Any] = [None] * len(operands)
    for i, result in zip(unknown, results, strict=True):
        out[i] = result
    return out


def _transpose_op(op: Op, operands: list[Any], cotangents: list[Any], unknown: list[int]) -> list[Any]:
    """The cotangents of the operands ``unknown``."""
    first = op.linear
    if isinstance(op, Vmapped):
        fixed = operands[:first]

        def one(fixed: list[Any], cotangents: list[Any]) -> list[Any]:
            return _transpose_op(op.base, [*fixed, *operands[first:]], cotangents, unknown)

        lanes = jax.vmap(one, in_axes=(list(op.dims[:first]), 0), out_axes=0, axis_size=op.size)(
            fixed, cotangents
        )
        # An operand that all lanes share gets the sum of the lanes' cotangents.
        return [
            jnp.sum(lane, axis=0, dtype=lane.dtype) if dim is None else jnp.moveaxis(lane, 0, dim)
            for lane, dim in zip(lanes, (op.dims[i] for i in unknown), strict=True)
        ]
    found = bind(op.transpose(), [*operands[:first], *cotangents])  # type: ignore[attr-defined]
    return [found[i - first] for i in unknown]


ad.primitive_transposes[torch_call_p] = _transpose


# --- batching --------------------------------------------------------------------------------------------


def _batch(
    operands: Sequence[Any], dims: Sequence[Any], *, op: Op, weak_key: Jaxpr
) -> tuple[list[Any], list[Any]]:
    places = [None if dim is batching_not_mapped else dim for dim in dims]
    size = next(x.shape[d] for x, d in zip(operands, places, strict=True) if d is not None)
    moved = list(operands)
    for i, (encoding, dim) in enumerate(zip(op.ins, places, strict=True)):
        if dim is not None and encoding.form == "bits":  # its last axis is no axis of the tensor
            moved[i], places[i] = jnp.moveaxis(moved[i], dim, 0), 0
    batched = op.vmapped(tuple(places), size)
    return bind(batched, moved), [batching_not_mapped if d is None else d for d in batched.out_dims]


# JAX's value for "no batch axis": None since jax 0.10.
batching_not_mapped: Any = getattr(batching, "not_mapped", None)

batching.primitive_batchers[torch_call_p] = _batch
