"""What a caller may give `port`: mistakes are found before anything runs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import jax
import torch
from torch import nn
from torch.overrides import resolve_name

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.recording import Recording, is_leaf, map_tensors, tensors_of
from torchjax_bridge.weights import require_tensors, wrapped_module

from ._inputs import Example

__all__ = [
    "chosen",
    "given_example",
    "given_functions",
    "given_lines",
    "given_module",
    "one_layer",
    "require_called",
]


def given_module(module: Any) -> nn.Module:
    """The module to port: of a wrapper (``torch.compile``, ``DataParallel``) what it wraps.

    Raises:
        ArgumentError: It is no live module, or one layer of torch's own, or runs code that Python does not see.
    """
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise ArgumentError(f"port takes a module and not its class: port({module.__name__}(...), inputs).")
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"port takes a torch.nn.Module, not {what_kind(module)}.")
    while (inner := wrapped_module(module)) is not None:
        module = inner
    for path, part in module.named_modules():
        where = f"'{path}'" if path else "the module"
        if isinstance(part, torch.jit.ScriptModule):
            raise ArgumentError(
                f"{where} is a ScriptModule, whose Python code is gone: port the module that it was made from."
            )
        if wrapped_module(part) is not None:
            raise ArgumentError(
                f"{where} is {what_kind(part)}, which only runs another module: put that one in its place."
            )
        if any(isinstance(one, nn.UninitializedParameter) for one in part.parameters(recurse=False)):
            raise ArgumentError(
                f"{where} is lazy and has no weights yet: call the module on its inputs once before."
            )
    wide = [
        name
        for name, tensor in module.named_parameters()
        if tensor.dtype in (torch.float64, torch.complex128) and not jax.config.read("jax_enable_x64")
    ]
    if wide:
        raise ArgumentError(
            f"'{wide[0]}' has 64 bits, and JAX as it is set up has none: port module.float(), with inputs of 32 "
            'bits, or set jax.config.update("jax_enable_x64", True) first.'
        )
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and is_leaf(module):
        raise one_layer(module)
    return module


def one_layer(module: nn.Module) -> ArgumentError:
    """The error for a layer of torch's own, which has no code to port."""
    return ArgumentError(
        f"{type(module).__name__} is one layer of torch's own, and no code to port: port a module that calls it, "
        "such as torch.nn.Sequential(layer)."
    )


def given_example(inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Example:
    """The example inputs, without the history of their gradients.

    Raises:
        ArgumentError: They are arrays, or tensors that are no dense memory.
    """
    tree = inputs, dict(kwargs or {})
    require_tensors(tree)
    for leaf in tensors_of(tree, torch.Tensor):
        if leaf.layout != torch.strided or leaf.is_nested:
            raise ArgumentError("the inputs hold a nested or sparse tensor; give dense ones.")
    return Example(*map_tensors(tree, torch.Tensor.detach, same_kind=True))


def given_functions(
    ops: Mapping[Callable[..., Any], str | Callable[..., str]] | None,
) -> dict[str, Callable[..., str]]:
    """The translations of the caller's by the public name of the torch function.

    Raises:
        ArgumentError: A key is no function of torch's, or a value no expression.
    """
    found: dict[str, Callable[..., str]] = {}
    for function, template in (ops or {}).items():
        name = resolve_name(function) if callable(function) else None
        if name is None or not (isinstance(template, str) or callable(template)):
            raise ArgumentError(
                f"ops= takes torch functions and JAX expressions, not {function!r}: {template!r}"
            )
        found[name] = template.format if isinstance(template, str) else template
    return found


def require_called(functions: Iterable[str], recordings: Iterable[Recording | None]) -> None:
    """Make sure that the module calls each function that the caller translates.

    Raises:
        ArgumentError: It does not call one.
    """
    called = {
        node.function
        for one in recordings
        if one is not None
        for frame in one.top.walk()
        for node in frame.nodes
    }
    for name in functions:
        if name not in called:
            like = sorted(other for other in called if other.rpartition(".")[2] == name.rpartition(".")[2])
            hint = f" It calls {' and '.join(like)}." if like else ""
            raise ArgumentError(f"ops= names {name}, and the module does not call it.{hint}")


def given_lines(assume: Iterable[str]) -> frozenset[str]:
    """The lines whose decisions the caller accepts.

    Raises:
        ArgumentError: It is one text, and no collection of them.
    """
    if isinstance(assume, str):
        raise ArgumentError(f"assume= takes a list of lines, such as [{assume!r}].")
    return frozenset(assume)


def chosen(name: str, value: Any, kind: Any) -> None:
    """Make sure that an option is one of those that it can be.

    Raises:
        ArgumentError: It is none.
    """
    if value not in get_args(kind):
        known = " or ".join(repr(one) for one in get_args(kind))
        raise ArgumentError(f"{name}= is {known}, not {value!r}.")
