"""How ``torch.compile`` sees a wrapped function: one call without a graph break.

Dynamo cannot read JAX, so the call is put into the graph whole ("nonstrict") and run on fake tensors: there
it takes the same roads as in eager mode, and what stays in the graph is the operator of ``_torch_op``. Loaded
when a call is first compiled, because it loads the compiler.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree

from torchjax_bridge.errors import TransformError

from ._torch_function import functions

__all__ = ["call_in_graph"]


_NONE = "torchjax_bridge: None"


class _Nothing:
    """``None`` on its way through a graph, which has no constant for it."""


class _Named:
    """A namedtuple on its way through a graph, which does not find torch's own rule for one."""

    def __init__(self, kind: type, parts: list[Any]) -> None:
        self.kind, self.parts = kind, parts


# The graph rebuilds results by these rules: what comes out of it is None and the namedtuple.
torch_pytree.register_pytree_node(_Nothing, lambda _: ([], None), lambda _parts, _context: None)
torch_pytree.register_pytree_node(_Named, lambda n: (n.parts, n.kind), lambda parts, kind: kind(*parts))


def _nonstrict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's decorator for "run it, do not read it"; the older public one where that is missing."""
    from torch import _dynamo

    older: Any = getattr(_dynamo, "nonstrict_trace", torch.compiler.allow_in_graph)
    decorate: Any = getattr(torch.compiler, "nonstrict_trace", older)
    return decorate(function)


def call_in_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the wrapped function ``name``. Dynamo reads this much, and takes the rest as one node."""
    return _call(name, _veil(args), _veil(kwargs))


def _veil(tree: Any) -> Any:
    """The arguments with a word in the place of ``None``, which a node may not take."""
    if tree is None:
        return _NONE
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
    return _mark(functions[name].call(args, kwargs))


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
    if isinstance(result, dict):
        return type(result)((key, _mark(value)) for key, value in result.items())
    if isinstance(result, list | tuple):
        parts = [_mark(part) for part in result]
        return _Named(type(result), parts) if hasattr(result, "_fields") else type(result)(parts)
    raise TransformError(
        f"inside torch.compile a result may nest in dicts, lists, tuples and namedtuples; this one holds a "
        f"{type(result).__module__}.{type(result).__qualname__}. Return its fields in a dict."
    )
