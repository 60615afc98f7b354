"""`outline`: lists the tensors of a checkpoint or a model, with the layer and the rule of each."""

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
from ._route import infer_flax_tree

__all__ = ["TensorInfo", "outline"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of an outline.

    Attributes:
        name: Its dotted name in the file or the model.
        dtype: torch's name of its dtype.
        shape: Its shape in the file or the model.
        nbytes: Bytes of the values.
        layer: The class of its layer, or empty if unknown.
        rule: The rule that will convert it; several, joined by "or", if the names fit several.
        shard: The file of a sharded checkpoint.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    layer: str = ""
    rule: str = ""
    shard: str = ""


def outline(thing: Checkpoint | nn.Module | Any) -> list[TensorInfo]:
    """List every tensor, in the order of the checkpoint or model.

    Args:
        thing: An open checkpoint, an ``nn.Module``, or a Flax template as for `to_flax`.

    Raises:
        CheckpointError: The names of a file contradict each other.
        PlanError: It is none of these.
    """
    if isinstance(thing, Checkpoint):
        layers = _layers_of_checkpoint(thing)
        return [
            TensorInfo(
                name,
                _dtype_name(leaf.dtype),
                leaf.shape,
                leaf.nbytes,
                *layers.get(name, ("", "")),
                leaf.shard,
            )
            for name, leaf in thing.leaves.items()
        ]
    if isinstance(thing, nn.Module):
        tree = read_torch(thing)
        layers = _torch_layers(tree.root)
        return [
            TensorInfo(name, _dtype_name(t.dtype), tuple(t.shape), t.nbytes, *layers.get(name, ("", "")))
            for name, t in tree.state.items()
            if isinstance(t, torch.Tensor)
        ]
    flax = read_flax(thing)
    lines = []
    for node in flax.root.walk():
        for leaf in node.leaves.values():
            dtype = torch_dtype(leaf.dtype)
            lines.append(
                TensorInfo(
                    join_path(leaf.path),
                    _dtype_name(dtype),
                    leaf.shape,
                    size_of(dtype, leaf.shape),
                    node.kind or "",
                    _flax_rule(node),
                )
            )
    return lines


def _layers_of_checkpoint(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    try:
        if framework_of(checkpoint) == "torch":
            return _torch_layers(
                read_torch({name: leaf.meta for name, leaf in checkpoint.leaves.items()}).root
            )
        root = infer_flax_tree(checkpoint).root
    except BridgeError:  # an unknown framework: dtypes and shapes are listed without layers
        return {}
    return {
        join_path(leaf.path): (node.kind or "", _flax_rule(node))
        for node in root.walk()
        for leaf in node.leaves.values()
    }


def _torch_layers(root: TorchNode) -> dict[str, tuple[str, str]]:
    matcher = Matcher(RULES)
    found: dict[str, tuple[str, str]] = {}

    def visit(node: TorchNode, parent_rule: str) -> None:
        rule = matcher.rule_for(node)
        rule_name = rule.name if rule is not None else parent_rule
        candidates = " or ".join(_candidates(node)) if node.kind is None else rule_name
        kind = node.kind.__name__ if node.kind is not None else ""
        for leaf in node.leaves.values():
            found[leaf.key] = (kind, candidates)
        for child in node.children.values():
            visit(child, rule_name)

    visit(root, "")
    return found


def _candidates(node: TorchNode) -> list[str]:
    """The classes that have tensors of these names and numbers of axes."""
    if not node.leaves:
        return []
    names = frozenset(node.flat())
    rules = [rule for rule in RULES if rule.may_be(names)]
    own = {name: tuple(leaf.tensor.shape) for name, leaf in node.leaves.items()}
    fits = [found for rule in rules if (found := _matching_classes(rule, own))]
    return list(dict.fromkeys(fits or [rule.name for rule in rules]))


def _matching_classes(rule: Rule, shapes: dict[str, tuple[int, ...]]) -> str:
    """The classes of a rule that have tensors of these names and shapes; empty if none has."""
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
        if len(weight) in _WEIGHT_NDIM.get(kind, (1, 2, 3, 4, 5)) and _bias_fits(kind, weight, bias)
    ]
    return rule.name if len(kinds) == len(rule.types) else " / ".join(kind.__name__ for kind in kinds)


# The number of axes of a class's weight; classes that allow any number are not listed.
_WEIGHT_NDIM: dict[type, tuple[int, ...]] = {
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
_WITHOUT_BIAS = (nn.Embedding, nn.EmbeddingBag, nn.RMSNorm, nn.PReLU)


def _bias_fits(kind: type, weight: tuple[int, ...], bias: tuple[int, ...] | None) -> bool:
    if bias is None or kind in _WITHOUT_BIAS:
        return bias is None
    return bias == weight if kind is nn.LayerNorm else len(bias) == 1


def _flax_rule(node: FlaxNode) -> str:
    if node.kind is None:
        return ""
    return " or ".join(dict.fromkeys(rule.name for rule in RULES if node.kind in rule.flax_types))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
