"""Where a module stands in the class of another: the expression of its attribute."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from ._placed import RefusedError
from ._reserved import attribute_name

__all__ = ["attribute_text", "common_path", "is_container", "is_inside", "tied_bias"]


def is_container(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module is a container of torch's own: a subclass with its own forward is none."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def is_inside(base: str, path: str) -> bool:
    """Whether a path is that of a module, or of something below it."""
    return not base or path == base or path.startswith(base + ".")


def common_path(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of these, or is one of them."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len({*names}) == 1, levels))


def attribute_text(model: Any, base: str, path: str) -> str:
    """The expression of the module at ``path`` in the class of the module at ``base``."""
    if not is_inside(base, path):
        path = model.handed.alias(base, path)
    text, module, walked = "self", model.modules[base], base
    for part in path[len(base) :].strip(".").split(".") if path != base else ():
        if is_container(module, nn.Sequential):
            place = list(module._modules).index(part)
            text += f".layers[{place}]" if walked in model.framed else f"[{place}]"
        elif isinstance(module, nn.ModuleList):
            text += f"[{part}]"
        elif is_container(module, nn.ModuleDict):
            text += f"[{part!r}]"
        else:
            text += f".{attribute_name(part)}"
        walked = f"{walked}.{part}" if walked else part
        child = module._modules[part]
        if child is None:
            raise RefusedError(f"'{path}' is None")
        module = child
    return text


def tied_bias(name: str) -> str:
    """The attribute for the bias of a layer whose weight is another layer's, so that the layer itself is none."""
    return f"{attribute_name(name)}_bias"
