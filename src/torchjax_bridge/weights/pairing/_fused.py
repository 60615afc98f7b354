"""Layers that one side keeps as one (`Fused`): matched as separate layers, moved as one tensor.

The caller's `Fused` names the layers and the order of their rows. For the matching, each part is a dense
layer of its own with a virtual tensor. The moves of all parts then become one move of the real tensors.
Without a `Fused`, ``_row_questions`` asks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from torch import nn

from torchjax_bridge.exchange import Path, join_path, split_path

from .._nearest import did_you_mean
from .._report import Fault
from ..layouts import Each, Identity, Inverse, Layout, Parallel, Rows, then
from ..rules import Fused, possible_axes
from ..trees import FlaxLeaf, FlaxNode, TorchLeaf, TorchNode
from ._bind import Match, Move

__all__ = ["rows_of", "split_fused"]

Bind = Callable[[TorchNode, FlaxNode], Match]


class _FusedTensors(NamedTuple):
    """Real tensors, and the virtual tensors that stand for them in the matching."""

    keys: tuple[str, ...]
    virtual: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class _Layer:
    """A dense layer of the torch side, by the names of its tensors."""

    node: TorchNode
    leaves: Mapping[str, TorchLeaf]

    @property
    def weight(self) -> TorchLeaf:
        return self.leaves["weight"]

    @property
    def is_linear(self) -> bool:
        return self.node.kind is not None and issubclass(self.node.kind, nn.Linear | nn.MultiheadAttention)


def split_fused(torch_node: TorchNode, flax_node: FlaxNode, bind: Bind) -> tuple[Match, TorchNode, FlaxNode]:
    """Match the fused layers of a module; returns the two nodes without them.

    Args:
        torch_node: A module with `Fused` rules.
        flax_node: Its partner.
        bind: Matches one layer with one scope.
    """
    parts: list[Match] = [Match(layers=((torch_node.origin, flax_node.path),))]
    ours, theirs = replace(torch_node, fused=()), flax_node
    for fused in torch_node.fused:
        try:
            pairs, joins = _parts_to_match(fused, torch_node, flax_node)
        except ValueError as err:
            fault = Fault("rules", f"{fused}: {err}", fused.module)
            return Match(faults=(fault,)), TorchNode(()), FlaxNode(())
        matches = [bind(part, scope) for part, scope in pairs]
        found = _moves_of_real_tensors(Match.of(matches), joins)
        # A layer that is fused in Flax alone has no torch layer with the same output to compare with.
        parts.append(found if isinstance(fused.torch, str) else found._replace(layers=()))
        for name in _as_tuple(fused.torch):
            ours = _without_layer(ours, name)
        for name in _as_tuple(fused.flax):
            theirs = _without_scope(theirs, split_path(name))
    return Match.of(parts), ours, theirs


def _parts_to_match(
    fused: Fused, torch_node: TorchNode, flax_node: FlaxNode
) -> tuple[list[tuple[TorchNode, FlaxNode]], list[_FusedTensors]]:
    """The pairs to match, and the real tensors that they stand for."""
    scopes = [_scope(flax_node, name) for name in _as_tuple(fused.flax)]
    layers = [_layer(torch_node, name) for name in _as_tuple(fused.torch)]
    heads = fused.heads or 1
    if isinstance(fused.torch, str):
        sizes, columns = _sizes(layers[0], scopes)
        rows = _rows(sizes, heads, columns)
        parts, joins = _split(layers[0], rows)
    else:
        _refuse_unequal(layers)
        rows = _rows(tuple(layer.weight.meta.shape[0] for layer in layers), heads)
        parts, joins = _concatenated(layers, rows)
    pairs = [(replace(part, path=scope.path), scope) for part, scope in zip(parts, scopes, strict=True)]
    return pairs, joins


def _rows(sizes: tuple[int, ...], heads: int, columns: bool = False) -> Rows:
    if any(size % heads for size in sizes):
        raise ValueError(f"{' and '.join(map(str, sizes))} rows do not divide into {heads} heads")
    return Rows(sizes, heads, columns)


def _moves_of_real_tensors(match: Match, joins: Sequence[_FusedTensors]) -> Match:
    """The moves of the virtual tensors as moves of the real tensors."""
    by_key = {move.torch_keys: move for move in match.moves}
    moves = []
    for join in joins:
        parts = [by_key[key,] for key in join.virtual if (key,) in by_key]
        if len(parts) == len(join.virtual):
            layouts = tuple(part.layout for part in parts)
            paths = tuple(path for part in parts for path in part.flax_paths)
            layout = then(join.layout, layouts[0] if len(layouts) == 1 else _side_by_side(layouts))
            moves.append(Move(join.keys, paths, layout, parts[0].rule, parts[0].layer, parts[0].note))
    return match._replace(moves=tuple(moves))


def _side_by_side(layouts: tuple[Layout, ...]) -> Layout:
    if all(layout == layouts[0] for layout in layouts):
        return Identity() if layouts[0] == Identity() else Each(layouts[0])
    return Parallel(layouts)


# --- the torch side -------------------------------------------------------------------------------------


def _layer(parent: TorchNode, name: str) -> _Layer:
    """The layer of this name, or the packed weights of an attention (``in_proj``)."""
    node: TorchNode | None = parent
    for step in split_path(name):
        node = node.children.get(step) if node is not None else None
    if node is not None:
        leaves = node.flat()
    else:
        names = {kind: f"{name}_{kind}" for kind in ("weight", "bias")}
        leaves = {kind: parent.leaves[full] for kind, full in names.items() if full in parent.leaves}
        node = parent
    if not leaves:
        raise ValueError(f"torch has no '{name}' there{did_you_mean(name, map(str, parent.children))}")
    if "weight" not in leaves or not leaves.keys() <= {"weight", "bias"} or leaves["weight"].meta.ndim != 2:
        raise ValueError(f"'{name}' is no dense layer, with a weight of 2 axes and perhaps a bias")
    return _Layer(node, leaves)


def _sizes(layer: _Layer, scopes: Sequence[FlaxNode]) -> tuple[tuple[int, ...], bool]:
    """The number of rows of each scope, and whether they are columns: whichever the Flax kernels fit."""
    shape = tuple(layer.weight.meta.shape)
    found = []
    for columns in (False, True):
        (rows, width) = shape[::-1] if columns else shape
        counts = [rows_of(scope, width) for scope in scopes]
        bias = layer.leaves.get("bias")
        fits = sum(count or 0 for count in counts) == rows and all(counts)
        if fits and (bias is None or tuple(bias.meta.shape) == (rows,)):
            found.append((tuple(count for count in counts if count), columns))
    if layer.is_linear:
        found = [one for one in found if not one[1]]
    if len(found) == 1:
        return found[0]
    where = layer.node.where
    kernels = ", ".join(f"'{join_path(scope.path)}' {_kernel(scope)}" for scope in scopes)
    if found:
        raise ValueError(
            f"{where} {shape} may hold them in its rows or in its columns; say "
            f'LayerType("{join_path(layer.node.origin)}", nn.Linear) if in its rows'
        )
    raise ValueError(f"the weight {shape} of {where} does not hold the rows of {kernels}")


def _split(layer: _Layer, rows: Rows) -> tuple[list[TorchNode], list[_FusedTensors]]:
    """Split a fused torch layer into virtual layers."""
    joins, parts = [], []
    count = len(rows.sizes)
    metas = {name: part.forward((leaf.meta,)) for name, leaf, part in _each(layer, rows)}
    for place in range(count):
        leaves = {
            name: TorchLeaf(f"{leaf.key}[{place}]", metas[name][place], metas[name][place])
            for name, leaf in layer.leaves.items()
        }
        parts.append(_virtual_layer(layer.node, leaves))
    for name, leaf, part in _each(layer, rows):
        virtual = tuple(one.leaves[name].key for one in parts)
        joins.append(_FusedTensors((leaf.key,), virtual, part if count > 1 or part.columns else Identity()))
    return parts, joins


def _each(layer: _Layer, rows: Rows) -> Iterable[tuple[str, TorchLeaf, Rows]]:
    for name, leaf in layer.leaves.items():
        yield name, leaf, replace(rows, columns=rows.columns and leaf.meta.ndim > 1)


def _concatenated(layers: Sequence[_Layer], rows: Rows) -> tuple[list[TorchNode], list[_FusedTensors]]:
    """Join several torch layers into one virtual layer."""
    leaves, joins = {}, []
    for name in layers[0].leaves:
        given = [layer.leaves[name] for layer in layers]
        keys = tuple(leaf.key for leaf in given)
        key, layout = " + ".join(keys), Inverse(rows)
        (meta,) = layout.forward([leaf.meta for leaf in given])
        leaves[name] = TorchLeaf(key, meta, meta)
        joins.append(_FusedTensors(keys, (key,), layout))
    return [_virtual_layer(layers[0].node, leaves)], joins


def _refuse_unequal(layers: Sequence[_Layer]) -> None:
    first, *others = layers
    for layer in layers:
        shape, kind = layer.weight.meta.shape, layer.node.kind
        if not layer.is_linear and (kind is not None or shape[0] == shape[1]):
            raise ValueError(
                f"{layer.node.where} is not known to be a Linear; say "
                f'LayerType("{join_path(layer.node.origin)}", nn.Linear) if it computes what that does'
            )
    for other in others:
        if other.leaves.keys() != first.leaves.keys():
            with_, without = (first, other) if "bias" in first.leaves else (other, first)
            raise ValueError(f"{with_.node.where} has a bias and {without.node.where} has none")
        if other.weight.meta.shape[1] != first.weight.meta.shape[1]:
            raise ValueError(f"{first.node.where} and {other.node.where} take inputs of different widths")


def _virtual_layer(node: TorchNode, leaves: dict[str, TorchLeaf]) -> TorchNode:
    """A virtual dense layer for a part of a layer, or for several layers. The order of its rows is declared."""
    linear = node.kind is not None and issubclass(node.kind, nn.Linear)
    return TorchNode(
        node.path,
        node.origin,
        node.kind if linear else nn.Linear,
        node.module if linear else None,
        leaves,
        features=node.features,
        declared=node.declared or not linear,
        told=node.told | {"output"},
    )


def _without_layer(node: TorchNode, name: str) -> TorchNode:
    first, *rest = split_path(name)
    if first in node.children:
        children = dict(node.children)
        child = children.pop(first)
        if rest:
            children[first] = _without_layer(child, join_path(rest))
        return replace(node, children=children)
    packed = {f"{name}_weight", f"{name}_bias"}
    if not packed & node.leaves.keys():
        return node
    leaves = {one: leaf for one, leaf in node.leaves.items() if one not in packed}
    return replace(node, leaves=leaves, kind=None, module=None)  # no longer complete for its class


# --- the Flax side --------------------------------------------------------------------------------------


def _scope(parent: FlaxNode, name: str) -> FlaxNode:
    node = parent
    for step in split_path(name):
        below = node.children.get(step)
        if below is None:
            raise ValueError(f"Flax has no '{name}' there{did_you_mean(str(step), map(str, node.children))}")
        node = below
    return node


def _without_scope(node: FlaxNode, path: Path) -> FlaxNode:
    first, *rest = path
    if first not in node.children:
        return node
    children = dict(node.children)
    child = children.pop(first)
    if rest:
        children[first] = _without_scope(child, tuple(rest))
    return replace(node, children=children)


def _kernel(scope: FlaxNode) -> tuple[int, ...]:
    return scope.leaves["kernel"].shape if "kernel" in scope.leaves else ()


def rows_of(scope: FlaxNode, width: int) -> int | None:
    """The number of rows of a layer of this width that fills a scope; None if no such layer fits."""
    kernel = _kernel(scope)
    rows, rest = divmod(prod(kernel), width) if width else (0, 0)
    bias: FlaxLeaf | None = scope.leaves.get("bias")
    if not kernel or rest or not possible_axes((rows, width), kernel, bias.shape if bias else None):
        return None
    return rows


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
