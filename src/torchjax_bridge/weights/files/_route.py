"""From the leaves of one framework to the leaves of the other, by a `Plan`, with no value moved.

The plan is made from specifications alone: the torch side from the file's header or a module on the meta device,
the Flax side from a template of ``jax.ShapeDtypeStruct`` or the file. What comes out are leaves that, when read,
read their sources and lay them out.
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

from .._plan import Plan, UserRule, make_plan
from .._report import Fault, Report
from ..pairing import Move
from ..rules import Rename
from ..trees import FlaxTree, TorchTree, read_flax, read_torch, ties_of
from ._flax_leaves import flax_leaves
from ._leaf import Checkpoint, Leaf, nest
from ._tied import parted

__all__ = ["STAYED", "cast", "flax_side", "route_to_flax", "route_to_torch", "under_model"]

STAYED = "torchjax_bridge.torch_only"
"""Where a Flax file keeps the small integers that have no image in Flax (``num_batches_tracked``), as JSON."""


def route_to_flax(
    source: Checkpoint,
    model: nn.Module | None,
    template: Any,
    rules: Iterable[UserRule] = (),
    dtype: torch.dtype | None = None,
) -> tuple[Plan, list[Leaf], dict[str, str]]:
    """What the leaves of a torch checkpoint become.

    Args:
        source: Torch leaves.
        model: The module they belong to, on the meta device or not; None where the names must do.
        template: The Flax side.
        rules: As for `to_flax`.
        dtype: What floating-point tensors will be cast to, for the plan to say.

    Returns:
        The plan, with its faults; the leaves; and notes for the way back.

    Raises:
        CheckpointError: The file is not the module's.
    """
    tree, files = _torch_side(source, model, rules)
    plan = _plan(tree, read_flax(template), rules, dtype)
    leaves: list[Leaf] = []
    for move in plan.moves:
        sources = [files[key] for key in move.torch_keys]
        shapes = move.layout.forward([leaf.meta for leaf in sources])
        for place, (path, meta) in enumerate(zip(move.flax_paths, shapes, strict=True)):
            read = partial(_forward, move, sources, place)
            shard = sources[0].shard if sources else ""
            leaves.append(Leaf(join_path(path), path, meta.dtype, tuple(meta.shape), read, shard))
    return plan, leaves, _stayed(plan, files)


def route_to_torch(
    source: Checkpoint,
    model: nn.Module,
    template: Any | None,
    rules: Iterable[UserRule] = (),
    dtype: torch.dtype | None = None,
) -> tuple[Plan, list[Leaf]]:
    """What the leaves of a Flax checkpoint become.

    Args:
        source: Flax leaves.
        model: The torch side, on the meta device or not.
        template: The Flax model they belong to; None where the names must do.
        rules: As for `to_state_dict`.
        dtype: What floating-point tensors will be cast to, for the plan to say.

    Raises:
        CheckpointError: The file is not the template's, or a key of the module has no value.
    """
    tree = read_torch(model, _renames(rules))
    ties = ties_of(model)
    tree.ties.update({key: first for key, first in ties.items() if key in tree.state})
    flax_tree = read_flax(template) if template is not None else flax_side(source)
    files = flax_leaves(source, flax_tree)
    for node in flax_tree.root.walk():  # plain arrays of the template that the file lacks
        node.leaves = {name: leaf for name, leaf in node.leaves.items() if leaf.path in files}
    dtypes = {path: leaf.dtype for path, leaf in files.items()}
    plan = _plan(tree, flax_tree, rules, dtype)
    stayed = _read_stayed(source)
    leaves: dict[str, Leaf] = {}
    for move in plan.moves:
        sources = [files[path] for path in move.flax_paths]
        shard = sources[0].shard if sources else ""
        for place, key in enumerate(move.torch_keys):
            dtype = dtypes[move.flax_paths[0]] if move.flax_paths else tree.state[key].dtype
            read = partial(_inverse, move, sources, place)
            leaves[key] = Leaf(key, split_path(key), dtype, tuple(tree.state[key].shape), read, shard)
    if plan.ok:
        faults = [*_parted(leaves, tree.ties), *_lost(plan.moves, files)]
        plan = replace(plan, report=Report(tuple(faults)))
    for key, twin in (*plan.ties, *(tie for tie in tree.ties.items() if set(tie) <= set(leaves))):
        leaves[key] = replace(leaves[twin], name=key, path=split_path(key), twin=twin)
    last = ""
    for key, value in tree.state.items():
        if key in leaves:
            last = leaves[key].shard
        elif isinstance(value, torch.Tensor) and not _is_unexpected(plan, key):
            leaves[key] = _kept(key, value, stayed, last)
    return plan, [leaves[key] for key in tree.state if key in leaves]


def under_model(source: Checkpoint, model: nn.Module) -> dict[str, Leaf]:
    """The leaves of a torch checkpoint by their names in a module; what is tied there has all of its names."""
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
    """The leaf in another floating-point dtype; integers and the like stay what they are."""
    if not leaf.dtype.is_floating_point or leaf.dtype == dtype:
        return leaf
    return replace(leaf, dtype=dtype, read=lambda: leaf.read().to(dtype))


# --- the moves ---------------------------------------------------------------------------------------


def _forward(move: Move, sources: Sequence[Leaf], place: int) -> torch.Tensor:
    return move.layout.forward([leaf.read() for leaf in sources])[place]


def _inverse(move: Move, sources: Sequence[Leaf], place: int) -> torch.Tensor:
    try:
        return move.layout.inverse([leaf.read() for leaf in sources])[place]
    except ValueError as err:
        names = "', '".join(leaf.name for leaf in sources)
        raise CheckpointError(f"'{names}' cannot go back to torch: {err}.") from err


def _kept(key: str, value: torch.Tensor, stayed: Mapping[str, int], shard: str) -> Leaf:
    """A key that has no image in Flax: as the file noted it, as the module has it, or a counter at zero."""
    if key in stayed and not value.dtype.is_floating_point:
        tensor = torch.full(value.shape, stayed[key], dtype=value.dtype)
    elif not value.is_meta:
        tensor = value.detach()
    elif key.rpartition(".")[2] == "num_batches_tracked":
        tensor = torch.zeros(value.shape, dtype=value.dtype)
    else:
        raise CheckpointError(
            f"'{key}' has no source in the file, and the model is on the meta device and has no value to keep."
        )
    return Leaf(key, split_path(key), tensor.dtype, tuple(tensor.shape), lambda: tensor, shard)


def _parted(leaves: Mapping[str, Leaf], ties: Mapping[str, str]) -> Iterator[Fault]:
    for key, first in parted(leaves, ties):
        message = f"it is the same tensor as '{first}' in torch, but Flax holds two values"
        yield Fault("ambiguous", message, key, key)


def _lost(moves: Iterable[Move], files: Mapping[Path, Leaf]) -> Iterator[Fault]:
    """Leaves that torch has not and that are no longer what they would have to be."""
    for move in moves:
        if not move.torch_keys:
            try:
                move.layout.inverse([files[path].read() for path in move.flax_paths])
            except ValueError as err:
                names = ", ".join(map(join_path, move.flax_paths))
                yield Fault("mismatch", f"it cannot go back to torch: {err}", names)


def _stayed(plan: Plan, files: Mapping[str, Leaf]) -> dict[str, str]:
    """The counters that stay in torch, as a note."""
    found = {}
    for key in plan.torch_only:
        leaf = files.get(key)
        if leaf is not None and not leaf.dtype.is_floating_point and leaf.shape in ((), (1,)):
            found[key] = int(leaf.read().item())
    return {STAYED: json.dumps(found)} if found else {}


def _read_stayed(source: Checkpoint) -> dict[str, int]:
    if STAYED not in source.metadata:
        return {}
    try:
        found = json.loads(source.metadata[STAYED])
        return {str(key): int(value) for key, value in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{source.path}: the metadata entry {STAYED!r} is damaged.") from err


# --- the two sides, from specifications --------------------------------------------------------------


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
    by_path, looked_through = _by_path(file, source.leaves), file.notes
    keys = _by_path(tree, {key: key for key, value in tree.state.items() if isinstance(value, torch.Tensor)})
    if prefix := _prefix(by_path, keys):
        by_path = {path[len(prefix) :]: leaf for path, leaf in by_path.items()}
        looked_through = (*looked_through, f"looked through the prefix '{join_path(prefix)}.' of the keys")
    ties = {key: first for key, first in ties_of(model).items() if key in tree.state}
    paths = {key: path for path, key in keys.items()}
    files: dict[str, Leaf] = {}
    faults = []
    for key in keys.values():
        group = ties.get(key, key)  # safetensors' save_model keeps only one name of a tied tensor
        names = [key, group, *(name for name, first in ties.items() if first == group)]
        leaf = next((by_path[paths[name]] for name in names if paths[name] in by_path), None)
        if leaf is None:
            faults.append(f"missing: {tuple(tree.state[key].shape)} @ {key}")
        elif leaf.shape != tuple(tree.state[key].shape):
            faults.append(
                f"mismatch: {leaf.shape} in the file, {tuple(tree.state[key].shape)} in the model @ {key}"
            )
        else:
            files[key] = leaf
    faults += [
        f"unexpected: {leaf.shape} @ {leaf.name}" for path, leaf in by_path.items() if path not in keys
    ]
    faults += [
        f"ambiguous: it is the same tensor as '{first}' in the model, but the file holds two values @ {key}"
        for key, first in parted(files, ties)
    ]
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise CheckpointError(f"{source.path} does not fit the model:\n{lines}")
    for node in tree.root.walk():  # the dtypes are the file's, whatever the module was built with
        node.leaves = {
            name: leaf._replace(tensor=files[leaf.key].meta, meta=files[leaf.key].meta)
            for name, leaf in node.leaves.items()
        }
    others = {key: value for key, value in tree.state.items() if key not in files}
    full = {key: files[key].meta if key in files else others[key] for key in tree.state}
    notes = tuple(dict.fromkeys((*looked_through, *tree.notes)))
    return replace(tree, state=full, ties=ties, notes=notes), files


def _prefix(names: Iterable[Path], wanted: Iterable[Path]) -> Path:
    """The segments before all names of a file without which they are those of a model; empty if there are none."""
    names, wanted = set(names), set(wanted)
    common = tuple(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False)))
    if names.isdisjoint(wanted):
        for depth in range(1, len(common) + 1):
            if not wanted.isdisjoint(path[depth:] for path in names):
                return tuple(column[0] for column in common[:depth])
    return ()


def _by_path(tree: TorchTree, values: Mapping[str, Any]) -> dict[Path, Any]:
    """Values by where their tensor is without wrappers."""
    found = {}
    for node in tree.root.walk():
        for name, leaf in node.leaves.items():
            owner, local = leaf.owners[-1] if leaf.owners else (node, name)
            found[*owner.origin, local] = values[leaf.key]
    return found


def flax_side(source: Checkpoint) -> FlaxTree:
    """The Flax tree that the names of a file spell out: linen variables if they have collections, else nnx."""
    structs = {
        leaf.path: jax.ShapeDtypeStruct(leaf.shape, jax_dtype(leaf.dtype)) for leaf in source.leaves.values()
    }
    tree = nest(structs, source.path)
    if isinstance(tree.get("params"), dict) and all(isinstance(child, dict) for child in tree.values()):
        return read_flax(tree)
    return read_flax(nnx.State(tree))


def _plan(tree: TorchTree, flax_tree: FlaxTree, rules: Iterable[UserRule], dtype: torch.dtype | None) -> Plan:
    with _files_hold_64_bits():
        return make_plan(tree, flax_tree, tuple(rules), dtype)


@contextmanager
def _files_hold_64_bits() -> Any:
    """No array of JAX is made here, so what JAX may hold is no fault of the plan."""
    with jax.enable_x64(True):
        yield


def _is_unexpected(plan: Plan, key: str) -> bool:
    return any(fault.subject == key for fault in plan.faults)


def _renames(rules: Iterable[UserRule]) -> tuple[Rename, ...]:
    return tuple(rule for rule in rules if isinstance(rule, Rename))
