"""Writes the caller's `LayerType`, `Flatten` and `Fused` into the torch tree; reports those that match nothing."""

from collections.abc import Sequence

from torchjax_bridge.exchange import join_path

from ._nearest import did_you_mean
from ._report import Fault
from .flatten import COMPUTED, can_be_flattened, knows_one_order
from .rules import Fill, Flatten, Fused, Keep, LayerType, Rename, Rule
from .trees import TorchNode, TorchTree

__all__ = ["UserRule", "apply_hints"]

UserRule = Rule | Rename | LayerType | Flatten | Fused | Keep | Fill


def apply_hints(tree: TorchTree, rules: Sequence[UserRule]) -> list[Fault]:
    """Write the hints about layers into the tree; the faults are those that match nothing."""
    faults = []
    layers = [node for node in tree.root.walk() if _holds_tensors(node)]
    for rule in rules:
        if isinstance(rule, Fused):
            holders = [node for node in tree.root.walk() if rule.matches(node.origin) and not node.empty]
            if not holders:
                faults.append(Fault("rules", f"{rule} names no module of the torch side", rule.module))
            for node in holders:
                node.fused += (rule,)
        if not isinstance(rule, LayerType | Flatten):
            continue
        # A class may be that of a module whose layers hold the tensors; a flattened map is read by a layer.
        holders = [node for node in tree.root.walk() if not node.empty or _holds_tensors(node)]
        places = layers if isinstance(rule, Flatten) else holders
        named = [node for node in places if rule.matches(node.origin)]
        if not named:
            near = did_you_mean(rule.torch, [join_path(node.origin) for node in layers])
            faults.append(Fault("rules", f"{rule} names no layer of the torch side{near}", rule.torch))
        for node in named:
            if isinstance(rule, LayerType):
                node.kind, node.declared = rule.kind, True
            elif not can_be_flattened(node, rule):
                other = "" if rule.output else ", and none over flattened features"
                what = (
                    "takes features in torch's order only (None)"
                    if knows_one_order(node)
                    else f"is no Linear layer{other}"
                )
                message = f"{rule} names {node.where}, which {what}"
                faults.append(Fault("rules", message, rule.torch))
            elif rule.output:
                node.output, node.told = rule.features, node.told | {"output"}
            else:
                node.features, node.told = rule.features, node.told | {"features"}
    return faults


def _holds_tensors(node: TorchNode) -> bool:
    """Whether it has or computes tensors of its own, including those that were renamed apart from it."""
    return bool(node.leaves) or COMPUTED in node.children or any("." not in name for name in node.moved)
