"""How ``torch.compile`` sees a wrapped function: one call without a graph break.

Dynamo cannot read JAX, so the call is put into the graph whole ("nonstrict") and run on fake tensors: there
it takes the same roads as in eager mode, and what stays in the graph is the operator of ``_op``. Loaded
when a call is first compiled, because it loads the compiler.
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
_REFUSED = "torchjax_bridge: refused"

# What a node may be given, in dicts, lists and tuples.
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


class _Nothing:
    """``None`` on its way through a graph, which has no constant for it."""


class _Named:
    """A namedtuple on its way through a graph, which does not find torch's own rule for one."""

    def __init__(self, kind: type, parts: list[Any]) -> None:
        self.kind, self.parts = kind, parts


class _Refused:
    """In the place of a result: the function that makes the call outside the graph."""

    def __init__(self, outside: Callable[..., Any]) -> None:
        self.outside = outside


# The graph rebuilds results by these rules: what comes out of it is None, the namedtuple, and a refusal.
torch_pytree.register_pytree_node(_Nothing, lambda _: ([], None), lambda _parts, _context: None)
torch_pytree.register_pytree_node(_Named, lambda n: (n.parts, n.kind), lambda parts, kind: kind(*parts))
torch_pytree.register_pytree_node(
    _Refused, lambda r: ([], r.outside), lambda _parts, outside: (_REFUSED, outside)
)


def _nonstrict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's decorator for "run it, do not read it"; the older public one where that is missing."""
    from torch import _dynamo

    older: Any = getattr(_dynamo, "nonstrict_trace", torch.compiler.allow_in_graph)
    decorate: Any = getattr(torch.compiler, "nonstrict_trace", older)
    return decorate(function)


def call_in_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the wrapped function ``name``. Dynamo reads this much, and takes the rest as one node.

    A call that cannot be a node is made outside the graph: a graph break, or with ``fullgraph=True`` torch's
    error with the reason.
    """
    if not (_fits(args) and _fits(kwargs)):
        return _call_with_others(name, args, kwargs)
    result = _call(name, _veil(args), _veil(kwargs))
    if isinstance(result, _Refused):  # no graph is made of this, and the node ran as the function it is
        return result.outside(name, args, kwargs)
    if type(result) is tuple and len(result) == 2 and isinstance(result[0], str):
        return result[1](name, args, kwargs)
    return result


@functools.lru_cache(maxsize=64)  # one for each reason, so that a graph finds the same one again
def _outside(reason: str) -> Callable[..., Any]:
    """A call that Dynamo neither reads nor puts into a graph, and why."""

    def call_outside(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return find(name).call(args, kwargs)

    decorated: Callable[..., Any] = torch.compiler.disable(call_outside, reason=reason)
    return decorated


_call_with_others = _outside(
    "an argument of a wrapped JAX function is or holds something that a graph cannot be given. In a compiled "
    "region pass tensors, numbers and strings, in dicts, lists and tuples; close over the rest, and pass "
    "jax.random.key_data(key) for a key"
)


def _fits(tree: Any, room: int = 32) -> bool:
    """Whether a node may be given this; nothing nested deeper, which may be endless."""
    if tree is None or isinstance(tree, _LEAVES):
        return True
    if type(tree) in (dict, collections.OrderedDict):
        tree = list(tree.values())
    if type(tree) not in (list, tuple) or not room:
        return False
    return all([_fits(part, room - 1) for part in tree])  # noqa: C419 - Dynamo reads no generator here


def _veil(tree: Any) -> Any:
    """The arguments with a word in the place of ``None``, which a node may not take."""
    if tree is None:
        return _NONE
    if type(tree) is collections.OrderedDict:
        return collections.OrderedDict([(key, _veil(value)) for key, value in tree.items()])
    if isinstance(tree, dict):
        return {key: _veil(value) for key, value in tree.items()}
    if type(tree) is list:
        return [_veil(part) for part in tree]
    if type(tree) is tuple:
        return tuple([_veil(part) for part in tree])
    return tree


@_nonstrict
def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The node; the graph rebuilds its result from marked parts."""
    args, kwargs = torch_pytree.tree_map(_unveil, (args, kwargs))
    with _Passed() as passed:
        return _mark(find(name).call(args, kwargs))
    return passed.refusal()


class _Passed(AbstractContextManager["_Passed"]):
    """Takes an error out of a node, for it to be raised outside the graph with the user's frames.

    Of whatever class: Dynamo would drop it, and complain of the node's result instead.
    """

    def __init__(self) -> None:
        self._reason = ""

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._reason = f"{type(err).__name__}: {err}"
        return isinstance(err, Exception)

    def refusal(self) -> _Refused:
        return _Refused(_outside(self._reason))


def _unveil(leaf: Any) -> Any:
    """``None`` again; and a number for a symbol, for which the graph is then guarded."""
    if isinstance(leaf, str):
        return None if leaf == _NONE else leaf
    if isinstance(leaf, torch.SymInt):
        return int(leaf)
    if isinstance(leaf, torch.SymFloat):
        return float(leaf)
    return bool(leaf) if isinstance(leaf, torch.SymBool) else leaf


def _mark(result: Any) -> Any:
    if result is None:
        return _Nothing()
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, dict) and type(result) in (dict, collections.OrderedDict):
        return type(result)((key, _mark(value)) for key, value in result.items())
    if isinstance(result, list | tuple):
        parts = [_mark(part) for part in result]
        return _Named(type(result), parts) if hasattr(result, "_fields") else type(result)(parts)
    raise TransformError(
        f"inside torch.compile a result may nest in dicts, lists, tuples and namedtuples; this one holds a "
        f"{type(result).__module__}.{type(result).__qualname__}. Return its fields in a dict."
    )
