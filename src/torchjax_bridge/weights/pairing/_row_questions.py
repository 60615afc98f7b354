"""Asks which layers are fused into one on the other side, and in which order their rows come.

Asks where a remaining dense layer has as many rows as several layers of the other side together. `Fused` is
the answer. Pairs nothing.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import TypeVar

import torch
from torch import nn

from torchjax_bridge.exchange import join_path

from .._report import Fault, Series
from ..trees import FlaxNode, TorchNode
from ._fused import rows_of

__all__ = ["ask_about_rows"]

_Node = TypeVar("_Node", TorchNode, FlaxNode)


def ask_about_rows(
    torch_node: TorchNode, flax_node: FlaxNode, ours: Sequence[TorchNode], theirs: Sequence[FlaxNode]
) -> tuple[list[Fault], list[TorchNode], list[FlaxNode]]:
    """Faults that ask about layers that may be fused, and the nodes that remain.

    Args:
        torch_node: The module whose children were paired.
        flax_node: Its partner.
        ours: The torch nodes without a partner.
        theirs: The Flax nodes without a partner.
    """
    left, free, faults = list(ours), list(theirs), []
    loose = [node for node in flax_node.children.values() if node.path[-1] not in torch_node.children]
    for node in ours:
        shape = _shape(node)
        scopes = [(one, rows_of(one, shape[1])) for one in loose] if shape else []
        if options := _layers_with_rows(scopes, shape[0] if shape else 0):
            faults.append(_fused_fault(torch_node, str(node.path[-1]), options, in_torch=True))
            left.remove(node)
            free = [one for one in free if not _is_among(one, options)]
    dense = [
        (node, shape)
        for name, node in torch_node.children.items()
        if name not in flax_node.children and (shape := _shape(node))
    ]
    for scope in tuple(free):
        fused: list[tuple[TorchNode, ...]] = []
        for width in dict.fromkeys(shape[1] for _, shape in dense):
            rows = [(node, shape[0]) for node, shape in dense if shape[1] == width]
            fused += _layers_with_rows(rows, rows_of(scope, width) or 0)
        if fused:
            faults.append(_fused_fault(torch_node, str(scope.path[-1]), fused, in_torch=False))
            free.remove(scope)
            left = [one for one in left if not _is_among(one, fused)]
    return faults, left, free


def _layers_with_rows(
    layers: Sequence[tuple[_Node, int]] | Sequence[tuple[_Node, int | None]], total: int
) -> list[tuple[_Node, ...]]:
    """The pairs and triples of layers that have this many rows together."""
    known = [(node, rows) for node, rows in layers if rows]
    return [
        tuple(node for node, _ in chosen)
        for count in (2, 3)
        for chosen in combinations(known[:_MOST], count)
        if sum(rows for _, rows in chosen) == total
    ]


_MOST = 8  # an attention has fewer layers than this


def _is_among(node: _Node, options: Sequence[tuple[_Node, ...]]) -> bool:
    return any(node is one for option in options for one in option)


def _fused_fault(
    parent: TorchNode, name: str, options: Sequence[tuple[TorchNode | FlaxNode, ...]], *, in_torch: bool
) -> Fault:
    """The fault that asks which layers are fused, in which order. Its advice has blanks for the names: no guess."""
    names = list(dict.fromkeys(str(node.path[-1]) for option in options for node in option))
    count = len(options[0])
    listed = ", ".join(f"'{one}'" for one in names)
    some = "" if len(options) == 1 else f"{'two' if count == 2 else 'three'} of "
    blanks = ", ".join(("<first>", "<second>", "<third>")[:count])
    module = join_path(parent.origin)

    def rule(at: str) -> str:
        return f'Fused("{at}", "{name}", ({blanks}))' if in_torch else f'Fused("{at}", ({blanks}), "{name}")'

    whole = join_path((*parent.origin, name)) if in_torch else name
    one_side, other = ("torch", "Flax") if in_torch else ("Flax", "torch")
    message = (
        f"'{whole}' has as many rows in {one_side} as {some}{listed} have together in {other}, and neither "
        f"side says in which order: rules=[{rule(module)}] with their names in the order of its rows, if one comes "
        "whole after the other, or the same with heads=<number of heads> if they come head by head"
    )
    path = whole if in_torch else module
    if not any(isinstance(step, int) for step in parent.origin):
        return Fault("ambiguous", message, path, even=False)
    block = join_path("*" if isinstance(step, int) else step for step in parent.origin)
    pattern = f"{block}.{name}" if in_torch else block
    return Fault(
        "ambiguous", message, path, even=False, series=Series(rule(block), pattern, tuple(names), (name,))
    )


def _shape(node: TorchNode) -> torch.Size | None:
    """The shape of the weight if the node may be a dense layer."""
    weight = node.leaves.get("weight")
    dense = weight is not None and weight.meta.ndim == 2 and node.leaves.keys() <= {"weight", "bias"}
    known = node.kind is None or issubclass(node.kind, nn.Linear)
    return weight.meta.shape if dense and known and weight is not None and not node.children else None
