"""The table of translations: functions with the signatures of torch's, by torch's public names.

A call is bound to that signature first. An argument that a translation does not name is refused, so none is
ignored.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torchjax_bridge.recording import Node

from .._lowering import Lowering
from .._placed import Placed, RefusedError, Several, torch_order

__all__ = ["operation", "table_name", "translate_function"]

Translation = Callable[..., Placed | Several | list[Placed]]
Function = TypeVar("Function", bound=Translation)

_TABLE: dict[str, tuple[Translation, inspect.Signature]] = {}
_PREFIXES = (
    "torch.Tensor.",
    "torch.nn.functional.",
    "torch._C._nn.",
    "torch._C.TensorBase.",
    "torch._C.",
    "torch.",
)
# torch takes NumPy's names for some arguments.
_KEYWORDS = {"self": "input", "axis": "dim", "axes": "dim", "keepdims": "keepdim"}


def operation(*names: str) -> Callable[[Function], Function]:
    """Register a translation.

    Args:
        names: Names of torch functions without ``torch.``, ``torch.Tensor.`` or ``torch.nn.functional.``, and
            without the underscores of magic and in-place methods.
    """

    def register(translation: Function) -> Function:
        signature = inspect.signature(translation)
        for name in names:
            _TABLE[name] = translation, signature
        return translation

    return register


def translate_function(lowering: Lowering, node: Node) -> Placed | Several | list[Placed]:
    """What a call of a torch function becomes.

    Raises:
        RefusedError: It has no translation, or not with these arguments.
    """
    own = lowering.model.functions.get(node.function)
    if own is not None:
        texts = [lowering.in_torch_order(argument) for argument in node.args]
        keywords = {name: lowering.in_torch_order(argument) for name, argument in node.kwargs.items()}
        return Placed(f"({own.format(*texts, **keywords)})", torch_order(len(node.result.shape)))
    found = _TABLE.get(table_name(node.function))
    if found is None:
        raise RefusedError(f"no translation of {node.function}")
    translation, signature = found
    kwargs = {_KEYWORDS.get(name, name): value for name, value in node.kwargs.items()}
    try:
        bound = signature.bind(lowering, node, *node.args, **kwargs)
    except TypeError as err:
        raise RefusedError(
            f"{node.function} is called with arguments that have no translation: {err}"
        ) from err
    return translation(*bound.args, **bound.kwargs)


def table_name(function: str) -> str:
    """The name in the table of a public name."""
    name = function.removesuffix(".__get__")
    name = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
    return name.strip("_") if name.rpartition(".")[2].strip("_") else name


def some(value: Any) -> bool:
    """Whether an optional argument was given and is not zero or false."""
    return value is not None and value is not False and value != 0
