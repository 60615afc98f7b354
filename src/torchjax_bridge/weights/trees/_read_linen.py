"""Reads linen variables into a `FlaxTree`, and fills them again: collections, boxes, automatic names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax import core
from flax.core import meta

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path

from ._flax_tree import FlaxNode, FlaxTree, FlaxTreeBuilder, leaf_of, leaves_of_a_run

__all__ = ["read_linen"]

# Collections that belong to a run, not to the trained weights.
_RUN_COLLECTIONS = frozenset({"cache", "intermediates", "perturbations", "rngs"})

# What flax writes before the class name of a lifted module (nn.remat, nn.vmap, nn.scan, nn.jit).
_LIFTED = re.compile(r"^(?:Checkpoint|Remat|Vmap|Scan|Jit)+(?=[A-Z])")
_AUTO_NAME = re.compile(r"^([A-Z]\w*?)_(\d+)$")


def read_linen(variables: Mapping[str, Any]) -> FlaxTree:
    if not variables:
        raise PlanError("the variables are empty: pass what the linen module's init gives.")
    if not all(isinstance(tree, Mapping) for tree in variables.values()):
        raise PlanError(
            "linen variables are collections such as {'params': {...}, 'batch_stats': {...}}: "
            "wrap a bare parameter tree as {'params': tree}."
        )
    if not {"params", "batch_stats"} & set(variables):
        raise PlanError(
            f"these variables have the collections {sorted(map(str, variables))} and no 'params': wrap a "
            "bare parameter tree as {'params': tree}. If it is a pure dict of nnx, which does not say what is a "
            "parameter, pass nnx.state(model), filled from it with nnx.replace_by_pure_dict."
        )
    builder = FlaxTreeBuilder()
    root = builder.root
    kept = []
    boxes: dict[Path, Any] = {}
    for collection, tree in variables.items():
        for path, box in _linen_leaves(tree, ()):
            full = (collection, *path)
            boxes[full] = box
            if collection in _RUN_COLLECTIONS:
                kept += leaves_of_a_run(full, collection, _unboxed(box))
                continue
            leaf = leaf_of(full, collection, _unboxed(box))._replace(holder=box)
            node = builder.node_at(path[:-1])
            name = str(path[-1])
            node.leaves[name if name not in node.leaves else f"{collection}:{name}"] = leaf
    for node in root.walk():
        if node.path:
            node.kind = _kind_from_name(str(node.path[-1]))
    _move_to_their_layer(root, root)

    def fill(values: Mapping[Path, Any]) -> Any:
        def put(tree: Any, path: Path) -> Any:
            if isinstance(tree, Mapping):
                return {name: put(child, (*path, name)) for name, child in tree.items()}
            if path not in values:
                return tree
            return _reboxed(tree, values[path])

        filled = put(variables, ())
        return core.freeze(filled) if isinstance(variables, core.FrozenDict) else filled

    return FlaxTree(root, "linen", tuple(kept), frozenset(), fill)


def _move_to_their_layer(node: FlaxNode, parent: FlaxNode) -> None:
    """Move leaves that a wrapper holds for a layer to that layer.

    linen's ``WeightNorm`` and ``SpectralNorm`` keep leaves such as ``layer/kernel/scale``, slashes included, in
    their own scope. The layer is below or beside that scope, and gets them as ``kernel/scale``.
    """
    for child in node.children.values():
        _move_to_their_layer(child, node)
    for name in [name for name in node.leaves if "/" in name]:
        for home in (node, parent):
            first, *rest = name.split("/")
            while first in home.children and rest:
                home, (first, *rest) = home.children[first], rest
            if rest and first in home.leaves:
                home.leaves["/".join((first, *rest))] = node.leaves.pop(name)
                break


def _linen_leaves(tree: Any, path: Path) -> Iterable[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _linen_leaves(child, (*path, name))
    else:
        yield path, tree


def _unboxed(box: Any) -> Any:
    """The value without its box. Sharding constraints are not applied here, only to the result."""
    if isinstance(box, meta.Partitioned):
        return _unboxed(box.unbox(apply_constraint=False))
    return meta.unbox(box)


def _reboxed(box: Any, value: Any) -> Any:
    if isinstance(box, meta.Partitioned):
        return box.replace_boxed(_reboxed(box.unbox(apply_constraint=False), value))
    return meta.replace_boxed(box, value)


def _kind_from_name(name: str) -> str | None:
    found = _AUTO_NAME.match(name)
    return _LIFTED.sub("", found.group(1)) if found else None
