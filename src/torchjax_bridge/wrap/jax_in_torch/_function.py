"""`as_torch_function`: a JAX function as a torch function, with every transform of torch.

Owns the public function, and the key under which the program of a call is cached. ``_arguments`` says what a
call may hold; ``_trace`` traces the user's Python into a program (``_program``); ``_run`` runs it on tensors;
``_autograd`` differentiates it; ``_compile`` and ``_op`` show it to ``torch.compile``.
"""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torch.nn.parameter import is_lazy

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError, TransformError
from torchjax_bridge.exchange import dtensor_class

from .._cache import Cache, CacheInfo
from .._call import CallStructure, StaticArguments, split_call
from .._settings import settings
from .._sharded import sharded_argument
from ._arguments import as_jax_value, is_value, is_value_but_no_bool
from ._autograd import call
from ._program import Origin
from ._registry import register
from ._state import hidden_from_dynamo, jit_tracing, modes_active
from ._trace import Trace, in_numbers, refuse_nested, trace

__all__ = ["TorchFunction", "as_torch_function"]

# How many structures, shapes, dtypes and static values one function keeps compiled.
CACHE_SIZE = 256

_is_compiling = torch.compiler.is_compiling
_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter
# Code raises one of these if it gets a tracer for a bool, or a bool for an array.
_TRACING_ERRORS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)


def as_torch_function(
    fn: Callable[..., Any],
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> "TorchFunction":
    """A JAX function as a torch function: it takes and returns tensors, under every transform of torch.

    Autograd to any order, ``torch.func``, forward-mode AD, ``torch.compile(fullgraph=True)``, checkpointing
    and saved-tensor hooks treat it like an operator of torch's own.

    Args:
        fn: Any function that ``jax.jit`` accepts, jitted or not. Its Python runs once for each combination of
            structure, shapes, dtypes and static values. Closed-over values are those of that run, as under
            ``jax.jit``.
        static_argnums: Positions of arguments that are hashable Python values to ``fn``, not traced. As
            for ``jax.jit``, names follow from positions and positions from names.
        static_argnames: Names of such arguments.

    Returns:
        A `TorchFunction`. Its arguments, by position or keyword, are JAX pytrees (dicts, tuples, namedtuples,
        registered dataclasses, ``None``). Their leaves are

        * ``torch.Tensor``: traced, and differentiated if it requires grad;
        * ``jax.Array`` (also PRNG keys) and ``numpy.ndarray``: traced, with no gradient;
        * ``bool``, ``int``, ``float``, ``complex`` and numpy scalars: traced, weakly typed, one program for
          all values. If ``fn`` branches on a bool (or cannot be traced with it for another reason), all bools
          of the call are static, also those inside a module or dict: one program for each value. If it
          branches on a number, name the argument in ``static_argnames``;
        * anything else that is hashable (strings, functions, dtypes, enums that are no numbers): static.

        It returns what ``fn`` returns, with a tensor for each array, or a ``jax.Array`` for a PRNG key.
        Integer and bool results do not require grad.

    Raises:
        ArgumentError: (when called) A leaf that is neither a value nor hashable, or a JAX tracer.
        ExchangeError: (when called) A tensor that JAX cannot hold, named by its place (``args[0]['x']``);
            with x64 off, ``float64`` raises and ``int64`` becomes ``int32`` where every value fits.
        OutputError: (when called) ``fn`` returns a dtype that torch does not have.

    Memory:
        JAX reads tensors without a copy where `to_jax` can share them. You may write to them as soon as the call
        returns. Results have memory of their own. For a backward pass, ``ctx.save_for_backward`` keeps the
        argument tensors and JAX's residuals. A residual that is an argument or a result is kept once; writing to
        one before the backward pass is torch's usual error. Under ``torch.no_grad`` nothing is kept.

    Gradients of complex tensors follow torch's convention, the conjugate of JAX's
    (https://docs.pytorch.org/docs/stable/notes/autograd.html#autograd-for-complex-numbers).

    >>> import jax.numpy as jnp, torch
    >>> layer = as_torch_function(lambda x, w: jnp.tanh(x @ w))
    >>> w = torch.ones(3, 2, requires_grad=True)
    >>> layer(torch.ones(4, 3), w).sum().backward()
    >>> w.grad.shape
    torch.Size([3, 2])
    >>> layer.cache_info()
    CacheInfo(hits=0, misses=1, maxsize=256, currsize=1)
    """
    return TorchFunction(fn, static_argnums, static_argnames)


class TorchFunction:
    """What `as_torch_function` returns: call it on tensors.

    Several threads may call it at once. Everything that it compiled dies with it.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
    ) -> None:
        if not callable(fn):
            raise ArgumentError(
                f"as_torch_function wraps a function of JAX arrays; {what_kind(fn)} is not callable."
            )
        if isinstance(fn, torch.nn.Module | TorchFunction):
            raise ArgumentError(
                f"as_torch_function wraps a function of JAX arrays; {what_kind(fn)} works on tensors already."
            )
        self._fn = fn
        self._static = StaticArguments(fn, static_argnums, static_argnames)
        self._traces = Cache(CACHE_SIZE)
        self._origin = Origin(getattr(fn, "__qualname__", type(fn).__qualname__))
        self._name = register(self)
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the JAX function on tensors."""
        if _is_compiling():
            from ._compile import call_in_graph

            return call_in_graph(self._name, args, kwargs)
        return self.call(args, kwargs)

    @hidden_from_dynamo
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`__call__`, as a graph of ``torch.compile`` runs it."""
        leaves, trace = self.prepare(args, kwargs)
        results = call(trace.program, leaves)
        if trace.bare:
            return results[0]
        return jax.tree_util.tree_unflatten(trace.structure, results)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "tuple[list[Any], Trace]":
        """The dynamic leaves of a call, and the program for them."""
        if jit_tracing():
            raise TransformError(
                f"torch.jit.trace would keep the results of {self._origin.title} as constants. Use torch.export "
                "or torch.compile."
            )
        try:
            return self._prepare(args, kwargs)
        except RuntimeError:
            self._refuse_shapeless(args, kwargs)
            raise

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "tuple[list[Any], Trace]":
        symbolic = modes_active()
        if not kwargs and not symbolic and not self._static:
            # A fast path for the plainest call: tensors by position.
            key: list[Any] = []
            for leaf in args:
                if type(leaf) is not _Tensor and type(leaf) is not _Parameter:
                    break
                key += (leaf.dtype, leaf.shape)
            else:
                key.append(settings())
                return list(args), self._traces.get(tuple(key), lambda: self._trace(args))
        return self._lookup(args, kwargs, self._is_dynamic, symbolic)

    def _lookup(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], is_dynamic: Callable[[Any], bool], symbolic: bool
    ) -> "tuple[list[Any], Trace]":
        leaves, structure = split_call(args, kwargs, is_dynamic, self._static, self._roots)
        types: list[Any] = []
        sharded = dtensor_class()
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, _Tensor):
                if type(leaf) is sharded:
                    raise sharded_argument(structure.names()[i])
                types.append((leaf.dtype, in_numbers(leaf.shape) if symbolic else leaf.shape))
            else:
                leaves[i], leaf_type = as_jax_value(leaf, structure, i)
                types.append(leaf_type)
        key = (structure.treedef, structure.static, *types, settings())
        if bool not in types:
            return leaves, self._traces.get(key, lambda: self._trace(leaves, structure))

        def with_static_bools() -> "tuple[list[Any], Trace]":
            return self._lookup(args, kwargs, is_value_but_no_bool, symbolic)

        found = self._traces.get(
            key, lambda: _trace_with_bools(lambda: self._trace(leaves, structure), with_static_bools)
        )
        return with_static_bools() if found is None else (leaves, found)

    def _trace(self, leaves: Sequence[Any], structure: CallStructure | None = None) -> "Trace":
        if structure is None:
            structure = split_call(tuple(leaves), {}, self._is_dynamic)[1]
        return trace(self._fn, leaves, structure, structure.names(), self._origin)

    def _refuse_shapeless(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise for the first tensor whose shape is not known."""
        leaves, structure = split_call(
            args, kwargs, lambda leaf: isinstance(leaf, _Tensor), roots=self._roots
        )
        for leaf, name in zip(leaves, structure.names(), strict=True):
            refuse_nested(leaf, name)
            if is_lazy(leaf):
                raise ArgumentError(
                    f"{name} is a lazy parameter without values yet. Run its module once first."
                )

    _is_dynamic = staticmethod(is_value)
    _roots: tuple[str, ...] = ()

    def cache_info(self) -> CacheInfo:
        """How often a call found its program, in the fields of ``functools.lru_cache``.

        A miss is a combination of structure, shapes, dtypes and static values that had to be traced.
        Derivatives are compiled on first use, and are not counted.
        """
        return self._traces.info()

    def cache_clear(self) -> None:
        """Forget every program, and the counts."""
        self._traces.clear()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind to an instance, as Python functions in a class do."""
        return self if instance is None else types.MethodType(self, instance)

    def __deepcopy__(self, memo: Any) -> "TorchFunction":
        return self  # as Python copies functions

    def __reduce__(self) -> Any:
        name = getattr(self, "__qualname__", "")
        found: Any = sys.modules.get(getattr(self, "__module__", ""))
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is self:  # a decorated function, found by its name
            return name
        return type(self), (self._fn, tuple(self._static.argnums), tuple(self._static.argnames))

    def __repr__(self) -> str:
        return f"<as_torch_function of {self._origin.title}>"


def _trace_with_bools(traced: Callable[[], Trace], with_static_bools: Callable[[], Any]) -> Trace | None:
    """The program with its bools traced; None if the function needs static bools.

    It needs them if it branches on one, or passes one where JAX needs a constant (an ``axis``, a ``keepdims``).
    """
    try:
        return traced()
    except _TRACING_ERRORS as err:
        try:
            with_static_bools()
        except _TRACING_ERRORS:
            if isinstance(err, jax.errors.ConcretizationTypeError):
                raise  # the error that remains with static bools
            raise err from err.__cause__
        return None
