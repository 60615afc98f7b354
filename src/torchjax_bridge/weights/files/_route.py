"""Maps the leaves of one framework to leaves of the other, by a `Plan`, without reading values.

The plan needs only names, dtypes and shapes. Those of torch come from the file or from a module on the meta device,
those of Flax from an abstract template or from the file. A resulting leaf, when it is read, reads its sources and
converts them.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, jax_dtype, join_path, split_path

from .._example import Example
from .._plan import Plan, UserRule, make_plan
from .._report import Fault, Report
from ..layouts import Stack
from ..pairing import Move
from ..rules import Rename
from ..trees import FlaxTree, TorchTree, read_flax, read_torch, ties_of
from ._boxes import Box
from ._lay_out_box import forward_box, inverse_box
from ._leaf import Checkpoint, Leaf, nest
from ._match_template import match_template
from ._tied import conflicting_ties

__all__ = ["TORCH_ONLY", "by_model_name", "cast", "infer_flax_tree", "route_to_flax", "route_to_torch"]

TORCH_ONLY = "torchjax_bridge.torch_only"
"""The metadata entry of a Flax file for integers that Flax does not have (``num_batches_tracked``), as JSON."""


def route_to_flax(
    source: Checkpoint,
    model: nn.Module | None,
    template: Any,
    rules: Iterable[UserRule] = (),
    dtype: torch.dtype | None = None,
    example: Example | None = None,
) -> tuple[Plan, list[Leaf], dict[str, str]]:
    """The Flax leaves of a torch checkpoint.

    Args:
        source: The torch checkpoint.
        model: Its module, on the meta device or not; with None only the names are known.
        template: The Flax side.
        rules: As for `to_flax`.
        dtype: The dtype to which floating-point tensors will be cast, for the plan's notes.
        example: What the module takes, to run it.

    Returns:
        The plan with its faults, the leaves, and metadata for the conversion back.

    Raises:
        CheckpointError: The file does not fit the module.
    """
    tree, file_leaves = _torch_side(source, model, rules)
    plan = _plan(tree, read_flax(template), rules, dtype, example)
    leaves: list[Leaf] = []
    for move in plan.moves:
        sources = [file_leaves[key] for key in move.torch_keys]
        shapes = move.layout.forward([leaf.meta for leaf in sources])
        for index, (path, meta) in enumerate(zip(move.flax_paths, shapes, strict=True)):
            read = partial(_forward, move, sources, index)
            box = partial(forward_box, move.layout, sources, index) if _has_boxes(move, sources) else None
            shard = sources[0].shard if sources else ""
            leaves.append(
                Leaf(join_path(path), path, meta.dtype, tuple(meta.shape), read, shard, read_box=box)
            )
    return plan, leaves, _torch_only(plan, file_leaves)


def route_to_torch(
    source: Checkpoint,
    model: nn.Module,
    template: Any | None,
    rules: Iterable[UserRule] = (),
    dtype: torch.dtype | None = None,
    example: Example | None = None,
) -> tuple[Plan, list[Leaf]]:
    """The torch leaves of a Flax checkpoint, and the plan.

    Args:
        source: The Flax checkpoint.
        model: The torch side, on the meta device or not.
        template: Its Flax model; with None only the names are known.
        rules: As for `to_state_dict`.
        dtype: The dtype to which floating-point tensors will be cast, for the plan's notes.
        example: What the module takes, to run it.

    Raises:
        CheckpointError: The file does not fit the template, or a key of the module has no value.
    """
    tree = read_torch(model, _renames(rules))
    ties = ties_of(model)
    tree.ties.update({key: first for key, first in ties.items() if key in tree.state})
    flax_tree = read_flax(template) if template is not None else infer_flax_tree(source)
    file_leaves = match_template(source, flax_tree)
    for node in flax_tree.root.walk():  # plain arrays of the template that the file lacks
        node.leaves = {name: leaf for name, leaf in node.leaves.items() if leaf.path in file_leaves}
    dtypes = {path: leaf.dtype for path, leaf in file_leaves.items()}
    plan = _plan(tree, flax_tree, rules, dtype, example)
    torch_only = _read_torch_only(source)
    leaves: dict[str, Leaf] = {}
    for move in plan.moves:
        sources = [file_leaves[path] for path in move.flax_paths]
        shard = sources[0].shard if sources else ""
        for index, key in enumerate(move.torch_keys):
            dtype = dtypes[move.flax_paths[0]] if move.flax_paths else tree.state[key].dtype
            read = partial(_inverse, move, sources, index)
            box = partial(_inverse_box, move, sources, index) if _has_boxes(move, sources) else None
            shape = tuple(tree.state[key].shape)
            leaves[key] = Leaf(key, split_path(key), dtype, shape, read, shard, read_box=box)
    if plan.ok:
        faults = [*_tie_faults(leaves, tree.ties), *_not_invertible(plan.moves, file_leaves)]
        plan = replace(plan, report=Report(tuple(faults)))
    for key, twin in (*plan.ties, *(tie for tie in tree.ties.items() if set(tie) <= set(leaves))):
        leaves[key] = replace(leaves[twin], name=key, path=split_path(key), twin=twin)
    last = ""
    for key, value in tree.state.items():
        if key in leaves:
            last = leaves[key].shard
        elif isinstance(value, torch.Tensor) and not _is_unexpected(plan, key):
            leaves[key] = _kept_leaf(key, value, torch_only, last)
    return plan, [leaves[key] for key in tree.state if key in leaves]


def by_model_name(source: Checkpoint, model: nn.Module) -> dict[str, Leaf]:
    """The leaves of a torch checkpoint by their names in a module; a tied tensor has all of its names."""
    file = read_torch({name: leaf.meta for name, leaf in source.leaves.items()})
    found = _by_path(file, source.leaves)
    tree = read_torch(model)
    paths = {key: path for path, key in _by_path(tree, {key: key for key in tree.state}).items()}
    groups: dict[str, list[Path]] = {}
    for key, first in ties_of(model).items():
        if key in paths and first in paths:
            groups.setdefault(first, [paths[first]]).append(paths[key])
    for group in groups.values():
        leaf = next((found[path] for path in group if path in found), None)
        if leaf is not None:
            found = dict.fromkeys(group, leaf) | found
    return {join_path(path): replace(leaf, name=join_path(path), path=path) for path, leaf in found.items()}


def cast(leaf: Leaf, dtype: torch.dtype) -> Leaf:
    """The leaf in another floating-point dtype; other dtypes are not cast."""
    if not leaf.dtype.is_floating_point or leaf.dtype == dtype:
        return leaf
    read_box = None if leaf.read_box is None else lambda box: leaf.slice(box).to(dtype)
    return replace(leaf, dtype=dtype, read=lambda: leaf.read().to(dtype), read_box=read_box)


# --- the moves ---------------------------------------------------------------------------------------


def _forward(move: Move, sources: Sequence[Leaf], index: int) -> torch.Tensor:
    return move.layout.forward([leaf.read() for leaf in sources])[index]


def _has_boxes(move: Move, sources: Sequence[Leaf]) -> bool:
    """Whether a part costs less than the whole: of a view of memory maps it does not."""
    return isinstance(move.layout, Stack) or any(leaf.read_box for leaf in sources)


def _inverse(move: Move, sources: Sequence[Leaf], index: int) -> torch.Tensor:
    with _named(sources):
        return move.layout.inverse([leaf.read() for leaf in sources])[index]


def _inverse_box(move: Move, sources: Sequence[Leaf], index: int, box: Box) -> torch.Tensor:
    with _named(sources):
        return inverse_box(move.layout, sources, index, box)


@contextmanager
def _named(sources: Sequence[Leaf]) -> Iterator[None]:
    try:
        yield
    except ValueError as err:
        names = "', '".join(leaf.name for leaf in sources)
        raise CheckpointError(f"'{names}' cannot be converted to torch: {err}.") from err


def _kept_leaf(key: str, value: torch.Tensor, torch_only: Mapping[str, int], shard: str) -> Leaf:
    """A leaf that Flax does not have: from the file's metadata, from the module, or a counter at zero."""
    if key in torch_only and not value.dtype.is_floating_point:
        tensor = torch.full(value.shape, torch_only[key], dtype=value.dtype)
    elif not value.is_meta:
        tensor = value.detach()
    elif key.rpartition(".")[2] == "num_batches_tracked":
        tensor = torch.zeros(value.shape, dtype=value.dtype)
    else:
        raise CheckpointError(
            f"'{key}' has no source in the file, and the model, on the meta device, has no value to keep."
        )
    return Leaf(key, split_path(key), tensor.dtype, tuple(tensor.shape), lambda: tensor, shard)


def _tie_faults(leaves: Mapping[str, Leaf], ties: Mapping[str, str]) -> Iterator[Fault]:
    for key, first in conflicting_ties(leaves, ties):
        message = f"it is the same tensor as '{first}' in torch, but Flax holds two values"
        yield Fault("ambiguous", message, key, key)


def _not_invertible(moves: Iterable[Move], file_leaves: Mapping[Path, Leaf]) -> Iterator[Fault]:
    """Faults for leaves without a torch tensor whose values torch cannot represent."""
    for move in moves:
        if not move.torch_keys:
            try:
                move.layout.inverse([file_leaves[path].read() for path in move.flax_paths])
            except ValueError as err:
                names = ", ".join(map(join_path, move.flax_paths))
                yield Fault("mismatch", f"it cannot be converted to torch: {err}", names)


def _torch_only(plan: Plan, file_leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """The metadata entry for integers that Flax does not have."""
    found = {}
    for key in plan.torch_only:
        leaf = file_leaves.get(key)
        if leaf is not None and not leaf.dtype.is_floating_point and leaf.shape in ((), (1,)):
            found[key] = int(leaf.read().item())
    return {TORCH_ONLY: json.dumps(found)} if found else {}


def _read_torch_only(source: Checkpoint) -> dict[str, int]:
    if TORCH_ONLY not in source.metadata:
        return {}
    try:
        found = json.loads(source.metadata[TORCH_ONLY])
        return {str(key): int(value) for key, value in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{source.path}: the metadata entry {TORCH_ONLY!r} is damaged.") from err


# --- the two sides -----------------------------------------------------------------------------------


def _torch_side(
    source: Checkpoint, model: nn.Module | None, rules: Iterable[UserRule]
) -> tuple[TorchTree, dict[str, Leaf]]:
    """The torch tree, and the leaf of the file for each of its keys."""
    state = {name: leaf.meta for name, leaf in source.leaves.items()}
    file = read_torch(state, _renames(rules))
    twins = {name: leaf.twin for name, leaf in source.leaves.items() if leaf.twin}
    if model is None:
        return replace(file, ties=twins), dict(source.leaves)
    tree = read_torch(model, _renames(rules))
    by_path, notes = _by_path(file, source.leaves), file.notes
    keys = _by_path(tree, {key: key for key, value in tree.state.items() if isinstance(value, torch.Tensor)})
    if prefix := _common_prefix(by_path, keys):
        by_path = {path[len(prefix) :]: leaf for path, leaf in by_path.items()}
        notes = (*notes, f"looked through the prefix '{join_path(prefix)}.' of the keys")
    ties = {key: first for key, first in ties_of(model).items() if key in tree.state}
    paths = {key: path for path, key in keys.items()}
    file_leaves: dict[str, Leaf] = {}
    faults = []
    for key in keys.values():
        group = ties.get(key, key)  # safetensors' save_model writes only one name of a tied tensor
        names = [key, group, *(name for name, first in ties.items() if first == group)]
        leaf = next((by_path[paths[name]] for name in names if paths[name] in by_path), None)
        if leaf is None:
            faults.append(f"missing: {tuple(tree.state[key].shape)} @ {key}")
        elif leaf.shape != tuple(tree.state[key].shape):
            faults.append(
                f"mismatch: {leaf.shape} in the file, {tuple(tree.state[key].shape)} in the model @ {key}"
            )
        else:
            file_leaves[key] = leaf
    faults += [
        f"unexpected: {leaf.shape} @ {leaf.name}" for path, leaf in by_path.items() if path not in keys
    ]
    faults += [
        f"ambiguous: it is the same tensor as '{first}' in the model, but the file holds two values @ {key}"
        for key, first in conflicting_ties(file_leaves, ties)
    ]
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise CheckpointError(f"{source.path} does not fit the model:\n{lines}")
    for node in tree.root.walk():  # the dtypes are those of the file, not those of the module
        node.leaves = {
            name: leaf._replace(tensor=file_leaves[leaf.key].meta, meta=file_leaves[leaf.key].meta)
            for name, leaf in node.leaves.items()
        }
    others = {key: value for key, value in tree.state.items() if key not in file_leaves}
    full = {key: file_leaves[key].meta if key in file_leaves else others[key] for key in tree.state}
    return replace(
        tree, state=full, ties=ties, notes=tuple(dict.fromkeys((*notes, *tree.notes)))
    ), file_leaves


def _common_prefix(names: Iterable[Path], wanted: Iterable[Path]) -> Path:
    """The prefix of a file's names without which they match the names of a model; empty if there is none."""
    names, wanted = set(names), set(wanted)
    common = tuple(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False)))
    if names.isdisjoint(wanted):
        for depth in range(1, len(common) + 1):
            if not wanted.isdisjoint(path[depth:] for path in names):
                return tuple(column[0] for column in common[:depth])
    return ()


def _by_path(tree: TorchTree, values: Mapping[str, Any]) -> dict[Path, Any]:
    """Values by the path of their tensor without wrappers."""
    found = {}
    for node in tree.root.walk():
        for name, leaf in node.leaves.items():
            owner, local = leaf.owners[-1] if leaf.owners else (node, name)
            found[*owner.origin, local] = values[leaf.key]
    return found


def infer_flax_tree(source: Checkpoint) -> FlaxTree:
    """The Flax tree of the names of a file: linen variables if they have collections, otherwise nnx."""
    structs = {
        leaf.path: jax.ShapeDtypeStruct(leaf.shape, jax_dtype(leaf.dtype)) for leaf in source.leaves.values()
    }
    tree = nest(structs, source.path)
    if isinstance(tree.get("params"), dict) and all(isinstance(child, dict) for child in tree.values()):
        return read_flax(tree)
    return read_flax(nnx.State(tree))


def _plan(
    tree: TorchTree,
    flax_tree: FlaxTree,
    rules: Iterable[UserRule],
    dtype: torch.dtype | None,
    example: Example | None,
) -> Plan:
    with _with_x64():
        return make_plan(tree, flax_tree, tuple(rules), dtype, example)


@contextmanager
def _with_x64() -> Any:
    """64-bit dtypes are no fault here, because no JAX array is made."""
    with jax.enable_x64(True):
        yield


def _is_unexpected(plan: Plan, key: str) -> bool:
    return any(fault.subject == key for fault in plan.faults)


def _renames(rules: Iterable[UserRule]) -> tuple[Rename, ...]:
    return tuple(rule for rule in rules if isinstance(rule, Rename))
