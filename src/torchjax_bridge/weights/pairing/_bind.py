"""Binds one torch layer to one Flax scope: applies a rule, and gives moves and faults.

Owns `Move`. Does not decide which layer belongs to which scope (``_matcher`` does), and moves no values:
shapes come from meta tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from torchjax_bridge.exchange import Path, join_path, torch_dtype

from .._report import Fault
from ..layouts import Constant, Identity, Layout
from ..rules import Entry, Layer, Rule
from ..trees import (
    FlaxLeaf,
    FlaxNode,
    TorchLeaf,
    TorchNode,
    flax_assumptions,
    square_leaf_assumption,
    torch_assumptions,
)

__all__ = [
    "RAW",
    "Match",
    "Move",
    "bind",
    "bind_raw",
    "is_square",
    "misfit",
    "missing_fault",
    "missing_faults",
    "unexpected_fault",
]

RAW = "raw tensor"
"""The rule name of a parameter or buffer outside a layer with a rule."""


@dataclass(frozen=True)
class Move:
    """A group of torch tensors and the group of Flax leaves that holds the same values.

    Attributes:
        torch_keys: Keys of the caller's ``state_dict``.
        flax_paths: Paths of the template, with the collection in front for linen.
        layout: How the torch tensors lie in the Flax leaves.
        rule: The name of the rule that gave the layout.
        layer: The class of the layer, or the rule's name where no class is known.
        note: A remark for the reader of the plan.
    """

    torch_keys: tuple[str, ...]
    flax_paths: tuple[Path, ...]
    layout: Layout
    rule: str
    layer: str
    note: str = ""


class Match(NamedTuple):
    """The result of matching two nodes or two subtrees.

    Attributes:
        moves: What crosses.
        keeps: Keys of torch tensors that stay in torch by their rule.
        faults: What does not fit.
        notes: Conclusions that a reader may want to check.
        layers: The modules that were paired, as torch path and Flax path.
        assumed: Conclusions that names, classes and shapes do not prove, as pairs: the layer, and the text.
    """

    moves: tuple[Move, ...] = ()
    keeps: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    layers: tuple[tuple[Path, Path], ...] = ()
    assumed: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no faults."""
        return not self.faults

    @classmethod
    def of(cls, parts: Sequence["Match"]) -> "Match":
        """Several matches as one, in their order."""
        return cls(
            tuple([move for part in parts for move in part.moves]),
            tuple([key for part in parts for key in part.keeps]),
            tuple([fault for part in parts for fault in part.faults]),
            tuple([note for part in parts for note in part.notes]),
            tuple([pair for part in parts for pair in part.layers]),
            tuple([one for part in parts for one in part.assumed]),
        )


def bind(rule: Rule, torch_node: TorchNode, flax_node: FlaxNode) -> Match:
    """Apply a rule to a layer and a scope. Every tensor and leaf below them gets a move, a fault or stays."""
    ours, theirs = torch_node.flat(), flax_node.flat()
    moved = torch_node.moved
    layer = Layer(
        {name: leaf.meta for name, leaf in (*ours.items(), *moved.items())},
        {path: leaf.shape for path, leaf in theirs.items()},
        torch_node.module,
        flax_node.kind,
        flax_node.module,
        torch_node.features,
        torch_node.kind,
        torch_node.output,
        torch_node.told,
    )
    try:
        entries = rule.entries_for(layer)
    except (KeyError, ValueError) as err:  # the rule does not apply to this layer
        reason = f"it has no tensor {err}" if isinstance(err, KeyError) else str(err)
        reason = reason.replace("<path>", f'"{join_path(torch_node.origin)}"')
        message = f"{torch_node.where} does not fit {flax_node.where}: {reason}"
        return Match(faults=(Fault("mismatch", message, join_path(torch_node.origin)),))
    of_class = torch_node.kind.__name__ if torch_node.kind else rule.name
    moves: list[Move] = []
    faults: list[Fault] = []
    assumptions = *torch_assumptions(rule, torch_node), *flax_assumptions(rule, torch_node, flax_node)
    assumed = [(torch_node.where, words) for words in assumptions]
    for entry in entries:
        names, places = entry.torch_names, entry.flax_paths
        if moved and names and all(name in moved for name in names):
            continue  # bound at the place of its new name
        torch_leaves = [ours.pop(name) for name in names if name in ours]
        flax_leaves = [theirs.pop(path) for path in places if path in theirs]
        if len(torch_leaves) < len(names) or len(flax_leaves) < len(places):
            faults += _one_sided(entry, torch_node, flax_node, torch_leaves, flax_leaves)
            continue
        if isinstance(entry.layout, Constant) and len(flax_leaves) == 1:
            entry = replace(entry, layout=_like(entry.layout, torch_node, flax_leaves[0]))
        fault = misfit(entry, torch_node, torch_leaves, flax_leaves)
        if fault is not None:
            faults.append(fault)
            continue
        if entry.assumed:
            assumed.append((torch_node.where, entry.assumed))
        square = not isinstance(entry.layout, Identity) and is_square(torch_leaves, flax_leaves)
        if square and (words := square_leaf_assumption(rule, torch_node, flax_node, entry.flax_paths[0])):
            assumed.append((torch_node.where, words))
        moves.append(
            Move(
                tuple([leaf.key for leaf in torch_leaves]),
                tuple([leaf.path for leaf in flax_leaves]),
                entry.layout,
                rule.name,
                of_class,
                entry.note,
            )
        )
    keeps = tuple([ours.pop(name).key for name in rule.keeps if name in ours])
    pair = (torch_node.origin, flax_node.path)
    bound = Match(tuple(moves), keeps, tuple(faults), layers=(pair,), assumed=tuple(assumed))
    if not ours and not theirs:
        return bound
    rest = bind_raw(torch_node, ours, {join_path(path): leaf for path, leaf in theirs.items()})
    return Match.of((bound, rest))


def bind_raw(torch_node: TorchNode, ours: dict[str, TorchLeaf], theirs: dict[str, FlaxLeaf]) -> Match:
    """Match parameters and buffers outside of layers with a rule: the same name, shape and layout."""
    moves: list[Move] = []
    faults: list[Fault] = []
    for name, leaf in ours.items():
        place = theirs.get(name)
        if place is None or leaf.owners:
            faults.append(unexpected_fault(leaf, torch_node))
            continue
        fault = misfit(Entry(name, name, collection=place.collection), torch_node, [leaf], [place])
        if fault is None:
            moves.append(Move((leaf.key,), (place.path,), Identity(), RAW, RAW))
        else:
            faults.append(fault)
    faults += missing_faults(leaf for name, leaf in theirs.items() if name not in ours)
    return Match(tuple(moves), faults=tuple(faults))


def unexpected_fault(leaf: TorchLeaf, node: TorchNode, why: str = "") -> Fault:
    """The fault of a torch tensor without a place."""
    shape = tuple(leaf.meta.shape)
    if node.moved and not why:
        why = (
            f", and '{next(iter(node.moved.values())).key}' is renamed on its own: rename the layer as a whole, "
            f'Rename("{join_path(node.origin)}", ...)'
        )
    return Fault(
        "unexpected",
        f"'{leaf.key}' {shape} of {node.where} has no place in the Flax tree{why}",
        join_path(node.origin),
        leaf.key,
    )


def _like(constant: Constant, torch_node: TorchNode, leaf: FlaxLeaf) -> Constant:
    """The constant, completed with the shape of its leaf and the dtype of the layer."""
    dtypes = (one.meta.dtype for one in torch_node.flat().values() if one.meta.dtype.is_floating_point)
    return replace(
        constant,
        shape=leaf.shape if constant.shape is None else constant.shape,
        dtype=constant.dtype or next(dtypes, None) or torch_dtype(leaf.dtype),
    )


def missing_faults(leaves: Iterable[FlaxLeaf]) -> list[Fault]:
    """A fault for each leaf that needs a source and has none."""
    return [missing_fault(leaf) for leaf in leaves if not leaf.optional]


def missing_fault(leaf: FlaxLeaf, why: str = "") -> Fault:
    """The fault of a Flax leaf without a source."""
    path = join_path(leaf.path)
    return Fault("missing", f"nothing on the torch side fills {leaf.shape} {leaf.dtype}{why}", path, path)


def _one_sided(
    entry: Entry,
    torch_node: TorchNode,
    flax_node: FlaxNode,
    torch_leaves: list[TorchLeaf],
    flax_leaves: list[FlaxLeaf],
) -> Iterable[Fault]:
    """The faults of an entry whose tensors or leaves are not all there."""
    if not torch_leaves and not flax_leaves:
        if not entry.optional:
            ours = f"{torch_node.where} has no '{entry.torch_names[0]}', and " if entry.torch_names else ""
            message = f"{ours}{flax_node.where} has no '{join_path(entry.flax_paths[0])}'"
            yield Fault("missing", message, join_path(torch_node.origin))
        return
    wanted = "', '".join(join_path(path) for path in entry.flax_paths)
    for leaf in torch_leaves:
        yield unexpected_fault(leaf, torch_node, f": {flax_node.where} has no '{wanted}'")
    for place in (leaf for leaf in flax_leaves if not leaf.optional):
        yield missing_fault(place, f": {torch_node.where} has no '{entry.torch_names[0]}'")


def misfit(
    entry: Entry, torch_node: TorchNode, torch_leaves: list[TorchLeaf], flax_leaves: list[FlaxLeaf]
) -> Fault | None:
    """The fault of tensors that do not become the leaves in the entry's layout; None if they do."""
    collection = entry.collection
    for leaf in flax_leaves if collection else ():
        if leaf.collection not in ("", collection):
            message = f"'{join_path(leaf.path)}' is in '{leaf.collection}', not in '{collection}'"
            return Fault("mismatch", message, join_path(torch_node.origin))
    metas = tuple([leaf.meta for leaf in torch_leaves])
    wanted = tuple([leaf.shape for leaf in flax_leaves])
    try:
        shapes = _shapes(entry.layout, metas)
        if shapes == wanted and (len(metas) == 1 or len({meta.dtype for meta in metas}) <= 1):
            return None
        fault = ""
    except (ValueError, RuntimeError) as err:
        shapes, fault = (), str(err)
    where = join_path(torch_node.origin)
    names = ", ".join(f"'{leaf.key}' {tuple(leaf.meta.shape)}" for leaf in torch_leaves)
    if fault:
        return Fault("mismatch", f"{names} cannot be laid out ({entry.layout}): {fault}", where)
    if shapes == wanted:
        return Fault("mismatch", f"{names} become one tensor, but their dtypes differ", where)
    places = ", ".join(f"'{join_path(leaf.path)}' {leaf.shape}" for leaf in flax_leaves)
    became = ", ".join(map(str, shapes))
    return Fault("mismatch", f"{names} would be {became} ({entry.layout}), but {places} is there", where)


def is_square(torch_leaves: Sequence[TorchLeaf], flax_leaves: Sequence[FlaxLeaf]) -> bool:
    """Whether a tensor, or its matrix, has the same shape on both sides, so that shapes do not show its layout."""
    ours = [tuple(leaf.meta.shape) for leaf in torch_leaves]
    theirs = [leaf.shape for leaf in flax_leaves]
    heads = len(ours) == len(theirs) == 1 and len(theirs[0]) > 2  # for a square matrix
    return ours == theirs or (heads and len(ours[0]) == 2 and ours[0][0] == ours[0][1])


@lru_cache(maxsize=4096)
def _shapes(layout: Layout, metas: tuple[torch.Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes that a layout gives. Cached: equal layers share their meta tensors."""
    return tuple(tuple(tensor.shape) for tensor in layout.forward(metas))
