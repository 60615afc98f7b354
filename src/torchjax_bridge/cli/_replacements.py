"""``--op`` and ``--module``: a user's own translations of torch functions and classes, as ``TORCH=FLAX``."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import typer
from torch import nn

__all__ = ["read_modules", "read_ops"]


def read_ops(given: Sequence[str] | None) -> dict[Callable[..., Any], str]:
    """Translations by function, of ``torch.polygamma=jax.scipy.special.polygamma({0}, {1})``."""
    found: dict[Callable[..., Any], str] = {}
    for one in given or ():
        name, code = _halves(one, "--op", "torch.polygamma=jax.scipy.special.polygamma({0}, {1})")
        start, *parts = name.split(".")
        function: Any = torch if start == "torch" else None
        for part in parts:
            function = getattr(function, part, None)
        if not parts or not callable(function):
            raise typer.BadParameter(f"--op {one}: torch has no function {name}.")
        found[function] = code
    return found


def read_modules(given: Sequence[str] | None) -> dict[type[nn.Module], str]:
    """Flax classes by torch class, of ``my.nets:Mixer=my.layers:FlaxMixer``."""
    found: dict[type[nn.Module], str] = {}
    for one in given or ():
        name, flax = _halves(one, "--module", "my.nets:Mixer=my.layers:FlaxMixer")
        package, _, kind = name.partition(":")
        try:
            torch_class = getattr(importlib.import_module(package), kind, None)
        except ImportError as err:
            raise typer.BadParameter(f"--module {one}: {err}.") from err
        if not (isinstance(torch_class, type) and issubclass(torch_class, nn.Module)):
            raise typer.BadParameter(f"--module {one}: {package} has no torch module {kind}.")
        found[torch_class] = flax
    return found


def _halves(given: str, option: str, example: str) -> tuple[str, str]:
    left, equals, right = given.partition("=")
    if not (left and equals and right):
        raise typer.BadParameter(f"{option} {given}: write it as {example}.")
    return left, right
