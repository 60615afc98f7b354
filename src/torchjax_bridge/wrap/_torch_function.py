"""`as_torch_function`: a JAX function as a torch function, with every transform of torch.

Owns the door: what a call may hold, what it is cached under, and what goes into an error. How a program is
differentiated is in ``_program``, how tensors cross and are saved in ``_torch_autograd``, and how
``torch.compile`` sees a call in ``_torch_compile``.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import ArgumentError, DtypeError, OutputError
from torchjax_bridge.exchange import jax_dtype, tensor_to_jax

from ._cache import Cache, CacheInfo
from ._call import Rest, StaticArguments, split_call
from ._program import Program, has_torch_dtype
from ._settings import settings, x64
from ._torch_autograd import call

__all__ = ["TorchFunction", "as_torch_function"]

# How many structures, shapes, dtypes and static values one function keeps compiled.
MAXSIZE = 256

_Tensor = torch.Tensor
_NUMBERS = (bool, int, float, complex)
_DYNAMIC = (_Tensor, *_NUMBERS, np.ndarray, np.generic, jax.Array)


def as_torch_function(
    fn: Callable[..., Any],
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> "TorchFunction":
    """A function that calls the JAX function ``fn`` on tensors."""
    return TorchFunction(fn, static_argnums, static_argnames)


class TorchFunction:
    """What `as_torch_function` returns: call it on tensors."""

    def __init__(
        self,
        fn: Callable[..., Any],
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
    ) -> None:
        if not callable(fn):
            raise ArgumentError(f"as_torch_function wraps a JAX function, and {fn!r} is not callable.")
        self._fn = fn
        self._static = StaticArguments(fn, static_argnums, static_argnames)
        self._traces = Cache(MAXSIZE)
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the JAX function."""
        leaves, trace = self._prepare(args, kwargs)
        return jax.tree_util.tree_unflatten(trace.structure, call(trace.program, leaves))

    def cache_info(self) -> CacheInfo:
        """How often a call found its program compiled, as ``functools.lru_cache`` reports it."""
        return self._traces.info()

    def cache_clear(self) -> None:
        """Forget every compiled program."""
        self._traces.clear()

    def __repr__(self) -> str:
        return f"as_torch_function({self._fn!r})"

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "tuple[list[Any], _Trace]":
        leaves, rest = split_call(args, kwargs, _is_dynamic, self._static)
        kinds = tuple([_kind(leaf) for leaf in leaves])
        trace = self._traces.get((rest, kinds, settings()), lambda: _trace(self._fn, leaves, rest))
        return leaves, trace


@dataclass(frozen=True, slots=True)
class _Trace:
    """The program of one kind of call, and how its results nest."""

    program: Program
    structure: Any


def _is_dynamic(leaf: Any) -> bool:
    return isinstance(leaf, _DYNAMIC)


def _kind(leaf: Any) -> Any:
    """What a program depends on of a leaf: all but its values."""
    if isinstance(leaf, _Tensor):
        return leaf.dtype, leaf.shape
    if isinstance(leaf, _NUMBERS):
        return type(leaf)
    return leaf.aval


def _trace(fn: Callable[..., Any], leaves: Sequence[Any], rest: Rest) -> _Trace:
    names = rest.names()
    inputs = [_abstract(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
    structures: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        args, kwargs = rest.join(arrays)
        results, structure = jax.tree_util.tree_flatten(fn(*args, **kwargs))
        structures.append(structure)
        return results

    program = Program.trace(flat, inputs, names)
    return _Trace(program, structures[-1])


def _abstract(leaf: Any, name: str) -> Any:
    if isinstance(leaf, _Tensor):
        wide = jax_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(tuple(leaf.shape), jax.dtypes.canonicalize_dtype(wide))
    return jax.typeof(leaf)
