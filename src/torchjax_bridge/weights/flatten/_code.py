"""Whether the code of a module names what flattens a map, such as ``flatten``. Reads nothing else of the code."""

from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

__all__ = ["names_a_flatten"]

_FLATTENS = frozenset(
    ("flatten", "Flatten", "view", "reshape", "ravel", "rearrange", "view_as", "reshape_as", "as_strided")
)


def names_a_flatten(module: nn.Module | None) -> bool:
    """Whether a method of the module, or a function that one calls by name, names a function that flattens."""
    if module is None:
        return False
    if "forward" in vars(module) or hasattr(module, "_c"):
        return True  # whatever was put in place of its code
    if any(isinstance(child, nn.Flatten) for child in module.children()):
        return True
    todo = [value for kind in type(module).__mro__ for value in vars(kind).values()]
    seen = set[int]()
    while todo:
        function = todo.pop()
        if id(function) in seen or str(getattr(function, "__module__", "")).startswith("torch."):
            continue
        seen.add(id(function))
        todo += [getattr(function, held, None) for held in ("__func__", "fget", "__wrapped__")]
        if isinstance(function, FunctionType):
            names = set(_names_in(function.__code__))
            if names & _FLATTENS:
                return True
            todo += map(function.__globals__.get, names)
    return False


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
