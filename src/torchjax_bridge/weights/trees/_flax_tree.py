"""The Flax side, read once: a tree of scopes with their leaves, and how to fill it again.

Reads an ``nnx.Module`` (concrete or abstract), an ``nnx.State`` or linen variables, and rebuilds the same
kind of thing with other values, leaving the one it read untouched. Checks nothing about names and shapes:
that is done by the plan, before anything is built.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, nnx
from flax.core import meta

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path

from .._report import what_it_is
from ._node import Node

__all__ = ["FlaxLeaf", "FlaxNode", "FlaxTree", "read_flax"]

# Collections and variables that belong to a run, not to the trained weights.
_RUN_COLLECTIONS = frozenset({"cache", "intermediates", "perturbations", "rngs"})
_RUN_VARIABLES = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)

# What flax writes before the class name of a lifted module (nn.remat, nn.vmap, nn.scan, nn.jit).
_LIFTED = re.compile(r"^(?:Checkpoint|Remat|Vmap|Scan|Jit)+(?=[A-Z])")
_AUTO_NAME = re.compile(r"^([A-Z]\w*?)_(\d+)$")


class FlaxLeaf(NamedTuple):
    """One array of the Flax side."""

    path: Path
    """As the caller finds it: with the collection in front for linen."""
    collection: str
    """linen's name for it, also where nnx has a variable type instead; empty where nothing tells."""
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Any
    """The array; or a ``jax.ShapeDtypeStruct`` in an abstract template."""
    optional: bool = False
    """Whether it is no variable but a plain array of an nnx module: filled if torch has it, else kept."""
    holder: Any = None
    """The nnx variable, or the box of linen's, that holds the value and may say where it lies."""


@dataclass(eq=False)
class FlaxNode(Node):
    """One module of the Flax side.

    Attributes:
        path: Where it is, without the collection.
        kind: The name of its class, where it is known (nnx) or an automatic name tells it (linen).
        module: The live nnx module, or None.
        leaves: Its own arrays by name.
        children: Its submodules by name.
        one_of_many: Whether it stands for one of several layers that are stacked in it.
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
        """Whether no array that must be filled hangs here."""
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
        kept: Leaves of a run (random streams, caches), carried from the template as they are.
        seeded: Paths of random streams, which an abstract template may leave to `fill`.
        fill: From ``{path: array}`` to a new thing of the kind that was read.
    """

    root: FlaxNode
    flavour: str
    kept: tuple[FlaxLeaf, ...]
    seeded: frozenset[Path]
    fill: Callable[[Mapping[Path, Any]], Any]

    def holes(self, filled: Container[Path]) -> list[Path]:
        """What would have no value if only these paths were filled: an abstract template has none to keep."""
        return [
            leaf.path
            for leaf in (*self.root.flat().values(), *self.kept)
            if leaf.path not in filled
            and isinstance(leaf.value, jax.ShapeDtypeStruct)
            and leaf.path not in self.seeded
        ]


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
        f"{what_it_is(template)} is no Flax template: pass an instance of nnx.Module, an nnx.State, or the "
        "variables that a linen module's init (or jax.eval_shape of it) gives."
    )


# --- nnx ---------------------------------------------------------------------------------------------


def _read_nnx(module: nnx.Module) -> FlaxTree:
    scopes = _Scopes()
    variables: dict[int, tuple[Path, Any]] = {}
    plain: dict[tuple[int, Any], tuple[Path, Any]] = {}
    found: list[tuple[Path, Any]] = []
    cyclic = _walk_nnx(module, (), (), found, plain)
    for path, thing in found:
        if _is_variable(thing):
            variables.setdefault(id(thing), (path, thing))  # a shared one is read under its first path
        else:
            node = scopes.at(path)
            node.kind, node.module = type(thing).__name__, thing
    shared = cyclic or len({id(thing) for _, thing in found}) < len(found)
    stray: list[Path] = []
    if plain:
        plain, stray = _settle_plain(module, plain, shared)
    tree = _read_variables(scopes, [*variables.values(), *plain.values()], plain_arrays=True)
    for node in tree.root.walk():
        _order_as_defined(node)

    def fill(values: Mapping[Path, Any]) -> Any:
        known = [leaf for leaf in (*tree.root.flat().values(), *tree.kept) if leaf.path not in stray]
        filled = None if shared else _fill_as_pytree(module, known, tree.seeded, values)
        if filled is None:
            filled = fill_as_graph(values)
        for path in stray:
            if path in values:  # nnx has it for a setting, and takes no array there unless told
                setattr(_at(filled, path[:-1]), str(path[-1]), nnx.data(values[path]))
        return filled

    def fill_as_graph(values: Mapping[Path, Any]) -> Any:
        graphdef, state = nnx.split(module)
        filled = []
        for path, variable in nnx.to_flat_state(state):
            if _is_variable(variable):
                ours, _ = variables[id(variable)]
            else:
                ours, _ = plain.get((id(_at(module, path[:-1])), path[-1]), ((), None))
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
    filled: list[Any] = []
    for leaf in leaves:
        path = paths.get(id(leaf))
        if path is None:
            return None
        filled.append(values[path] if path in values else _start(leaf) if path in seeded else leaf)
    return jax.tree.unflatten(structure, filled)


def _walk_nnx(
    node: Any,
    path: Path,
    above: tuple[int, ...],
    found: list[tuple[Path, Any]],
    plain: dict[tuple[int, Any], tuple[Path, Any]],
) -> bool:
    """Every module and variable by every path that leads to it, shared ones included; whether a cycle was cut.

    Arrays that are no variables are noted by what holds them and under which name, with their first path.
    """
    sort = _sort(node)
    if sort in ("module", "module list"):
        found.append((path, node))
    children: Iterable[tuple[Any, Any]]
    if sort in ("list", "module list"):
        children = enumerate(node)
    else:
        children = node.items() if sort == "dict" else sorted(vars(node).items())
    above = (*above, id(node))
    cyclic = False
    for name, child in children:
        kind = _sort_of_class(_class(child))
        if kind == "variable":
            found.append(((*path, name), child))
        elif kind == "array":
            plain.setdefault((id(node), name), ((*path, name), child))
        elif kind != "other":
            cyclic |= id(child) in above or _walk_nnx(child, (*path, name), above, found, plain)
    return cyclic


_Places = dict[tuple[int, Any], tuple[Path, Any]]


def _settle_plain(module: nnx.Module, plain: _Places, shared: bool) -> tuple[_Places, list[Path]]:
    """The arrays that are data to nnx, and the paths of those that ``nnx.eval_shape`` made settings of.

    It leaves a tracer, or a struct, where a module assigned a plain array; any other array that is no data is
    a setting of the module's own, and no leaf.
    """
    if shared:
        flat = nnx.to_flat_state(nnx.split(module)[1])
        data = {(id(_at(module, path[:-1])), path[-1]) for path, value in flat if not _is_variable(value)}
    else:
        leaves = {id(leaf) for leaf in jax.tree.leaves(module)}
        data = {place for place, (_, value) in plain.items() if id(value) in leaves}
    settled, stray = {}, []
    for place, (path, value) in plain.items():
        if place in data:
            settled[place] = (path, value)
        elif isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct):
            settled[place] = (path, jax.ShapeDtypeStruct(value.shape, value.dtype))
            stray.append(path)
    return settled, stray


def _at(module: nnx.Module, path: Sequence[Any]) -> Any:
    """What is at a path of nnx's own."""
    found: Any = module
    for name in path:
        found = found[name] if _sort(found) in ("module list", "dict", "list") else vars(found)[name]
    return found


def _order_as_defined(node: FlaxNode) -> None:
    """Put what hangs under a module in the order of its attributes.

    That is the order of definition, except for a module that nnx or JAX has rebuilt (``nnx.eval_shape``,
    ``nnx.merge``): those sort.
    """
    if node.module is not None and not isinstance(node.module, nnx.List):
        places = {name: place for place, name in enumerate(vars(node.module))}
        node.leaves = dict(sorted(node.leaves.items(), key=lambda item: places.get(item[0], len(places))))
        node.children = dict(
            sorted(node.children.items(), key=lambda item: places.get(str(item[0]), len(places)))
        )


def _is_variable(thing: Any) -> bool:
    return _sort(thing) == "variable"


def _sort(thing: object) -> str:
    """What an attribute is to the walk."""
    return _sort_of_class(_class(thing))


_class: Any = type  # to a type checker, one that can be hashed


@lru_cache(maxsize=1024)
def _sort_of_class(kind: type) -> str:
    # nnx's metaclasses make the question dear, so it is asked once a class.
    return next((name for name, base in _BASES if issubclass(kind, base)), "other")


_BASES: tuple[tuple[str, type], ...] = (
    ("variable", nnx.Variable),
    ("module list", nnx.List),
    ("module", nnx.Pytree),
    ("dict", dict),
    ("list", list),
    ("list", tuple),
    ("array", jax.Array),
    ("array", np.ndarray),
    ("array", np.generic),
    ("array", jax.core.Tracer),
    ("array", jax.ShapeDtypeStruct),
)


def _read_state(state: nnx.State) -> FlaxTree:
    variables = [(_path(path), variable) for path, variable in nnx.to_flat_state(state)]

    def fill(values: Mapping[Path, Any]) -> nnx.State:
        flat = [
            (path, _fill_variable(variable, _path(path), values))
            for path, variable in nnx.to_flat_state(state)
        ]
        return nnx.from_flat_state(flat)

    # A pure state has lost its variables' types; one that has kept some has kept all.
    typed = any(_is_variable(variable) for _, variable in variables)
    if typed:
        variables = [(path, one) for path, one in variables if _sort(one) in ("variable", "array")]
    return replace(_read_variables(_Scopes(), variables, plain_arrays=typed), fill=fill)


def _read_variables(
    scopes: "_Scopes", variables: Sequence[tuple[Path, Any]], *, plain_arrays: bool
) -> FlaxTree:
    """The tree of variables by path; ``plain_arrays`` says whether what is none is an array beside them."""
    kept, seeded = [], []
    for path, variable in variables:
        value = _value_of(variable)
        leaf = _leaf(path, _collection_of(variable), value)
        leaf = leaf._replace(optional=plain_arrays and not _is_variable(variable), holder=variable)
        if _is_of_a_run(path, variable) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kept.append(leaf)
            if issubclass(type(variable), nnx.RngState):
                seeded.append(path)
        else:
            scopes.at(path[:-1]).leaves[str(path[-1])] = leaf
    return FlaxTree(scopes.root, "nnx", tuple(kept), frozenset(seeded), _unfillable)


def _value_of(variable: Any) -> Any:
    """The array, by the variable's own account where it has a hook that gives another."""
    if not _is_variable(variable):
        return variable
    raw = variable.get_raw_value()
    plain = isinstance(raw, jax.ShapeDtypeStruct | jax.Array) and not variable.has_metadata("on_get_value")
    return raw if plain else variable.get_value()


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
            "bare parameter tree as {'params': tree}. If it is a pure dict of nnx, which does not say what is a "
            "parameter, pass nnx.state(model), filled from it with nnx.replace_by_pure_dict."
        )
    scopes = _Scopes()
    root = scopes.root
    kept = []
    boxes: dict[Path, Any] = {}
    for collection, tree in variables.items():
        for path, box in _linen_leaves(tree, ()):
            full = (collection, *path)
            boxes[full] = box
            leaf = _leaf(full, collection, _unboxed(box))._replace(holder=box)
            if collection in _RUN_COLLECTIONS:
                kept.append(leaf)
                continue
            node = scopes.at(path[:-1])
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
            return _reboxed(tree, values[path])

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


def _unboxed(box: Any) -> Any:
    """The value as it is: what the box and ``jax.set_mesh`` say of its place is for the result."""
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


def _path(keys: Any) -> Path:
    return tuple(key if isinstance(key, int) else str(key) for key in keys)


# --- both --------------------------------------------------------------------------------------------


class _Scopes:
    """The tree of modules as it grows."""

    def __init__(self) -> None:
        self.root = FlaxNode(())
        self._known: dict[Path, FlaxNode] = {(): self.root}

    def at(self, path: Path) -> FlaxNode:
        """The node at a path, made if it is new.

        A state that went through a file may have its integer keys back as strings; they are the same path.
        """
        node = self._known.get(path)
        if node is None:
            parent = self.at(path[:-1])
            name = path[-1]
            if isinstance(name, str) and name.isdecimal():
                name = int(name)
            node = parent.children.setdefault(name, FlaxNode((*parent.path, name)))
            self._known[path] = node
        return node


def _leaf(path: Path, collection: str, value: Any) -> FlaxLeaf:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise PlanError(
            f"'{join_path(path)}' of the template is a {type(value).__name__}, not an array "
            "or a jax.ShapeDtypeStruct."
        )
    return FlaxLeaf(path, collection, tuple(shape), dtype, value)
