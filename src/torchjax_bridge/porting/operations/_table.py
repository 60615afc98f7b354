"""The table of translations: functions with the signatures of torch's, by torch's public names.

A call is bound to that signature first. An argument that a translation does not name is refused, so none is
ignored.
"""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import jax.scipy.special

from torchjax_bridge.recording import Node, Value, tensors_of

from .._lowering import Lowering
from .._placed import Placed, RefusedError, Several, torch_order
from ._agreement import agreed

__all__ = ["is_elementwise", "operation", "refused", "table_name", "translate_function"]

Translation = Callable[..., Placed | Several | list[Placed]]
Function = TypeVar("Function", bound=Translation)

TABLE: dict[str, tuple[Translation, inspect.Signature]] = {}
_PREFIXES = {
    "torch.Tensor.": "Tensor.",
    "torch.nn.functional.": "F.",
    "torch._C._nn.": "F.",
    "torch._C.TensorBase.": "Tensor.",
    "torch.functional.": "torch.",
    "torch._C.": "torch.",
}
# torch has several names for one argument.
_ALIASES = {
    "self": ("input",),
    "tensor": ("input", "other"),
    "axis": ("dim",),
    "axes": ("dim", "dims"),
    "dims": ("dim",),
    "keepdims": ("keepdim",),
    "exponent": ("other",),
    "axis0": ("dim0",),
    "axis1": ("dim1",),
    "mat": ("first",),
    "vec": ("other", "second"),
    **dict.fromkeys(("mat1", "vec1", "batch1"), ("first",)),
    **dict.fromkeys(("mat2", "vec2"), ("other", "second")),
    "batch2": ("second",),
    "src": ("other",),
    "values": ("other",),
    "A": ("input",),
    "x": ("input",),
    "y": ("other",),
}


def operation(*names: str) -> Callable[[Function], Function]:
    """Register a translation.

    Args:
        names: Names of torch functions without the underscores of magic and in-place methods. A bare name is
            that of the function, the method and the function in ``torch.nn.functional``; where these differ, it
            is written ``"torch.embedding"``, ``"Tensor.unfold"`` or ``"F.unfold"``.
    """

    def register(translation: Function) -> Function:
        signature = inspect.signature(translation)
        for name in names:
            TABLE[name] = translation, signature
        return translation

    return register


def refused(reason: str, *names: str) -> None:
    """Register functions that no translation can give, with the reason and what to do instead."""

    def refuse(at: Lowering, node: Node, *args: Any, **kwargs: Any) -> NoReturn:
        raise RefusedError(f"{node.function} {reason}")

    operation(*names)(refuse)


def translate_function(lowering: Lowering, node: Node) -> Placed | Several | list[Placed]:
    """What a call of a torch function becomes.

    Raises:
        RefusedError: It has no translation, or not with these arguments.
    """
    own = lowering.model.functions.get(node.function)
    if own is not None:
        return _of_the_callers(lowering, node, own)
    found = find(node.function)
    if found is None:
        raise RefusedError(f"no translation of {node.function}{_suggestion(node)}")
    translation, signature = found
    kwargs = {_parameter(signature, name): value for name, value in node.kwargs.items()}
    if kwargs.get("out") is None:
        kwargs.pop("out", None)
    try:
        bound = signature.bind(lowering, node, *node.args, **kwargs)
    except TypeError as err:
        raise RefusedError(
            f"{node.function} is called with arguments that have no translation ({err}); leave them out, or "
            "write it with other functions"
        ) from err
    return agreed(lowering, node, translation(*bound.args, **bound.kwargs))


def _of_the_callers(
    lowering: Lowering, node: Node, own: Callable[..., str]
) -> Placed | Several | list[Placed]:
    """What a call becomes that the caller translates."""
    texts = [lowering.in_torch_order(argument) for argument in node.args]
    keywords = {name: lowering.in_torch_order(argument) for name, argument in node.kwargs.items()}
    orders = tuple(torch_order(len(value.shape)) for value in tensors_of(node.result))
    try:
        made = f"({own(*texts, **keywords)})"
        compile(made, "<ops>", "eval")
        placed = Placed(made, orders[0]) if isinstance(node.result, Value) else Several(made, orders)
        return agreed(lowering, node, placed)
    except (LookupError, TypeError) as err:
        given = ", ".join([*(f"{{{place}}}" for place in range(len(texts))), *map("{{{}}}".format, keywords)])
        raise RefusedError(
            f"the translation in ops= of {node.function} fails ({err}); the arguments here are {given}"
        ) from err
    except (SyntaxError, NameError, AttributeError) as err:
        raise RefusedError(
            f"the translation in ops= of {node.function} does not run ({err}); it may use jax, jnp, np, nnx, math"
        ) from err


def find(function: str) -> tuple[Translation, inspect.Signature] | None:
    """The translation of a public name, and its signature."""
    name = _qualified(function)
    return TABLE.get(name) or TABLE.get(name.partition(".")[2])


def _suggestion(node: Node) -> str:
    """What to type for a function of torch's: the function of that name in JAX, where there is one."""
    if not node.function.startswith("torch.") or node.function.endswith(".__get__"):
        return ""
    name = table_name(node.function)
    same = next((text for text, holder in _JAX.items() if _holds(holder, name)), None)
    given = ", ".join(
        [*(f"{{{place}}}" for place in range(len(node.args))), *(_keyword(key) for key in node.kwargs)]
    )
    call = f'"{same}.{name}({given})"' if same else '"...{0}..."'
    return f"; pass ops={{{node.function}: {call}}}" + ("" if same else ", with JAX code of the same meaning")


def _holds(holder: Any, name: str) -> bool:
    for part in name.split("."):
        holder = getattr(holder, part, None)
    return callable(holder)


def _keyword(name: str) -> str:
    return f"{'axis' if name == 'dim' else name}={{{name}}}"


_JAX = {"jnp": jnp, "jax.nn": jax.nn, "jax.scipy.special": jax.scipy.special, "jax.lax": jax.lax}


def table_name(function: str) -> str:
    """A public name as the table has it, without the module: ``"iadd"`` for ``"torch.Tensor.__iadd__"``."""
    name = _qualified(function)
    space, _, bare = name.partition(".")
    return bare if space in ("torch", "Tensor", "F") else name


def _qualified(function: str) -> str:
    """A public name with its module in short: ``"Tensor.iadd"``."""
    name = function.removesuffix(".__get__")
    for prefix, short in _PREFIXES.items():
        if name.startswith(prefix):
            name = short + name.removeprefix(prefix)
            break
    space, dot, last = name.rpartition(".")
    if last.startswith("__") and last.endswith("__"):
        last = last[2:-2]
    elif not last.startswith("_"):
        last = last.rstrip("_")
    return f"{space}{dot}{last}"


def is_elementwise(name: str) -> bool:
    """Whether the function of a bare name works on each element by itself."""
    full = (name, f"torch.{name}", f"Tensor.{name}", f"F.{name}")
    translation = next((TABLE[one][0] for one in full if one in TABLE), None)
    return translation is not None and translation.__module__.endswith(("._elementwise", "._unary"))


def last_name(node: Node) -> str:
    """The name of the function that a call is of, without its module."""
    return _qualified(node.function).rpartition(".")[2]


def _parameter(signature: inspect.Signature, name: str) -> str:
    """The parameter of a translation that a keyword of torch is."""
    if name in signature.parameters:
        return name
    return next((other for other in _ALIASES.get(name, ()) if other in signature.parameters), name)
