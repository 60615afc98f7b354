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


class _Nothing:
    """``None`` on its way through a graph, which has no constant for it."""


torch_pytree.register_pytree_node(
    _Nothing,
    lambda _: ([], None),
    lambda _children, _context: None,
)


def _nonstrict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's decorator for "run it, do not read it"; the older public one where that is missing."""
    from torch import _dynamo

    older: Any = getattr(_dynamo, "nonstrict_trace", torch.compiler.allow_in_graph)
    decorate: Any = getattr(torch.compiler, "nonstrict_trace", older)
    return decorate(function)


@_nonstrict
def call_in_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the wrapped function ``name``; in its result ``None`` is marked, and unmarked by the graph."""
    args, kwargs = torch_pytree.tree_map(_specialize, (args, kwargs))
    return _mark_nothing(functions[name].call(args, kwargs))


def _specialize(leaf: Any) -> Any:
    """A number in the place of a symbol: the graph is then guarded to be for that number."""
    if isinstance(leaf, torch.SymInt):
        return int(leaf)
    if isinstance(leaf, torch.SymFloat):
        return float(leaf)
    return bool(leaf) if isinstance(leaf, torch.SymBool) else leaf


def _mark_nothing(result: Any) -> Any:
    if result is None:
        return _Nothing()
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, dict):
        return type(result)((key, _mark_nothing(value)) for key, value in result.items())
    if isinstance(result, list | tuple):
        parts = [_mark_nothing(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    raise TransformError(
        f"inside torch.compile a result may nest in dicts, lists, tuples and namedtuples; this one holds a "
        f"{type(result).__module__}.{type(result).__qualname__}. Return its fields in a dict."
    )
