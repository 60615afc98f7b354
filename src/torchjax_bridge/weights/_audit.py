"""Compares the settings that must agree between a torch model and its Flax twin, for every pair of layers.

Arrays do not carry epsilon, padding or the kind of GELU: these are arguments of constructors. ``settings`` knows
what to compare, and the plan knows which layers are pairs. Reads no weights.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import PlanError, SettingsError
from torchjax_bridge.exchange import Path, join_path, split_path

from ._audit_report import Audit, SettingFault
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

__all__ = ["audit", "compare_settings"]


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
        SettingsError: With ``strict``, if anything differs; the message lists all of it. Or one side is not a live
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
        raise SettingsError(f"{what_kind(torch_module)} has no settings to audit: pass the live nn.Module.")
    linen = as_linen(flax_model)
    template, layers = (flax_model, None) if linen is None else _run_linen(linen, inputs, flax_kwargs or {})
    torch_tree, flax_tree, given = read_sides(torch_module, template, rules)
    plan = make_plan(torch_tree, flax_tree, given)
    if not plan.moves:
        plan.report.raise_unless_ok("audit two models that have no layer in common", strict=True)
        raise PlanError("the two models have no layer in common.")
    if layers is not None:
        assumed = _overridden_calls(torch_tree, layers, plan, given)
        plan = replace(plan, assumed=(*plan.assumed, *group_by_text(assumed)))
    result = compare_settings(torch_tree, layers if layers is not None else live_nnx(flax_tree), plan)
    plan.warn_of_assumptions(stacklevel=2)
    if strict:
        result.raise_unless_ok()
    return result


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


def _run_linen(
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
    for path, flax_layer in layers.items():
        if flax_layer.kind == "Dropout":
            dropouts.setdefault(path[:-1], {})[path] = flax_layer
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
            for path, dropout in recurrent_dropouts(module, parent, flax_path, dropouts):
                faults += _faults(recurrent_dropout(module, dropout), module, torch_path, dropout, path)
        if layer.kind == "Einsum":
            in_einsum = einsum_differences(module, layer, _kernel_layout(plan, flax_path))
            faults += _faults(in_einsum, module, torch_path, layer, flax_path)
        if next(module.children(), None) is None:
            continue
        for name, child, function in activation_pairs(module, layer):
            in_activation = activation_differences(child, function)
            faults += _faults(in_activation, child, (*torch_path, name), None, (*flax_path, name))
        for name, child, path, dropout in dropout_pairs(module, flax_path, dropouts):
            faults += _faults(differences(child, dropout), child, (*torch_path, name), dropout, path)
    neutral = set(_neutral_settings(plan))
    faults = [fault for fault in faults if (fault.setting, fault.flax_path) not in neutral]
    order = {path: position for position, path in enumerate(modules)}
    faults.sort(key=lambda fault: order.get(split_path(fault.torch_path), len(order)))
    return Audit(tuple(faults), count, tuple(str(fault) for fault in plan.report), plan.assumed)


def _neutral_settings(plan: Plan) -> Iterable[tuple[str, str]]:
    """The settings, such as ``use_bias``, of leaves that the plan fills with a neutral constant."""
    for move in plan.moves:
        if isinstance(move.layout, Constant) and move.layout.fixed:
            (path,) = move.flax_paths
            layer = path[1:-1] if plan.flavour == "linen" else path[:-1]
            if move.layout.value == _NEUTRAL.get(str(path[-1])):
                yield f"use_{path[-1]}", join_path(layer)


_NEUTRAL = {"bias": 0.0, "scale": 1.0}


def _kernel_layout(plan: Plan, flax_path: Path) -> Layout | None:
    """The layout of the kernel at a path, if the plan fills it alone."""
    kernels = (*flax_path, "kernel"), ("params", *flax_path, "kernel")
    return next((move.layout for move in plan.moves if move.flax_paths in [(k,) for k in kernels]), None)


def _faults(
    found: Iterable[Difference], module: nn.Module, torch_path: Path, layer: FlaxLayer | None, flax_path: Path
) -> list[SettingFault]:
    """The differences of one pair of layers, with their place."""
    return [
        SettingFault(
            **vars(difference),
            torch_path=join_path(torch_path),
            flax_path=join_path(flax_path),
            torch_layer=type(module).__name__,
            flax_layer=layer.name if layer else "",
        )
        for difference in found
    ]
