"""How ``torch.compile`` sees a wrapped function: one call without a graph break.

Dynamo cannot read JAX, so the call becomes one node of the graph ("nonstrict"), which runs on fake tensors.
There it runs as in eager mode, and leaves the operator of ``_op`` in the graph. This file is loaded when a
call is first compiled, because it loads the compiler.
"""

import collections
import enum
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
import torch.utils._pytree as torch_pytree

from torchjax_bridge.errors import TransformError

from ._registry import find

__all__ = ["call_in_graph"]


_NONE = "torchjax_bridge: None"
_OUTSIDE = "torchjax_bridge: outside"

# The leaves that a node may take, in dicts, lists and tuples.
_LEAVES = (
    torch.Tensor,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    int,
    float,
    complex,
    str,
    enum.Enum,
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class _NoneMarker:
    """Stands for ``None`` in a graph, which has no constant for it."""


class _NamedTupleMarker:
    """Stands for a namedtuple in a graph, which does not find torch's own rule for one."""

    def __init__(self, kind: type, parts: list[Any]) -> None:
        self.kind, self.parts = kind, parts


class _OutsideMarker:
    """Stands for a result that a graph cannot make, and holds the function that makes the call outside of it."""

    def __init__(self, outside: Callable[..., Any]) -> None:
        self.outside = outside


# By these rules the graph turns the markers into None, the namedtuple, and a request to call outside.
torch_pytree.register_pytree_node(_NoneMarker, lambda _: ([], None), lambda _parts, _context: None)
torch_pytree.register_pytree_node(
    _NamedTupleMarker, lambda n: (n.parts, n.kind), lambda parts, kind: kind(*parts)
)
torch_pytree.register_pytree_node(
    _OutsideMarker, lambda r: ([], r.outside), lambda _parts, outside: (_OUTSIDE, outside)
)


def _nonstrict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's decorator for "run it, do not read it"; in older releases, the public one for that."""
    from torch import _dynamo

    older: Any = getattr(_dynamo, "nonstrict_trace", torch.compiler.allow_in_graph)
    decorate: Any = getattr(torch.compiler, "nonstrict_trace", older)
    return decorate(function)


def call_in_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the wrapped function ``name``. Dynamo reads this function, and `_call` becomes one node.

    A call that cannot be a node is made outside the graph. That is a graph break, or with ``fullgraph=True``
    torch's error, with the reason.
    """
    if not (_node_takes(args) and _node_takes(kwargs)):
        return _call_with_others(name, args, kwargs)
    result = _call(name, _encode_arguments(args), _encode_arguments(kwargs))
    if isinstance(result, _OutsideMarker):  # there is no graph here, and the node ran as a plain function
        return result.outside(name, args, kwargs)
    if type(result) is tuple and len(result) == 2 and isinstance(result[0], str):
        return result[1](name, args, kwargs)
    return result


@functools.lru_cache(maxsize=64)  # one for each reason, so that a graph finds the same function again
def _outside(reason: str) -> Callable[..., Any]:
    """A function that Dynamo neither reads nor puts into a graph, with the reason."""

    def call_outside(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return find(name).call(args, kwargs)

    decorated: Callable[..., Any] = torch.compiler.disable(call_outside, reason=reason)
    return decorated


_call_with_others = _outside(
    "an argument of a wrapped JAX function is or holds something that a graph cannot be given. In a compiled "
    "region pass tensors, numbers and strings, in dicts, lists and tuples; close over the rest, and pass "
    "jax.random.key_data(key) for a key"
)


def _node_takes(tree: Any, depth: int = 32) -> bool:
    """Whether a node may take this. ``depth`` limits the nesting, because a structure may contain itself."""
    if tree is None or isinstance(tree, _LEAVES):
        return True
    if type(tree) in (dict, collections.OrderedDict):
        tree = list(tree.values())
    if type(tree) not in (list, tuple) or not depth:
        return False
    return all([_node_takes(part, depth - 1) for part in tree])  # noqa: C419 - Dynamo reads no generator here


def _encode_arguments(tree: Any) -> Any:
    """The arguments with a string for ``None``, which a node may not take."""
    if tree is None:
        return _NONE
    if type(tree) is collections.OrderedDict:
        return collections.OrderedDict([(key, _encode_arguments(value)) for key, value in tree.items()])
    if isinstance(tree, dict):
        return {key: _encode_arguments(value) for key, value in tree.items()}
    if type(tree) is list:
        return [_encode_arguments(part) for part in tree]
    if type(tree) is tuple:
        return tuple([_encode_arguments(part) for part in tree])
    return tree


@_nonstrict
def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The node. The graph rebuilds its result from markers."""
    args, kwargs = torch_pytree.tree_map(_decode_leaf, (args, kwargs))
    with _CaughtError() as caught:
        return _encode_result(find(name).call(args, kwargs))
    return caught.marker()


class _CaughtError(AbstractContextManager["_CaughtError"]):
    """Catches an error inside a node. The call is then made outside the graph, and raises it there.

    All classes are caught, because Dynamo would drop the error and complain of the node's result instead.
    """

    def __init__(self) -> None:
        self._reason = ""

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._reason = f"{type(err).__name__}: {err}"
        return isinstance(err, Exception)

    def marker(self) -> _OutsideMarker:
        return _OutsideMarker(_outside(self._reason))


def _decode_leaf(leaf: Any) -> Any:
    """``None`` for its string, and a number for a symbol, on which torch then guards the graph."""
    if isinstance(leaf, str):
        return None if leaf == _NONE else leaf
    if isinstance(leaf, torch.SymInt):
        return int(leaf)
    if isinstance(leaf, torch.SymFloat):
        return float(leaf)
    return bool(leaf) if isinstance(leaf, torch.SymBool) else leaf


def _encode_result(result: Any) -> Any:
    if result is None:
        return _NoneMarker()
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, dict) and type(result) in (dict, collections.OrderedDict):
        return type(result)((key, _encode_result(value)) for key, value in result.items())
    if isinstance(result, list | tuple):
        parts = [_encode_result(part) for part in result]
        return _NamedTupleMarker(type(result), parts) if hasattr(result, "_fields") else type(result)(parts)
    raise TransformError(
        f"inside torch.compile a result may nest in dicts, lists, tuples and namedtuples; this one holds a "
        f"{type(result).__module__}.{type(result).__qualname__}. Return its fields in a dict."
    )
