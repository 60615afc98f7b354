"""`as_jax_function`: a torch function as a JAX function.

Owns the public function and its bounded cache: one specialization for each call signature. ``_arguments``
turns the arguments into arrays, ``_specialize`` learns what a call does, and ``_primitive`` runs it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast

import jax

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import refuse_in_fork

from .._cache import Cache, CacheInfo
from .._call import split_call
from .._settings import x64
from ._arguments import as_arrays, device_of, is_array
from ._primitive import bind
from ._random import draw_noise, has_key, take_key
from ._specialize import Specializer

__all__ = ["JaxFunction", "as_jax_function"]

# How many call signatures (structure, shapes, dtypes, static values) a wrapped function remembers.
CACHE_SIZE = 256


class JaxFunction(Protocol):
    """What `as_jax_function` returns, for a type checker; at run time it is a plain function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``fn`` of JAX arrays."""

    def cache_info(self) -> CacheInfo:
        """How many call signatures are known, and how often a call had a known one."""

    def cache_clear(self) -> None:
        """Forget every call signature."""


def as_jax_function(
    fn: Callable[..., Any],
    *,
    output_shape: Any = None,
    residuals: Literal["save", "recompute"] = "save",
) -> JaxFunction:
    """A torch function as a JAX function, under every transform of JAX.

    The result takes and returns JAX arrays, and runs ``fn`` in torch: eagerly, inside ``jax.jit``, and under
    ``grad``, ``jvp``, ``vmap``, ``scan``, ``shard_map`` and their compositions, to any order. Derivatives are
    torch's own, from graphs of ATen operators that are traced once for each call signature.

    Args:
        fn: Takes torch tensors in any JAX pytree, positionally or by keyword, and static values. Returns a pytree
            of dense tensors and numbers. It should depend only on its arguments and closed-over tensors, and have
            no side effects.
        output_shape: For code whose control flow or output shapes depend on values: the output as a pytree of
            ``jax.ShapeDtypeStruct``, or a function that makes it from the call's arguments. Such code runs as
            Python at every order of derivative, and lane by lane under ``vmap``. Not needed for other code.
        residuals: ``"save"``: under reverse mode the forward pass returns the tensors that the backward pass
            needs, as JAX arrays. ``"recompute"``: it returns none, and the backward pass runs the forward pass
            again (less memory, more time).

    Returns:
        A function of the same arguments. Arrays (JAX or numpy) are traced values. Python numbers, strings and
        other hashable leaves are static; each new value of one is a new call signature. It takes one more
        keyword, ``key``: a JAX PRNG key, from which all random numbers of the call are made. (If ``fn`` itself
        has an argument of that name, only a typed key, ``jax.random.key(...)``, counts as one.)
        ``.cache_info()`` and ``.cache_clear()`` concern the call signatures known so far.

    Raises:
        ArgumentError: An argument can be neither traced nor static; or ``fn`` is no function, or
            ``residuals`` is unknown.
        DtypeError: An argument has a dtype unknown to torch; or an output needs x64, which is off.
        NarrowingError: x64 is off and a 64-bit integer of the result does not fit in 32 bits.
        OutputError: The output is no pytree of dense tensors, depends on values without ``output_shape``,
            or is not what was announced.
        TransformError: ``fn`` writes to tensors it did not receive, draws random numbers without ``key``,
            or cannot be differentiated.

    An exception of ``fn`` itself arrives unchanged where JAX runs eagerly or traces. Inside a compiled function
    JAX raises its own error (``jax.errors.JaxRuntimeError``, or ``ValueError`` on its fast path), with the
    original type, message and traceback in the text.

    Memory:
        torch reads the inputs without a copy and never writes to them: an input that ``fn`` edits in place, or
        keeps, is copied first. Each result is written once, into JAX's memory.

    >>> import jax, jax.numpy as jnp, torch
    >>> f = as_jax_function(lambda x, scale: torch.sin(x).sum() * scale)
    >>> jax.jit(jax.grad(f))(jnp.zeros(3), scale=2.0)
    Array([2., 2., 2.], dtype=float32)
    """
    if not callable(fn):
        raise ArgumentError(f"as_jax_function takes a torch function, and got {what_kind(fn)}.")
    if residuals not in ("save", "recompute"):
        raise ArgumentError(f"residuals={residuals!r} is neither 'save' nor 'recompute'.")
    wrapped = _Wrapped(fn, output_shape, residuals == "save")

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapped(args, kwargs)

    functools.update_wrapper(call, fn, updated=())
    call.cache_info = wrapped.specializations.info  # type: ignore[attr-defined]
    call.cache_clear = wrapped.specializations.clear  # type: ignore[attr-defined]
    return cast(JaxFunction, call)


class _Wrapped:
    """A torch function and its specializations. They die with the function that `as_jax_function` returned."""

    def __init__(self, fn: Callable[..., Any], output_shape: Any, save: bool) -> None:
        self.specializer = Specializer(fn, output_shape, save)
        self.specializations = Cache(CACHE_SIZE)
        self.own_key = has_key(fn)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_in_fork("call a torch function from JAX")
        key = take_key(kwargs, self.own_key)
        leaves, structure = split_call(args, kwargs, is_array)
        arrays, specs = as_arrays(leaves, structure)
        device = device_of(arrays)
        has_noise = key is not None
        specializer = self.specializer
        signature = (structure, specs, device, has_noise, x64(), specializer.ambient.now(device.type))
        special = self.specializations.get(
            signature, lambda: specializer.specialize(structure, specs, device, has_noise)
        )
        if key is not None and special.draws:
            arrays += draw_noise(key, special.draws)
        return jax.tree_util.tree_unflatten(special.out_treedef, bind(special.apply, arrays))
