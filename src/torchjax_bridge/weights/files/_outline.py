"""`outline`: what a checkpoint or a model holds, tensor by tensor, with the layer and the rule that will apply."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import BridgeError
from torchjax_bridge.exchange import join_path, torch_dtype

from ..pairing import Matcher
from ..rules import RULES, Rule
from ..trees import FlaxNode, TorchNode, read_flax, read_torch
from ._convert import framework_of
from ._leaf import Checkpoint, size_of
from ._route import flax_side

__all__ = ["Line", "outline"]


@dataclass(frozen=True)
class Line:
    """One tensor.

    Attributes:
        name: Its dotted name, as the file or the model has it.
        dtype: By torch's name for it.
        shape: As it is there.
        nbytes: Bytes of the values.
        layer: The class of its layer, or empty where nothing tells.
        rule: The rule that will convert it; several, with "or", where the names leave it open.
        shard: The file of a sharded checkpoint.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    layer: str = ""
    rule: str = ""
    shard: str = ""


def outline(thing: Checkpoint | nn.Module | Any) -> list[Line]:
    """Every tensor, in its own order.

    Args:
        thing: A checkpoint that was opened, an ``nn.Module``, or a Flax template as for `to_flax`.

    Raises:
        CheckpointError: The names of a file contradict themselves.
        PlanError: It is none of these.
    """
    if isinstance(thing, Checkpoint):
        layers = _layers_of_names(thing)
        return [
            Line(name, _name(leaf.dtype), leaf.shape, leaf.nbytes, *layers.get(name, ("", "")), leaf.shard)
            for name, leaf in thing.leaves.items()
        ]
    if isinstance(thing, nn.Module):
        tree = read_torch(thing)
        layers = _torch_layers(tree.root)
        return [
            Line(name, _name(t.dtype), tuple(t.shape), t.nbytes, *layers.get(name, ("", "")))
            for name, t in tree.state.items()
            if isinstance(t, torch.Tensor)
        ]
    flax = read_flax(thing)
    lines = []
    for node in flax.root.walk():
        for leaf in node.leaves.values():
            dtype = torch_dtype(leaf.dtype)
            lines.append(
                Line(
                    join_path(leaf.path),
                    _name(dtype),
                    leaf.shape,
                    size_of(dtype, leaf.shape),
                    node.kind or "",
                    _flax_rule(node),
                )
            )
    return lines


def _layers_of_names(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    try:
        if framework_of(checkpoint) == "torch":
            return _torch_layers(
                read_torch({name: leaf.meta for name, leaf in checkpoint.leaves.items()}).root
            )
        root = flax_side(checkpoint).root
    except BridgeError:  # names that are neither still have dtypes and shapes to show
        return {}
    return {
        join_path(leaf.path): (node.kind or "", _flax_rule(node))
        for node in root.walk()
        for leaf in node.leaves.values()
    }


def _torch_layers(root: TorchNode) -> dict[str, tuple[str, str]]:
    matcher = Matcher(RULES)
    found: dict[str, tuple[str, str]] = {}

    def visit(node: TorchNode, above: str) -> None:
        rule = matcher.rule_for(node)
        known = rule.name if rule is not None else above
        said = " or ".join(_may_be(node)) if node.kind is None else known
        kind = node.kind.__name__ if node.kind is not None else ""
        for leaf in node.leaves.values():
            found[leaf.key] = (kind, said)
        for child in node.children.values():
            visit(child, rule.name if rule is not None else above)

    visit(root, "")
    return found


def _may_be(node: TorchNode) -> list[str]:
    """The classes whose names and numbers of axes these are."""
    if not node.leaves:
        return []
    names = frozenset(node.flat())
    rules = [rule for rule in RULES if rule.may_be(names)]
    own = {name: tuple(leaf.tensor.shape) for name, leaf in node.leaves.items()}
    fits = [found for rule in rules if (found := _class_of(rule, own))]
    return list(dict.fromkeys(fits or [rule.name for rule in rules]))


def _class_of(rule: Rule, shapes: dict[str, tuple[int, ...]]) -> str:
    """The class of a rule that has tensors of these names and shapes; empty where none has."""
    weight, bias = shapes.get("weight"), shapes.get("bias")
    if weight is None:
        return rule.name
    if callable(rule.entries):
        known = {"weight", "bias", *(rule.required or ()), *rule.keeps}
    else:
        known = {name for entry in rule.entries for name in entry.torch_names} | set(rule.keeps)
    if not shapes.keys() <= known:
        return ""
    kinds = [
        kind
        for kind in rule.types
        if len(weight) in _AXES.get(kind, (1, 2, 3, 4, 5)) and _has_bias(kind, weight, bias)
    ]
    return rule.name if len(kinds) == len(rule.types) else " / ".join(kind.__name__ for kind in kinds)


# How many axes the weight of a class has, where not any number.
_AXES: dict[type, tuple[int, ...]] = {
    nn.Linear: (2,),
    nn.Embedding: (2,),
    nn.EmbeddingBag: (2,),
    nn.Bilinear: (3,),
    nn.PReLU: (1,),
    nn.GroupNorm: (1,),
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), (3,)),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), (4,)),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), (5,)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), (1,)),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), (1,)),
}
_BARE = (nn.Embedding, nn.EmbeddingBag, nn.RMSNorm, nn.PReLU)


def _has_bias(kind: type, weight: tuple[int, ...], bias: tuple[int, ...] | None) -> bool:
    if bias is None or kind in _BARE:
        return bias is None
    return bias == weight if kind is nn.LayerNorm else len(bias) == 1


def _flax_rule(node: FlaxNode) -> str:
    if node.kind is None:
        return ""
    return " or ".join(dict.fromkeys(rule.name for rule in RULES if node.kind in rule.flax_types))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
