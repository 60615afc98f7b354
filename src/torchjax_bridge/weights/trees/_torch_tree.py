"""The torch side, read once: a tree of layers with their classes, tensors, ties and original keys.

Reads an ``nn.Module`` or a bare ``state_dict``. Wrappers that only hold a module (``DataParallel``,
``torch.compile``, FSDP, averaging) are looked through, so paths are the ones of the model that was written;
the keys that a caller sees stay what they were. Refuses what is neither, and a checkpoint that still wraps
its ``state_dict``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path, split_path

from .._nearest import did_you_mean
from .._report import Fault, what_it_is
from ..rules import Fused, Rename
from ._node import Node
from ._ties import find_ties, ties_on_meta

__all__ = ["TorchLeaf", "TorchNode", "TorchTree", "read_torch"]

# Segments that wrapping a module puts into its keys, wherever the wrapped module sits.
_INFIXES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Likewise, but also a plausible attribute name: taken for a wrapper only where every key starts with it.
_PREFIXES = ("module",)


class TorchLeaf(NamedTuple):
    """One tensor of the torch side."""

    key: str
    """The key in the caller's own ``state_dict``."""
    tensor: torch.Tensor
    meta: torch.Tensor
    """The same shape and dtype without memory, to run a layout on."""
    owners: "tuple[tuple[TorchNode, str], ...]" = ()
    """Of a tensor that was renamed on its own: the modules it belongs to, outermost first, and its name in each."""


@dataclass(eq=False)
class TorchNode(Node):
    """One module of the torch side: what hangs under one dotted name.

    Attributes:
        path: Where it is matched: without wrappers, and renamed if the caller says so.
        origin: Where it is, without wrappers.
        kind: Its class; None in a bare ``state_dict`` that says nothing about it.
        module: The live module, or None.
        leaves: Its own tensors by name.
        children: Its submodules by name; the names in a ``Sequential`` or ``ModuleList`` are integers.
        moved: Its tensors that were renamed on their own, by their dotted names before; they are leaves elsewhere.
        features: The ``(C, H, W)`` whose flattening feeds this layer, where the caller said so.
        output: The ``(C, H, W)`` as which its output is viewed, where the caller said so.
        said: Whether the caller said which class it has, so that it computes what that class does.
        told: Of which of ``features`` and ``output`` the caller said something, if only that nothing changes.
        fused: What the caller said of layers in it that one side keeps as one.
    """

    path: Path
    origin: Path = ()
    kind: type | None = None
    module: nn.Module | None = None
    leaves: dict[str, TorchLeaf] = field(default_factory=dict)
    children: dict[str | int, "TorchNode"] = field(default_factory=dict)
    moved: dict[str, TorchLeaf] = field(default_factory=dict)
    features: tuple[int, ...] | None = None
    output: tuple[int, ...] | None = None
    said: bool = False
    told: frozenset[str] = frozenset()
    fused: tuple[Fused, ...] = ()

    def flat(self, prefix: str = "") -> dict[str, TorchLeaf]:
        """Every tensor at or below this node, by its dotted name relative to the node."""
        found = {prefix + name: leaf for name, leaf in self.leaves.items()}
        for name, child in self.children.items():
            found |= child.flat(f"{prefix}{name}.")
        return found

    def names(self) -> frozenset[str]:
        """The dotted names of every tensor at or below this node, those that were renamed on their own included."""
        return frozenset(self.flat()).union(self.moved)

    @property
    def where(self) -> str:
        """The dotted path, and the class where it is known."""
        return self._where(self.origin, self.kind.__name__ if self.kind else None)


@dataclass(eq=False)
class TorchTree:
    """The whole torch side.

    Attributes:
        root: The tree of modules.
        state: The caller's ``state_dict``, in its own order, with its own keys.
        ties: For a key whose tensor is the very same memory as an earlier key's: that earlier key.
        others: Keys whose value is no tensor (a module's extra state); they never cross.
        notes: What was looked through while reading.
        faults: Renames that send two tensors to one place, or match nothing.
        module: The live module, or None.
        targets: The places that renames name, and the first rename that names each.
    """

    root: TorchNode
    state: dict[str, Any]
    ties: dict[str, str]
    others: tuple[str, ...]
    notes: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    module: nn.Module | None = None
    targets: dict[Path, Rename] = field(default_factory=dict)

    def is_buffer(self, key: str) -> bool | None:
        """Whether a key is a buffer's, not a parameter's; None where no live module tells."""
        return None if self.module is None else key in self._buffers

    @cached_property
    def _buffers(self) -> frozenset[str]:
        named = self.module.named_buffers(remove_duplicate=False) if self.module is not None else ()
        return frozenset(name for name, _ in named)

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        tensors = (value for value in self.state.values() if isinstance(value, torch.Tensor))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))


def read_torch(source: Any, renames: Sequence[Rename] = ()) -> TorchTree:
    """Read an ``nn.Module`` or a ``state_dict``.

    Args:
        source: The module or the mapping from dotted keys to tensors.
        renames: Names that the other side calls otherwise; the first that speaks of a path decides.

    Raises:
        PlanError: It is neither of the two.
    """
    if isinstance(source, nn.Module):
        modules = dict(source.named_modules(remove_duplicate=False))
        state = dict(source.state_dict())
        peel, notes = _peel_modules(modules)
    elif isinstance(source, Mapping):
        modules = {}
        state = dict(source)
        _refuse_what_is_no_state_dict(state)
        peel, notes = _peel_keys(state)
    else:
        raise PlanError(
            f"{what_it_is(source)} is no source of torch weights: pass an instance of nn.Module or its "
            "state_dict()."
        )
    change = _Renaming(renames)
    scopes = _Scopes()
    for name, module in modules.items():
        path = peel(split_path(name))
        if path is not None:
            node = scopes.at(change(path))
            node.kind, node.module, node.origin = _class_of(module), module, path
    others, faults = [], []
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            others.append(key)
            continue
        if is_lazy(tensor):
            raise PlanError(
                f"'{key}' has no shape yet: it belongs to a lazy module. Call the module once on an example input."
            )
        path = peel(split_path(key))
        if path is None:  # a counter that a wrapper keeps for itself
            others.append(key)
            continue
        place, home = change(path), change(path[:-1])
        alone = place != (*home, path[-1])
        node, name = scopes.at(place[:-1]), str(place[-1])
        for where in (home,) if alone else (place[:-1],):
            if not (one := scopes.at(where)).leaves and one.module is None:
                scopes.say_origin(where, path[:-1])
        if name in node.leaves:
            message = f"'{key}' and '{node.leaves[name].key}' are both renamed to this"
            faults.append(Fault("rules", message, join_path(place), key))
            continue
        bare = tensor.detach() if tensor.requires_grad else tensor
        leaf = TorchLeaf(key, bare, _meta(tensor.shape, tensor.dtype))
        if alone:
            depths = range(len(path))
            owners = [(scopes.at(change(path[:depth])), join_path(path[depth:])) for depth in depths]
            leaf = leaf._replace(owners=tuple(owners))
            for owner, local in owners:
                owner.moved[local] = leaf
        node.leaves[name] = leaf
    scopes.move_whole_layers()
    faults += change.unused()
    live = source if isinstance(source, nn.Module) else None
    ties = find_ties(state) | (ties_on_meta(live, state) if live is not None else {})
    return TorchTree(scopes.root, state, ties, tuple(others), notes, tuple(faults), live, change.targets)


@lru_cache(maxsize=4096)
def _meta(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    # Shared by all tensors of this shape: nothing can be written to it.
    return torch.empty(shape, dtype=dtype, device="meta")


class _Renaming:
    """Applies the caller's renames and knows which of them found nothing."""

    def __init__(self, renames: Sequence[Rename]) -> None:
        self._renames = renames
        self._used: set[Rename] = set()
        self._too_late: dict[Rename, Rename] = {}  # what matches only where an earlier one does
        self._known: dict[Path, Path] = {}
        self.targets: dict[Path, Rename] = {}  # the places that are named, and by which

    def __call__(self, path: Path) -> Path:
        if path not in self._known:
            self._known[path] = self._change(path) if self._renames else path
        return self._known[path]

    def _change(self, path: Path) -> Path:
        for place, rename in enumerate(self._renames):
            new = rename.apply(path)
            if new is not None:
                self._used.add(rename)
                below = len(path) - len(split_path(rename.torch))
                self.targets.setdefault(new[: len(new) - below], rename)
                for later in self._renames[place + 1 :]:
                    if later.apply(path) is not None:
                        self._too_late.setdefault(later, rename)
                return new
        return path

    def unused(self) -> list[Fault]:
        return [Fault("rules", self._why(one), one.torch) for one in self._renames if one not in self._used]

    def _why(self, rename: Rename) -> str:
        if before := self._too_late.get(rename):
            return f"{rename} comes to nothing behind {before}, which speaks of the same: put it first"
        names = {join_path(path[: depth + 1]) for path in self._known for depth in range(len(path))}
        return f"{rename} matches nothing on the torch side{did_you_mean(rename.torch, sorted(names))}"


class _Scopes:
    """The tree of modules as it grows."""

    def __init__(self) -> None:
        self.root = TorchNode(())
        self._known: dict[Path, TorchNode] = {(): self.root}
        self._said: dict[Path, Path] = {}

    def at(self, path: Path) -> TorchNode:
        """The node at a path, made if it is new."""
        node = self._known.get(path)
        if node is None:
            node = self._known[path] = TorchNode(path, path)
            self.at(path[:-1]).children[path[-1]] = node
        return node

    def say_origin(self, place: Path, origin: Path) -> None:
        """Where a node is that has no module to tell, and with it what holds it, up to where the names differ."""
        while place and origin and (node := self.at(place)).module is None:
            if self._said.setdefault(place, origin) != origin:
                node.origin = place  # renaming brought together what was not
                return
            node.origin = origin
            if place[-1] != origin[-1]:
                return
            place, origin = place[:-1], origin[:-1]

    def move_whole_layers(self) -> None:
        """Where a pattern (``Rename("fc.*", "head.*")``) renamed all that a layer holds, the layer went along."""
        for node in list(self._known.values()):
            strangers = [leaf for leaf in node.leaves.values() if leaf.owners]
            if not strangers or node.module is not None:
                continue
            owner, _ = strangers[0].owners[-1]
            as_before = all(
                leaf.owners and leaf.owners[-1] == (owner, name) for name, leaf in node.leaves.items()
            )
            if as_before and owner.empty and owner is not node:
                node.kind, node.module, node.origin = owner.kind, owner.module, owner.origin
                owner.kind = owner.module = None
                for leaf in strangers:
                    for one, name in leaf.owners:
                        del one.moved[name]
                node.leaves = {name: leaf._replace(owners=()) for name, leaf in node.leaves.items()}


def _class_of(module: nn.Module) -> type:
    """The class that was written, not the one a parametrization put in its place."""
    kind = type(module)
    # hasattr would go through nn.Module's own __getattr__, which is dear where it finds nothing.
    if kind.__module__ == "torch.nn.utils.parametrize" or "parametrizations" in module._modules:
        return kind.__mro__[1]
    return kind


# --- wrappers ----------------------------------------------------------------------------------------


def _peel_modules(modules: dict[str, nn.Module]) -> tuple[Any, tuple[str, ...]]:
    """A function from a raw path to the path without wrappers, by the wrappers' classes."""
    seen: dict[str, str] = {}
    outer: set[Path] = set()  # the paths of the attribute through which a wrapper holds its module
    own: set[Path] = set()  # the paths of the wrappers themselves
    for name, module in modules.items():
        for attribute in (*_INFIXES, *_PREFIXES):
            if attribute in module._modules and _is_wrapper(module, attribute):
                path = split_path(name)
                own.add(path)
                outer.add((*path, attribute))
                seen[attribute] = type(module).__name__

    def peel(path: Path) -> Path | None:
        if not own:
            return path
        kept = tuple(part for depth, part in enumerate(path) if path[: depth + 1] not in outer)
        wraps = path in own or (path[:-1] in own and path not in outer)
        return None if wraps else kept

    notes = tuple(f"looked through {kind} ('{attribute}.')" for attribute, kind in seen.items())
    return peel, notes


def _is_wrapper(module: nn.Module, attribute: str) -> bool:
    if attribute in _INFIXES:
        return True
    kind = type(module)
    return len(module._modules) == 1 and kind.__module__.startswith("torch.")


def _peel_keys(state: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The same by the keys alone: a prefix is peeled only where every tensor's key has it."""
    paths = [split_path(key) for key, value in state.items() if isinstance(value, torch.Tensor)]
    infixes: set[str | int] = {part for path in paths for part in path if part in _INFIXES}
    counters = {path for path in paths if path == ("n_averaged",)}
    bare = [_without(path, infixes) for path in paths if path not in counters]
    depth = 0
    while bare and all(len(path) > depth + 1 and path[depth] in _PREFIXES for path in bare):
        depth += 1
    peeled = depth > 0

    def peel(path: Path) -> Path | None:
        if peeled and path in counters:
            return None
        return _without(path, infixes)[depth:] if path not in counters else path

    found = sorted(str(part) for part in infixes) + ["module"] * depth
    return peel, tuple(f"looked through the prefix '{part}.' of the keys" for part in found)


def _without(path: Path, parts: Iterable[str | int]) -> Path:
    return tuple(part for part in path if part not in parts)


def _refuse_what_is_no_state_dict(state: dict[str, Any]) -> None:
    inner = [
        key
        for key, value in state.items()
        if isinstance(value, nn.Module)
        or (isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values()))
    ]
    if inner and not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise PlanError(
            f"this mapping holds its weights one level down, beside {len(state) - 1} other entries: pass "
            f"source[{inner[0]!r}] instead."
        )
    if not state:
        raise PlanError("the state_dict is empty: there is nothing to convert.")
    for key, value in state.items():
        if not isinstance(key, str):
            raise PlanError(f"{key!r} is no key of a state_dict: keys are dotted strings.")
        if not isinstance(value, torch.Tensor) and not key.endswith("_extra_state"):
            raise PlanError(
                f"'{key}' is a {type(value).__name__}, not a torch.Tensor: pass a state_dict of tensors "
                "(to_torch converts a tree of JAX arrays)."
            )
