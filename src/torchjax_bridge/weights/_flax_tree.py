"""The Flax side, read once: a tree of scopes with their leaves, and how to fill it again.

Reads an ``nnx.Module`` (concrete or abstract), an ``nnx.State`` or linen variables, and rebuilds the same
kind of thing with other values, leaving the one it read untouched. Checks nothing about names and shapes:
that is done by the plan, before anything is built.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, nnx
from flax.core import meta

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path

__all__ = ["FlaxLeaf", "FlaxNode", "FlaxTree", "read_flax"]

# Collections and variables that belong to a run, not to the trained weights.
_RUN_COLLECTIONS = frozenset({"cache", "intermediates", "perturbations", "rngs"})
_RUN_VARIABLES = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)

# What flax writes before the class name of a lifted module (nn.remat, nn.vmap, nn.scan).
_LIFTED = re.compile(r"^(?:Checkpoint|Remat|Vmap|Scan)+(?=[A-Z])")
_AUTO_NAME = re.compile(r"^([A-Z]\w*?)_(\d+)$")


@dataclass(frozen=True)
class FlaxLeaf:
    """One array of the Flax side."""

    path: Path
    """As the caller finds it: with the collection in front for linen."""
    collection: str
    """linen's name for it, also where nnx has a variable type instead; empty where nothing tells."""
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Any
    """The array; or a ``jax.ShapeDtypeStruct`` in an abstract template."""


@dataclass(eq=False)
class FlaxNode:
    """One module of the Flax side.

    Attributes:
        path: Where it is, without the collection.
        kind: The name of its class, where it is known (nnx) or an automatic name tells it (linen).
        module: The live nnx module, or None.
        leaves: Its own arrays by name.
        children: Its submodules by name.
    """

    path: Path
    kind: str | None = None
    module: Any = None
    leaves: dict[str, FlaxLeaf] = field(default_factory=dict)
    children: dict[str | int, "FlaxNode"] = field(default_factory=dict)

    def flat(self, prefix: Path = ()) -> dict[Path, FlaxLeaf]:
        """Every array at or below this node, by its path relative to the node."""
        found = {(*prefix, name): leaf for name, leaf in self.leaves.items()}
        for name, child in self.children.items():
            found |= child.flat((*prefix, name))
        return found

    def walk(self) -> Iterable["FlaxNode"]:
        """This node and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    @property
    def empty(self) -> bool:
        """Whether no array hangs here."""
        return not self.leaves and all(child.empty for child in self.children.values())

    @property
    def where(self) -> str:
        """The dotted path, and the class where it is known."""
        name = f"'{join_path(self.path)}'" if self.path else "the root"
        return f"{name} ({self.kind})" if self.kind else name


@dataclass(eq=False)
class FlaxTree:
    """The whole Flax side.

    Attributes:
        root: The tree of modules.
        flavour: ``"nnx"`` or ``"linen"``.
        kept: Leaves of a run (random streams, caches), carried from the template as they are.
        seeded: Paths of random streams, which an abstract template may leave to `fill`.
        fill: From ``{path: array}`` to a new thing of the kind that was read.
    """

    root: FlaxNode
    flavour: str
    kept: tuple[FlaxLeaf, ...]
    seeded: frozenset[Path]
    fill: Callable[[Mapping[Path, Any]], Any]


def read_flax(template: Any) -> FlaxTree:
    """Read an ``nnx.Module``, an ``nnx.State`` or linen variables.

    Raises:
        PlanError: It is none of these (a linen module holds no variables: pass what ``init`` gives).
    """
    if isinstance(template, nnx.Module):
        return _read_nnx(template)
    if isinstance(template, nnx.State):
        return _read_state(template)
    if isinstance(template, Mapping):
        return _read_linen(template)
    raise PlanError(
        f"a {type(template).__name__} is no Flax template: pass an nnx.Module, an nnx.State, or the "
        "variables that a linen module's init (or jax.eval_shape of it) gives."
    )


# --- nnx ---------------------------------------------------------------------------------------------


def _read_nnx(module: nnx.Module) -> FlaxTree:
    root = FlaxNode(())
    variables: dict[int, tuple[Path, Any]] = {}
    seen: set[int] = set()
    shared = False
    for path, found in _nnx_graph(module, (), ()):
        shared = shared or id(found) in seen
        seen.add(id(found))
        if isinstance(found, nnx.Variable):
            variables.setdefault(id(found), (path, found))  # a shared one is read under its first path
        else:
            node = _reach(root, path)
            node.kind, node.module = type(found).__name__, found
    tree = _read_variables(root, list(variables.values()))

    def fill(values: Mapping[Path, Any]) -> Any:
        known = (*tree.root.flat().values(), *tree.kept)
        if not shared and (filled := _fill_as_pytree(module, known, tree.seeded, values)) is not None:
            return filled
        graphdef, state = nnx.split(module)
        filled = []
        for path, variable in nnx.to_flat_state(state):
            ours, _ = variables[id(variable)]
            filled.append((path, _fill_variable(variable, ours, values)))
        return nnx.merge(graphdef, nnx.from_flat_state(filled))

    return replace(tree, fill=fill)


def _fill_as_pytree(
    module: nnx.Module, known: Sequence[FlaxLeaf], seeded: frozenset[Path], values: Mapping[Path, Any]
) -> Any:
    """A module in which nothing is shared, filled as the pytree that it is; None where that cannot be.

    Several times cheaper than taking the graph apart. A leaf of the pytree is known again by being the very
    object that was read; where one is not, or two are one, the pytree is not understood.
    """
    leaves, structure = jax.tree.flatten(module)
    paths = {id(leaf.value): leaf.path for leaf in known}
    if not len(leaves) == len(known) == len(paths):
        return None
    filled = []
    for leaf in leaves:
        path = paths.get(id(leaf))
        if path is None:
            return None
        filled.append(values[path] if path in values else _start(leaf) if path in seeded else leaf)
    return jax.tree.unflatten(structure, filled)


def _nnx_graph(node: Any, path: Path, above: tuple[int, ...]) -> Iterable[tuple[Path, Any]]:
    """Every module and variable by every path that leads to it, shared ones included, cycles cut."""
    sort = _sort(type(node))
    if sort == "variable":
        yield path, node
        return
    if sort in ("module", "module list"):
        yield path, node
    children: Iterable[tuple[Any, Any]]
    if sort in ("list", "module list"):
        children = enumerate(node)
    else:
        children = node.items() if sort == "dict" else sorted(vars(node).items())
    above = (*above, id(node))
    for name, child in children:
        if _sort(type(child)) != "other" and id(child) not in above:
            yield from _nnx_graph(child, (*path, name), above)


def _is_variable(thing: Any) -> bool:
    return _sort(type(thing)) == "variable"


def _sort(kind: type) -> str:
    """What an attribute of this class is to the walk; asking nnx's metaclasses costs, so ask once a class."""
    if (known := _SORTS.get(kind)) is None:
        known = _SORTS[kind] = next((name for name, base in _BASES if issubclass(kind, base)), "other")
    return known


_BASES: tuple[tuple[str, type], ...] = (
    ("variable", nnx.Variable),
    ("module list", nnx.List),
    ("module", nnx.Pytree),
    ("dict", dict),
    ("list", list),
    ("list", tuple),
)
_SORTS: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def _read_state(state: nnx.State) -> FlaxTree:
    variables = [(_path(path), variable) for path, variable in nnx.to_flat_state(state)]

    def fill(values: Mapping[Path, Any]) -> nnx.State:
        flat = [
            (path, _fill_variable(variable, _path(path), values))
            for path, variable in nnx.to_flat_state(state)
        ]
        return nnx.from_flat_state(flat)

    return replace(_read_variables(FlaxNode(()), variables), fill=fill)


def _read_variables(root: FlaxNode, variables: Sequence[tuple[Path, Any]]) -> FlaxTree:
    kept, seeded = [], []
    for path, variable in variables:
        value = variable.get_value() if _is_variable(variable) else variable
        leaf = _leaf(path, _collection_of(variable), value)
        if _is_of_a_run(path, variable):
            kept.append(leaf)
            if issubclass(type(variable), nnx.RngState):
                seeded.append(path)
        else:
            _reach(root, path[:-1]).leaves[str(path[-1])] = leaf
    return FlaxTree(root, "nnx", tuple(kept), frozenset(seeded), _unfillable)


def _unfillable(values: Mapping[Path, Any]) -> Any:
    raise NotImplementedError


def _fill_variable(variable: Any, path: Path, values: Mapping[Path, Any]) -> Any:
    """A new variable with the value for its path, or with its own."""
    if not _is_variable(variable):
        return values.get(path, variable)
    if path in values:
        return variable.copy(values[path])
    old = variable.get_value()
    return variable.copy(_start(old) if isinstance(variable, nnx.RngState) else old)


def _collection_of(variable: Any) -> str:
    kind = type(variable)
    if issubclass(kind, nnx.Param):
        return "params"
    if issubclass(kind, nnx.BatchStat):
        return "batch_stats"
    return kind.__name__ if _is_variable(variable) else ""


def _is_of_a_run(path: Path, variable: Any) -> bool:
    if _is_variable(variable):
        return issubclass(type(variable), _RUN_VARIABLES)
    return "rngs" in path  # a pure state has lost the variables' types; nnx names random streams so


def _start(value: Any) -> Any:
    """An abstract random stream begins at seed 0; a concrete one goes on where it is."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0)
        return key if not value.shape else jax.random.split(key, value.shape)
    return jnp.zeros(value.shape, value.dtype)


# --- linen -------------------------------------------------------------------------------------------


def _read_linen(variables: Mapping[str, Any]) -> FlaxTree:
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
            "bare parameter tree as {'params': tree}."
        )
    root = FlaxNode(())
    kept = []
    boxes: dict[Path, Any] = {}
    for collection, tree in variables.items():
        for path, box in _linen_leaves(tree, ()):
            full = (collection, *path)
            boxes[full] = box
            value = meta.unbox(box)
            leaf = _leaf(full, collection, value)
            if collection in _RUN_COLLECTIONS:
                kept.append(leaf)
                continue
            node = _reach(root, path[:-1])
            name = str(path[-1])
            node.leaves[name if name not in node.leaves else f"{collection}:{name}"] = leaf
    for node in root.walk():
        if node.path:
            node.kind = _kind_from_name(str(node.path[-1]))
    _bring_home(root, root)

    def fill(values: Mapping[Path, Any]) -> Any:
        def put(tree: Any, path: Path) -> Any:
            if isinstance(tree, Mapping):
                return {name: put(child, (*path, name)) for name, child in tree.items()}
            if path not in values:
                return tree
            return meta.replace_boxed(tree, values[path])

        filled = put(variables, ())
        return core.freeze(filled) if isinstance(variables, core.FrozenDict) else filled

    return FlaxTree(root, "linen", tuple(kept), frozenset(), fill)


def _bring_home(node: FlaxNode, parent: FlaxNode) -> None:
    """Give a layer what a wrapper keeps for it.

    linen's ``WeightNorm`` and ``SpectralNorm`` write ``layer/kernel/scale`` and the like, slashes included, in
    their own scope; the layer itself is below it, or beside it. It is read as the layer's own ``kernel/scale``.
    """
    for child in node.children.values():
        _bring_home(child, node)
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


def _kind_from_name(name: str) -> str | None:
    found = _AUTO_NAME.match(name)
    return _LIFTED.sub("", found.group(1)) if found else None


def _path(keys: Any) -> Path:
    return tuple(key if isinstance(key, int) else str(key) for key in keys)


# --- both --------------------------------------------------------------------------------------------


def _reach(root: FlaxNode, path: Path) -> FlaxNode:
    # A state that went through a file may have its integer keys back as strings.
    path = tuple(int(name) if isinstance(name, str) and name.isdecimal() else name for name in path)
    node = root
    for depth, name in enumerate(path):
        if name not in node.children:
            node.children[name] = FlaxNode(path[: depth + 1])
        node = node.children[name]
    return node


def _leaf(path: Path, collection: str, value: Any) -> FlaxLeaf:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise PlanError(
            f"'{join_path(path)}' of the template is a {type(value).__name__}, not an array "
            "or a jax.ShapeDtypeStruct."
        )
    return FlaxLeaf(path, collection, tuple(shape), dtype, value)
