"""The Flax side as a value: a tree of scopes with their leaves, and the function that fills it again.

Only holds what ``_read_nnx`` and ``_read_linen`` have read.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path

from ._node import Node

__all__ = ["FlaxLeaf", "FlaxNode", "FlaxTree", "FlaxTreeBuilder", "leaf_of", "leaves_of_a_run"]


class FlaxLeaf(NamedTuple):
    """One array of the Flax side."""

    path: Path
    """The caller's path: for linen, with the collection in front."""
    collection: str
    """linen's name for the kind of variable, also for nnx; empty where it is not known."""
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Any
    """The array; or a ``jax.ShapeDtypeStruct`` in an abstract template."""
    optional: bool = False
    """Whether it is a plain array of an nnx module and no variable: filled if torch has it, else kept."""
    holder: Any = None
    """The nnx variable or linen box that holds the value and may hold its sharding."""


@dataclass(eq=False)
class FlaxNode(Node):
    """One module of the Flax side.

    Attributes:
        path: Where it is, without the collection.
        kind: The name of its class: known in nnx, read from an automatic name in linen; else None.
        module: The live nnx module, or None.
        leaves: Its own arrays by name.
        children: Its submodules by name.
        one_of_many: Whether it is a stack of layers and stands for one of them.
    """

    path: Path
    kind: str | None = None
    module: Any = None
    leaves: dict[str, FlaxLeaf] = field(default_factory=dict)
    children: dict[str | int, "FlaxNode"] = field(default_factory=dict)
    one_of_many: bool = False

    def flat(self, prefix: Path = ()) -> dict[Path, FlaxLeaf]:
        """Every array at or below this node, by its path relative to the node."""
        found = {(*prefix, name): leaf for name, leaf in self.leaves.items()}
        for name, child in self.children.items():
            found |= child.flat((*prefix, name))
        return found

    @property
    def empty(self) -> bool:
        """Whether no array at or below this node must be filled."""
        own = all(leaf.optional for leaf in self.leaves.values())
        return own and all(child.empty for child in self.children.values())

    @property
    def where(self) -> str:
        """The dotted path, and the class where it is known."""
        return self._where(self.path, self.kind)


@dataclass(eq=False)
class FlaxTree:
    """The whole Flax side.

    Attributes:
        root: The tree of modules.
        flavour: ``"nnx"`` or ``"linen"``.
        kept: Leaves of a run (random streams, caches), taken from the template unchanged.
        seeded: Paths of random streams. `fill` seeds those of an abstract template.
        fill: Turns ``{path: array}`` into a new object of the kind that was read.
    """

    root: FlaxNode
    flavour: str
    kept: tuple[FlaxLeaf, ...]
    seeded: frozenset[Path]
    fill: Callable[[Mapping[Path, Any]], Any]

    def holes(self, filled: Container[Path]) -> list[Path]:
        """The leaves of an abstract template that would have no value if only these paths were filled."""
        return [
            leaf.path
            for leaf in (*self.root.flat().values(), *self.kept)
            if leaf.path not in filled
            and isinstance(leaf.value, jax.ShapeDtypeStruct)
            and leaf.path not in self.seeded
        ]


class FlaxTreeBuilder:
    """Makes the nodes of a tree as paths to them come up."""

    def __init__(self) -> None:
        self.root = FlaxNode(())
        self._known: dict[Path, FlaxNode] = {(): self.root}

    def node_at(self, path: Path) -> FlaxNode:
        """The node at a path, which is made if it is new.

        A state that was read from a file may have strings for integer keys: they are the same path.
        """
        node = self._known.get(path)
        if node is None:
            parent = self.node_at(path[:-1])
            name = path[-1]
            if isinstance(name, str) and name.isdecimal():
                name = int(name)
            node = parent.children.setdefault(name, FlaxNode((*parent.path, name)))
            self._known[path] = node
        return node


def leaves_of_a_run(path: Path, collection: str, value: Any) -> list[FlaxLeaf]:
    """The arrays of what belongs to a run: one, or those of a tree, as ``sow`` makes it."""
    return [
        leaf_of(path if one is value else (*path, place), collection, one)
        for place, one in enumerate(jax.tree.leaves(value))
        if hasattr(one, "shape") and hasattr(one, "dtype")
    ]


def leaf_of(path: Path, collection: str, value: Any) -> FlaxLeaf:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise PlanError(
            f"'{join_path(path)}' of the template is {what_kind(value)}, not an array "
            "or a jax.ShapeDtypeStruct."
        )
    return FlaxLeaf(path, collection, tuple(shape), dtype, value)
