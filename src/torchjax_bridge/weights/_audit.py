"""Compares the settings that must agree between a torch model and its Flax twin, for every pair of layers.

Arrays alone do not make a model: epsilon, padding or the kind of GELU are arguments of constructors. Owns the
report; ``settings`` knows what to compare, and the plan which layers belong together. Needs and moves no
weights.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from torchjax_bridge.errors import PlanError, SettingsError
from torchjax_bridge.exchange import Path, join_path, split_path

from ._plan import Plan, UserRule, make_plan, read_sides
from ._plan_checks import group_by_text
from .layouts import Constant, Layout
from .rules import Rule
from .settings import (
    Difference,
    FlaxLayer,
    activation_differences,
    differences,
    einsum_differences,
    recurrent_dropout,
)
from .trees import (
    LinenModel,
    TorchTree,
    activation_pairs,
    as_linen,
    dropout_pairs,
    layers_below,
    live_linen,
    live_nnx,
    overridden_call_words,
    recurrent_dropouts,
    rng_streams,
)

__all__ = ["Audit", "SettingFault", "SettingsWarning", "audit", "compare_settings"]


@dataclass(frozen=True)
class SettingFault(Difference):
    """One setting that differs, and its place.

    Attributes:
        torch_path: The dotted path of the torch layer.
        flax_path: The dotted path of the Flax layer.
        torch_layer: The class of the torch layer.
        flax_layer: The class of the Flax layer; empty where a function stands in the torch layer's place.
    """

    torch_path: str
    flax_path: str
    torch_layer: str
    flax_layer: str

    @property
    def in_torch(self) -> str:
        """The setting in torch."""
        return f"{self.torch_name}={self.torch_value!r}"

    @property
    def in_flax(self) -> str:
        """The setting in Flax."""
        return f"{self.setting}={self.flax_value!r}"

    @property
    def to_type(self) -> str:
        """The fix, as a call of the constructor."""
        return f"{self.flax_layer}(..., {self.fix})" if self.flax_layer else self.fix

    def __str__(self) -> str:
        return (
            f"{self.in_torch} in torch, {self.in_flax} in Flax; type {self.to_type} ({_EFFECTS[self.effect]}"
            f"{_unless(self)}) @ "
            f"{self.torch_path or '(root)'} <-> {self.flax_path or '(root)'}"
        )


_EFFECTS = {
    "output": "changes outputs",
    "training": "changes training only",
    "rounding": "changes the last digits only",
}


def _unless(fault: SettingFault) -> str:
    return f" unless {fault.unless}" if fault.unless else ""


class SettingsWarning(UserWarning):
    """A converted model has other settings than the torch model, so that its output differs."""


@dataclass(frozen=True)
class Audit:
    """The settings of two models, compared. Print it to read it as a table.

    Attributes:
        faults: Every setting that differs, in the order of the torch model.
        layers: The number of pairs of layers that were compared.
        notes: Why some layers could not be paired.
        assumed: Assumptions about pairs of layers beyond settings, such as that a subclass with its own
            ``__call__`` computes what Flax's layer does.
    """

    faults: tuple[SettingFault, ...]
    layers: int
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.faults

    def __str__(self) -> str:
        lines = [f"audit: {_count(self.layers, 'layer')} compared, {_differ(self.faults)}"]
        rows = [("layer", "torch", "Flax", "type", "effect")] if self.faults else []
        rows += [
            (_place(fault), fault.in_torch, fault.in_flax, fault.to_type, f"{fault.effect}{_unless(fault)}")
            for fault in self.faults
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  " + "  ".join([*cells, row[4]]))
        lines += [f"  assumed: {text}" for text in self.assumed]
        lines += [f"  not paired: {note}" for note in self.notes]
        return "\n".join(lines)

    def raise_unless_ok(self) -> None:
        """Raise one `SettingsError` that lists every difference."""
        if self.faults:
            raise SettingsError(_not_alike(self.faults))

    def warn_unless_ok(self, stacklevel: int) -> None:
        """Warn once, with a `SettingsWarning`, of every difference that changes outputs."""
        grave = [fault for fault in self.faults if fault.effect == "output"]
        if grave:
            warnings.warn(_not_alike(grave), SettingsWarning, stacklevel=stacklevel + 1)


def _not_alike(faults: Sequence[SettingFault]) -> str:
    lines = "\n".join(f"  {fault}" for fault in faults)
    return f"the two models are not set up alike: {_differ(faults)}\n{lines}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _differ(faults: Sequence[SettingFault]) -> str:
    return f"{_count(len(faults), 'setting')} differ" + "s" * (len(faults) == 1)


def _place(fault: SettingFault) -> str:
    ours, theirs = fault.torch_path or "(root)", fault.flax_path or "(root)"
    return ours if ours == theirs else f"{ours} <-> {theirs}"


def audit(
    torch_module: nn.Module,
    flax_model: Any,
    *inputs: Any,
    rules: Iterable[UserRule] = (),
    strict: bool = False,
    flax_kwargs: Mapping[str, Any] | None = None,
) -> Audit:
    """Compare every setting that must agree between a torch model and its Flax twin.

    It compares epsilon, momentum (Flax's is 1 minus torch's), padding, strides, dilation, groups, masks, the axes
    of norms, the number of groups, which statistics a norm uses if its constructor fixes that, how the variance is
    computed, dropout rates, heads, biases, gate functions, the dtype of the computation, and activations that the
    Flax model holds as attributes. An activation inside a ``__call__`` is not visible from outside; `parity` finds
    it by its numbers.

    Args:
        torch_module: The torch model.
        flax_model: An ``nnx.Module``; a linen module; or ``(linen module, variables)``.
        inputs: For linen, example inputs as the Flax model takes them (channels last); only their shapes matter.
        rules: As for `to_flax`.
        strict: Raise if anything differs.
        flax_kwargs: For linen, keyword arguments of its call, such as ``{"train": False}``.

    Returns:
        An `Audit`; print it.

    Raises:
        SettingsError: With ``strict``, if anything differs; the message lists all of it. Or one side is no live
            module, or a linen model came without inputs.
        PlanError: The two models have no layer in common.

    Warns:
        PairingWarning: Layers were paired, or assumed to act like their base class, without proof; ``assumed``
            lists them.

    Memory:
        Reads settings and shapes, and computes nothing.

    >>> from torch import nn
    >>> from flax import nnx
    >>> print(audit(nn.LayerNorm(4), nnx.LayerNorm(4, use_fast_variance=False, rngs=nnx.Rngs(0))))
    audit: 1 layer compared, 1 setting differs
      layer   torch      Flax           type                           effect
      (root)  eps=1e-05  epsilon=1e-06  LayerNorm(..., epsilon=1e-05)  output
    """
    if not isinstance(torch_module, nn.Module):
        raise SettingsError(
            f"a {type(torch_module).__name__} has no settings to audit: pass the live nn.Module."
        )
    linen = as_linen(flax_model)
    template, layers = (flax_model, None) if linen is None else _trace(linen, inputs, flax_kwargs or {})
    torch_tree, flax_tree, given = read_sides(torch_module, template, rules)
    plan = make_plan(torch_tree, flax_tree, given)
    if not plan.moves:
        plan.report.raise_unless_ok("audit two models that have no layer in common", strict=True)
        raise PlanError("the two models have no layer in common.")
    if layers is not None:
        found_in_linen = _overridden_calls(torch_tree, layers, plan, given)
        plan = replace(plan, assumed=(*plan.assumed, *group_by_text(found_in_linen)))
    found = compare_settings(torch_tree, layers if layers is not None else live_nnx(flax_tree), plan)
    plan.warn_of_assumptions(stacklevel=2)
    if strict:
        found.raise_unless_ok()
    return found


def _overridden_calls(
    torch_tree: TorchTree, layers: Mapping[Path, FlaxLayer], plan: Plan, rules: Sequence[UserRule]
) -> Iterator[tuple[str, str]]:
    """The assumptions about linen layers that override a ``__call__``. Variables do not show these to the plan."""
    nodes = {node.origin: node for node in torch_tree.root.walk()}
    for torch_path, flax_path in plan.layers:
        node = nodes[torch_path]
        if node.declared or any(
            isinstance(node.module, rule.types) for rule in rules if isinstance(rule, Rule)
        ):
            continue
        # Modules below a container are pairs themselves; modules below a layer are parts of its twin.
        whole = not node.children or isinstance(node.module, nn.MultiheadAttention)
        parts = dict(layers_below(layers, flax_path)) if whole else {flax_path: layers.get(flax_path)}
        for layer in parts.values():
            if layer is not None and layer.overrides is not None:
                yield node.where, overridden_call_words(layer.name, layer.overrides, node.kind)


def _trace(
    linen: LinenModel, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, dict[Path, FlaxLayer]]:
    """The variables and modules of a linen model, from a run on shapes."""
    module, variables = linen
    if not inputs:
        raise SettingsError(
            "the modules of a linen model exist only while it runs: pass example inputs as it takes them, "
            "audit(torch_module, linen_module, x)."
        )
    if variables is None:
        return live_linen(module.init, rng_streams(), *inputs, **kwargs)
    writable = [name for name in variables if name != "params"]
    _, layers = live_linen(module.apply, variables, *inputs, rngs=rng_streams(), mutable=writable, **kwargs)
    return variables, layers


def compare_settings(torch_tree: TorchTree, layers: Mapping[Path, FlaxLayer], plan: Plan) -> Audit:
    """Compare the settings of every pair of layers of a plan."""
    nodes = {node.origin: node for node in torch_tree.root.walk() if node.module is not None}
    modules = {path: node.module for path, node in nodes.items() if node.module is not None}
    declared = {path: node.kind for path, node in nodes.items() if node.declared}
    dropouts: dict[Path, dict[Path, FlaxLayer]] = {}
    for path, other in layers.items():
        if other.kind == "Dropout":
            dropouts.setdefault(path[:-1], {})[path] = other
    faults: list[SettingFault] = []
    count = 0
    for torch_path, flax_path in plan.layers:
        module, layer = modules.get(torch_path), layers.get(flax_path)
        if module is None or layer is None:
            continue
        count += layer.kind not in ("Module", "Sequential", "List")
        found = differences(module, layer, declared.get(torch_path))
        faults += _faults(found, module, torch_path, layer, flax_path)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for path, cell in layers_below(layers, flax_path):
                if path != flax_path:
                    faults += _faults(differences(module, cell), module, torch_path, cell, path)
        if isinstance(module, nn.RNNBase) and module.num_layers > 1:
            parent = modules.get(torch_path[:-1]) if torch_path else None
            for path, drop in recurrent_dropouts(module, parent, flax_path, dropouts):
                faults += _faults(recurrent_dropout(module, drop), module, torch_path, drop, path)
        if layer.kind == "Einsum":
            found = tuple(einsum_differences(module, layer, _kernel_layout(plan, flax_path)))
            faults += _faults(found, module, torch_path, layer, flax_path)
        if next(module.children(), None) is None:
            continue
        for name, child, function in activation_pairs(module, layer):
            place = (*torch_path, name), (*flax_path, name)
            faults += _faults(activation_differences(child, function), child, place[0], None, place[1])
        for name, child, path, other in dropout_pairs(module, flax_path, dropouts):
            faults += _faults(differences(child, other), child, (*torch_path, name), other, path)
    neutral = set(_neutral_settings(plan))
    faults = [fault for fault in faults if (fault.setting, fault.flax_path) not in neutral]
    order = {path: place for place, path in enumerate(modules)}
    faults.sort(key=lambda fault: order.get(split_path(fault.torch_path), len(order)))
    return Audit(tuple(faults), count, tuple(str(fault) for fault in plan.report), plan.assumed)


def _neutral_settings(plan: Plan) -> Iterable[tuple[str, str]]:
    """The settings, such as ``use_bias``, of leaves that the plan fills with a neutral constant."""
    for move in plan.moves:
        if isinstance(move.layout, Constant) and move.layout.fixed:
            (path,) = move.flax_paths
            where = path[1:-1] if plan.flavour == "linen" else path[:-1]
            if move.layout.value == _NEUTRAL.get(str(path[-1])):
                yield f"use_{path[-1]}", join_path(where)


_NEUTRAL = {"bias": 0.0, "scale": 1.0}


def _kernel_layout(plan: Plan, flax_path: Path) -> Layout | None:
    """The layout of the kernel at a path, if the plan fills it alone."""
    kernels = (*flax_path, "kernel"), ("params", *flax_path, "kernel")
    return next((move.layout for move in plan.moves if move.flax_paths in [(k,) for k in kernels]), None)


def _faults(
    found: Iterable[Difference], module: nn.Module, torch_path: Path, layer: FlaxLayer | None, flax_path: Path
) -> list[SettingFault]:
    return [
        SettingFault(
            **vars(one),
            torch_path=join_path(torch_path),
            flax_path=join_path(flax_path),
            torch_layer=type(module).__name__,
            flax_layer=layer.name if layer else "",
        )
        for one in found
    ]
