"""Finds the twin of a live torch layer in the table of rules, and says why a layer has none."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from torchjax_bridge.errors import SettingsError

from ._parametrized import computed_notes
from ._rule import Rule
from ._twin import Symbol, Twin

__all__ = ["find_twin", "own_methods"]

# What a subclass of one of torch's layers overrides to compute something else.
_METHODS = ("forward", "_conv_forward", "__call__")


def own_methods(kind: type, base: type) -> bool:
    """Whether a subclass may compute something else than its base."""
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in _METHODS)


def find_twin(rules: Iterable[Rule], module: nn.Module, exact_statistics: bool) -> Twin:
    """The twin by the rule of the nearest class; see `twin_of`."""
    kind = type(module)
    found = {base: rule.twin for rule in rules if rule.twin is not None for base in rule.types}
    base = next((base for base in kind.__mro__ if base in found), None)
    if base is None:
        raise SettingsError(f"{_name(kind)} has no Flax twin: no rule knows one for its class.")
    if own_methods(kind, base) or "forward" in vars(module):
        raise SettingsError(
            f"{_name(kind)} has no Flax twin: it has a forward of its own, which need not compute what "
            f"{_name(base)} does."
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise SettingsError(f"{_name(kind)} has no Flax twin yet: it knows its sizes after its first call.")
    try:
        twin, notes = found[base](module), computed_notes(module)
    except ValueError as why:
        raise SettingsError(f"{_name(kind)} has no Flax twin: {why}.") from None
    twin = replace(twin, notes=(*twin.notes, *notes))
    if exact_statistics and twin.flax == "BatchNorm":
        twin = replace(twin, own=True)
    return _in_its_dtype(twin, module)


def _in_its_dtype(twin: Twin, module: nn.Module) -> Twin:
    """The twin with the dtype of the torch layer's weights, where that is not the default of both."""
    dtypes = {weight.dtype for weight in module.parameters() if weight.is_floating_point()}
    if len(dtypes) != 1 or dtypes == {torch.float32}:
        return twin
    (dtype,) = dtypes
    name = Symbol(str(dtype).replace("torch", "jnp"))

    def typed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(typed, value))
        if not isinstance(value, Twin):
            return value
        sizes = {name: typed(size) for name, size in value.sizes.items()}
        if value.flax in _WITHOUT_WEIGHTS:
            return replace(value, sizes=sizes)
        dtypes = {"param_dtype": name} | ({"dtype": name} if value.flax == "SimpleCell" else {})
        return replace(value, sizes=sizes, settings={**value.settings, **dtypes})

    return typed(twin)


_WITHOUT_WEIGHTS = frozenset({"RNN", "Bidirectional", "Sequential", "Dropout"})


def _name(kind: type) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
