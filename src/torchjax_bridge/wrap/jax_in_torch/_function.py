"""`as_torch_function`: a JAX function as a torch function, with every transform of torch.

Owns the door: what a call may hold, and what its program is cached under. How the user's Python is traced is in
``_trace``, what a program computes in ``_program``, how tensors cross in ``_run``, how derivatives are
taken in ``_autograd``, and how ``torch.compile`` sees a call in ``_compile`` and ``_op``.
"""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.nn.parameter import is_lazy

from torchjax_bridge.errors import ArgumentError, DtypeError, TransformError
from torchjax_bridge.exchange import tensor_to_jax, torch_dtype

from .._cache import Cache, CacheInfo
from .._call import Rest, StaticArguments, split_call
from .._settings import settings
from ._autograd import call
from ._program import Origin
from ._registry import register
from ._state import jit_tracing, modes_active, unseen
from ._trace import ARRAYS, Trace, in_numbers, refuse_nested, trace

__all__ = ["TorchFunction", "as_torch_function", "is_value"]

# How many structures, shapes, dtypes and static values one function keeps compiled.
CACHE_SIZE = 256

_is_compiling = torch.compiler.is_compiling
_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter
_NUMBERS = (bool, int, float, complex)
_VALUES = (_Tensor, *ARRAYS)
# What code raises that is given a tracer in the place of a bool, or a bool in the place of an array.
_TRACING_ERRORS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)


def as_torch_function(
    fn: Callable[..., Any],
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> "TorchFunction":
    """A JAX function as a torch function: it takes and gives tensors, and keeps every transform.

    Autograd to any order, ``torch.func``, forward-mode AD, ``torch.compile(fullgraph=True)``, checkpointing
    and saved-tensor hooks see it as they see an operator of torch's own.

    Args:
        fn: Any function that ``jax.jit`` accepts, jitted or not. Its Python runs once for each combination of
            structure, shapes, dtypes and static values; what it closes over is fixed by then, as under
            ``jax.jit``.
        static_argnums: Positions of arguments that are Python values to ``fn``, not traced; hashable. As
            for ``jax.jit``, names follow from positions and positions from names.
        static_argnames: Names of such arguments.

    Returns:
        A `TorchFunction`. Its arguments are JAX pytrees (dicts, tuples, namedtuples, registered
        dataclasses, ``None``) by position or keyword, and its leaves

        * ``torch.Tensor``: the values that are differentiated, where they require grad;
        * ``jax.Array`` (PRNG keys among them) and ``numpy.ndarray``: constants with new values each call;
        * ``bool``, ``int``, ``float``, ``complex`` and numpy scalars: traced, weakly typed, one program for
          all values. Where ``fn`` branches on a bool (or cannot be traced with it for another reason), all bools
          of the call are static, one program for each value, also those inside a module or dict. Where it
          branches on a number, name the argument in ``static_argnames``;
        * anything else that is hashable (strings, functions, dtypes, enums that are no numbers): static.

        It returns what ``fn`` returns, with a tensor for each array, or a ``jax.Array`` for a PRNG key.
        Integer and bool results do not require grad.

    Raises:
        ArgumentError: (when called) A leaf that is neither a value nor hashable, or a JAX tracer.
        ExchangeError: (when called) A tensor that JAX cannot hold, named by its place (``args[0]['x']``);
            with x64 off, ``float64`` raises and ``int64`` becomes ``int32`` where every value fits.
        OutputError: (when called) ``fn`` returns a dtype that torch has not.

    Memory:
        Tensors are lent to JAX without a copy where `to_jax` can, and may be written to as soon as the call
        returns. Results are memory of their own, to write to freely. With gradients to come, the argument
        tensors and JAX's residuals are kept by ``ctx.save_for_backward``; a residual that is an argument or
        a result is kept once, and writing to either before the backward pass is torch's usual error. Under
        ``torch.no_grad`` nothing is kept.

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


def is_value(leaf: Any) -> bool:
    """Whether a leaf is a value that JAX traces; any other is static."""
    return isinstance(leaf, _VALUES)


class TorchFunction:
    """What `as_torch_function` returns: call it on tensors.

    May be called from several threads at once. Everything it compiled dies with it.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
    ) -> None:
        if not callable(fn):
            raise ArgumentError(
                f"as_torch_function wraps a function of JAX arrays; a {type(fn).__qualname__} is not "
                "callable."
            )
        if isinstance(fn, torch.nn.Module | TorchFunction):
            raise ArgumentError(
                f"as_torch_function wraps a function of JAX arrays; a {type(fn).__qualname__} works on "
                "tensors already."
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

    @unseen
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`__call__`, as the graph of ``torch.compile`` runs it."""
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
            # The plainest call, tensors by position, is told from others before anything is taken apart.
            key: list[Any] = []
            for leaf in args:
                if type(leaf) is not _Tensor and type(leaf) is not _Parameter:
                    break
                key += (leaf.dtype, leaf.shape)
            else:
                key.append(settings())
                return list(args), self._traces.get(tuple(key), lambda: self._trace(args))
        return self._found(args, kwargs, self._is_dynamic, symbolic)

    def _found(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], is_dynamic: Callable[[Any], bool], symbolic: bool
    ) -> "tuple[list[Any], Trace]":
        leaves, rest = split_call(args, kwargs, is_dynamic, self._static, self._roots)
        kinds: list[Any] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, _Tensor):
                kinds.append((leaf.dtype, in_numbers(leaf.shape) if symbolic else leaf.shape))
            else:
                leaves[i], kind = _constant(leaf, rest, i)
                kinds.append(kind)
        key = (rest.structure, rest.static, *kinds, settings())
        if bool not in kinds:
            return leaves, self._traces.get(key, lambda: self._trace(leaves, rest))

        def constant() -> "tuple[list[Any], Trace]":
            return self._found(args, kwargs, _is_value_but_no_bool, symbolic)

        found = self._traces.get(key, lambda: _unless_it_fails(lambda: self._trace(leaves, rest), constant))
        return constant() if found is None else (leaves, found)

    def _trace(self, leaves: Sequence[Any], rest: Rest | None = None) -> "Trace":
        if rest is None:
            rest = split_call(tuple(leaves), {}, self._is_dynamic)[1]
        return trace(self._fn, leaves, rest, rest.names(), self._origin)

    def _refuse_shapeless(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise for the first tensor whose shape is not known."""
        leaves, rest = split_call(args, kwargs, lambda leaf: isinstance(leaf, _Tensor), roots=self._roots)
        for leaf, name in zip(leaves, rest.names(), strict=True):
            refuse_nested(leaf, name)
            if is_lazy(leaf):
                raise ArgumentError(
                    f"{name} is a lazy parameter without values yet. Run its module once first."
                )

    _is_dynamic = staticmethod(is_value)
    _roots: tuple[str, ...] = ()

    def cache_info(self) -> CacheInfo:
        """How often a call found its program, in the words of ``functools.lru_cache``.

        A miss is a combination of structure, shapes, dtypes and static values that had to be traced.
        Derivatives are compiled when they are first asked for, and are not counted.
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


def _is_value_but_no_bool(leaf: Any) -> bool:
    return is_value(leaf) and not isinstance(leaf, bool | np.bool_)


def _unless_it_fails(traced: Callable[[], Trace], constant: Callable[[], Any]) -> Trace | None:
    """The program with its bools traced; None where the function takes them as constants alone.

    It branches on one, or passes one for what must be known (an ``axis``, a ``keepdims``).
    """
    try:
        return traced()
    except _TRACING_ERRORS as err:
        try:
            constant()
        except _TRACING_ERRORS:
            if isinstance(err, jax.errors.ConcretizationTypeError):
                raise  # what is left once the bools are known
            raise err from err.__cause__
        return None


def _constant(leaf: Any, rest: Rest, position: int) -> tuple[Any, Any]:
    """A leaf that is no tensor, as JAX takes it, and what a program depends on of it."""
    if isinstance(leaf, np.generic):
        number = leaf.item()
        if not isinstance(number, _NUMBERS):
            raise ArgumentError(
                f"{rest.names()[position]} is a {type(leaf).__module__}.{type(leaf).__qualname__}, for which JAX "
                "has no dtype. Pass a Python value: str(...) of a text, float(...) of a number."
            )
        leaf = number
    elif isinstance(leaf, np.ndarray):
        leaf = _from_numpy(leaf, rest, position)
    if isinstance(leaf, _NUMBERS):
        return leaf, type(leaf)
    if isinstance(leaf, jax.core.Tracer):
        raise ArgumentError(
            f"{rest.names()[position]} is a JAX tracer ({leaf.aval}): a torch function is called inside "
            "jax.jit, grad or vmap. Call the JAX function itself there, or wrap the torch code with "
            "as_jax_function."
        )
    return leaf, jax.typeof(leaf)


def _from_numpy(array: np.ndarray, rest: Rest, position: int) -> jax.Array:
    """By the rules for tensors, so that nothing is narrowed in silence; a copy, for the backward pass to read."""
    name = rest.names()[position]
    try:
        torch_dtype(array.dtype.newbyteorder("="))
    except DtypeError as err:
        raise ArgumentError(
            f"{name} is a numpy array of dtype {array.dtype}, which torch cannot hold. Pass jnp.asarray(...) "
            "of it, or a tensor."
        ) from err
    return tensor_to_jax(array.copy(), path=(name,))
