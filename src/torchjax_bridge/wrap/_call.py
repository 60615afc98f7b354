"""A call is split into its dynamic leaves and a hashable `CallStructure`, and put back together.

The *dynamic* leaves are the values that cross: tensors, arrays, numbers. The *structure* is all else: how the
arguments nest, which are given by keyword, and the static values. Two calls of equal structure differ only in
their leaves, so a compiled program is cached under the structure. Owns the names of arguments in error
messages (``args[0]['x']``). Does not know which leaves may cross; the caller passes a test.
"""

import dataclasses
import enum
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch
import torch.fx

from torchjax_bridge.errors import ArgumentError, UnsupportedLeafError
from torchjax_bridge.exchange import flatten

__all__ = ["CallStructure", "StaticArguments", "split_call", "type_key"]


# Static values of these types are not searched for tensors, because their attributes are shared with other code.
_OPAQUE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, enum.Enum)


@dataclass(frozen=True, slots=True)
class CallStructure:
    """A call without its dynamic leaves: hashable, and equal for calls that differ in nothing else."""

    treedef: Any
    """The pytree structure of ``(args, kwargs)``. Static values are leaves of it, too."""
    static: tuple[tuple[int, Any, Any], ...] = ()
    """Of each static leaf, its position among all leaves, its `type_key` and its value."""
    roots: tuple[str, ...] = ()
    """Names of the positional arguments, if not ``args[0]`` and so on."""

    def unflatten(self, leaves: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with ``leaves`` in the places of the dynamic leaves."""
        merged = list(leaves)
        for position, _, value in self.static:
            merged.insert(position, value)
        args, kwargs = jax.tree_util.tree_unflatten(self.treedef, merged)
        return args, kwargs

    def names(self) -> list[str]:
        """The name of each dynamic leaf: ``args[0]['x']``, or ``kwargs['scale']``."""
        static = {position for position, _, _ in self.static}
        return [name for i, name in enumerate(_names(self.treedef, self.roots)) if i not in static]


class StaticArguments:
    """Which arguments of a function are static, as for ``jax.jit``.

    Args:
        fn: The function. Its signature, if it has one, relates names to positions.
        argnums: Positions of static arguments; negative ones count from the end.
        argnames: Names of static arguments.

    Raises:
        ArgumentError: A position or a name that the function does not have.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        argnums: int | Sequence[int] = (),
        argnames: str | Sequence[str] = (),
    ) -> None:
        wanted_nums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        wanted_names = (argnames,) if isinstance(argnames, str) else tuple(argnames)
        nums, names = set(wanted_nums), set(wanted_names)
        parameters = _parameters(fn) if nums or names else None
        if parameters is not None:
            kinds = inspect.Parameter
            named = kinds.POSITIONAL_OR_KEYWORD
            positional = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, named)]
            keyword = {p.name for p in parameters if p.kind in (kinds.KEYWORD_ONLY, named)}
            variadic = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
            any_keyword = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
            nums = {_position(fn, n, len(positional), variadic) for n in wanted_nums}
            for name in wanted_names:
                if name not in keyword and not any_keyword:
                    raise ArgumentError(
                        f"{_title(fn)} has no argument '{name}' to be static; it takes "
                        f"{', '.join(p.name for p in parameters) or 'none'}."
                    )
            names |= {positional[n] for n in nums if n < len(positional) and positional[n] in keyword}
            nums |= {positional.index(name) for name in wanted_names if name in positional}
        elif any(n < 0 for n in nums):
            raise ArgumentError(
                f"{_title(fn)} has no signature, so a negative static_argnums means nothing. Count from 0."
            )
        self.argnums = frozenset(nums)
        self.argnames = frozenset(names)

    def __bool__(self) -> bool:
        return bool(self.argnums or self.argnames)

    def seal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call, with every static argument as one leaf."""
        return (
            tuple(_Sealed(v) if i in self.argnums else v for i, v in enumerate(args)),
            {k: _Sealed(v) if k in self.argnames else v for k, v in kwargs.items()},
        )


def split_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_dynamic: Callable[[Any], bool],
    static: StaticArguments | None = None,
    roots: tuple[str, ...] = (),
) -> tuple[list[Any], CallStructure]:
    """Split a call into its dynamic leaves and its structure.

    Args:
        args: Positional arguments, each a JAX pytree.
        kwargs: Keyword arguments, each a JAX pytree.
        is_dynamic: Whether a leaf is a value that crosses. Any other leaf is static.
        static: The arguments that are static as a whole, whatever they hold.
        roots: Names of the positional arguments, if not ``args[0]`` and so on.

    Returns:
        The dynamic leaves in order, and the structure; ``structure.unflatten(leaves)`` is the call again.

    Raises:
        ArgumentError: A static value is not hashable, or an argument is no pytree (it contains itself, or has
            dict keys that do not sort).

    >>> leaves, structure = split_call((1.0, "sum"), {"scale": 2.0}, lambda leaf: isinstance(leaf, float))
    >>> leaves, structure.names()
    ([1.0, 2.0], ['args[0]', "kwargs['scale']"])
    >>> structure.unflatten([3.0, 4.0])
    ((3.0, 'sum'), {'scale': 4.0})
    """
    if static:
        args, kwargs = static.seal(args, kwargs)
    try:
        leaves, treedef = flatten((args, kwargs))
    except UnsupportedLeafError:
        _refuse_argument(args, kwargs, roots)
        raise
    if not static and all(map(is_dynamic, leaves)):
        return leaves, CallStructure(treedef, (), roots)
    dynamic: list[Any] = []
    constants: list[tuple[int, type, Any]] = []
    for position, leaf in enumerate(leaves):
        if type(leaf) is not _Sealed and is_dynamic(leaf):
            dynamic.append(leaf)
            continue
        value = leaf.value if type(leaf) is _Sealed else leaf
        if _holds_tensor(value):
            raise ArgumentError(_holds_tensor_message(_names(treedef, roots)[position], value))
        try:
            hash(value)
        except TypeError as err:
            raise ArgumentError(_unhashable_message(_names(treedef, roots)[position], value)) from err
        constants.append((position, type_key(value), value))
    return dynamic, CallStructure(treedef, tuple(constants), roots)


def _refuse_argument(args: tuple[Any, ...], kwargs: dict[str, Any], roots: tuple[str, ...]) -> None:
    """Raise for the first argument that is no pytree."""
    named = [
        *((roots[i] if roots else f"args[{i}]", value) for i, value in enumerate(args)),
        *((f"kwargs[{k!r}]", v) for k, v in kwargs.items()),
    ]
    for name, value in named:
        try:
            flatten(value)
        except UnsupportedLeafError as err:
            raise ArgumentError(f"{name} is no pytree: {err}") from err


def type_key(value: Any) -> Any:
    """A key for the type and the signs of zeros: it tells ``1`` from ``True`` and ``0.0`` from ``-0.0``."""
    if isinstance(value, tuple):
        return type(value), tuple(map(type_key, value))
    if type(value) in (float, complex) and not (value.real and value.imag):
        return type(value), repr(value)
    return type(value)


def _holds_tensor(value: Any, depth: int = 4) -> bool:
    """Whether a static value is or holds a tensor, whose values would be constants of the program.

    Looks into tuples, lists and the attributes of objects, ``depth`` levels deep.
    """
    if isinstance(value, torch.Tensor | torch.nn.Module | torch.fx.Proxy):
        return True
    if depth == 0 or isinstance(value, _OPAQUE):
        return False
    if isinstance(value, functools.partial):
        value = (*value.args, *value.keywords.values())
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif not isinstance(value, tuple | list):
        value = list(getattr(value, "__dict__", {}).values())
    return any(_holds_tensor(part, depth - 1) for part in value)


class _Sealed:
    """A static argument as one leaf, even if it is a pytree."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _names(treedef: Any, roots: tuple[str, ...]) -> list[str]:
    """The name of every leaf of ``(args, kwargs)``."""
    numbered = jax.tree_util.tree_unflatten(treedef, range(treedef.num_leaves))
    names = []
    for path, _ in jax.tree_util.tree_flatten_with_path(numbered)[0]:
        if path[0].idx:
            names.append("kwargs" + jax.tree_util.keystr(path[1:]))
        elif roots:
            names.append(roots[path[1].idx] + jax.tree_util.keystr(path[2:]))
        else:
            names.append("args" + jax.tree_util.keystr(path[1:]))
    return names


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (ValueError, TypeError):  # builtins and some callables have none
        return None


def _position(fn: Callable[..., Any], number: int, count: int, variadic: bool) -> int:
    if number < 0 and not variadic:
        number += count
    if number < 0 or (number >= count and not variadic):
        raise ArgumentError(
            f"{_title(fn)} has {count} positional arguments; static_argnums={number} is none."
        )
    return number


def _holds_tensor_message(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{name} is static and a tensor, whose values may change. Leave it out of static_argnames."
    if isinstance(value, torch.nn.Module):
        return (
            f"{name} is a torch module, whose parameters may change, and JAX cannot call it. Pass "
            "dict(module.named_parameters())."
        )
    if isinstance(value, torch.fx.Proxy):
        return (
            f"{name} is a torch.fx.Proxy, which stands for a tensor, and JAX needs a shape. Record the call with "
            "torch.export, or name the Python function around it to torch.fx.wrap, so that it is left whole."
        )
    return (
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which JAX does not take apart, and it "
        "holds a tensor. Register the class with jax.tree_util.register_dataclass, or pass a tuple or dict."
    )


def _unhashable_message(name: str, value: Any) -> str:
    return (
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, neither a value that crosses (a "
        "tensor, an array or a number) nor hashable, so it can be neither traced nor static. Pass a pytree "
        "of tensors, or give the value a __hash__ and __eq__."
    )


def _title(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", type(fn).__qualname__))
