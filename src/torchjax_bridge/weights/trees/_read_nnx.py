"""Reads an ``nnx.Module`` (concrete or abstract) or an ``nnx.State`` into a `FlaxTree`, and fills it again.

Filling builds a new module or state and leaves the one that was read as it is.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from torchjax_bridge.exchange import Path

from ._flax_tree import FlaxLeaf, FlaxNode, FlaxTree, FlaxTreeBuilder, leaf_of, leaves_of_a_run

__all__ = ["is_hooked", "read_nnx", "read_state"]

# Variables that belong to a run, not to the trained weights.
_RUN_VARIABLES = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


def read_nnx(module: nnx.Module) -> FlaxTree:
    builder = FlaxTreeBuilder()
    variables: dict[int, tuple[Path, Any]] = {}
    plain: dict[tuple[int, Any], tuple[Path, Any]] = {}
    found: list[tuple[Path, Any]] = []
    cyclic = _walk_nnx(module, (), (), found, plain)
    for path, thing in found:
        if _is_variable(thing):
            variables.setdefault(id(thing), (path, thing))  # a shared one has its first path
        else:
            node = builder.node_at(path)
            node.kind, node.module = type(thing).__name__, thing
    shared = cyclic or len({id(thing) for _, thing in found}) < len(found)
    stray: list[Path] = []
    if plain:
        plain, stray = _settle_plain(module, plain, shared)
    tree = _read_variables(builder, [*variables.values(), *plain.values()], plain_arrays=True)
    for node in tree.root.walk():
        _order_as_defined(node)

    def fill(values: Mapping[Path, Any]) -> Any:
        known = [leaf for leaf in (*tree.root.flat().values(), *tree.kept) if leaf.path not in stray]
        filled = None if shared else _fill_as_pytree(module, known, tree.seeded, values)
        if filled is None:
            filled = fill_as_graph(values)
        for path in stray:
            if path in values:  # nnx takes it for a setting, and accepts an array only as nnx.data
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
    """Fill a module without shared parts as a pytree; None where that cannot be done.

    Several times cheaper than splitting the graph. Leaves are recognised by identity, so each must be an object
    that was read, and no two may be the same object.
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
        filled.append(values[path] if path in values else _start(leaf, path) if path in seeded else leaf)
    return jax.tree.unflatten(structure, filled)


def _walk_nnx(
    node: Any,
    path: Path,
    above: tuple[int, ...],
    found: list[tuple[Path, Any]],
    plain: dict[tuple[int, Any], tuple[Path, Any]],
) -> bool:
    """Find every module and variable by every path to it; returns whether there is a cycle.

    Arrays that are no variables go into ``plain``, by the id of their holder and their name.
    """
    category = _category(node)
    if category in ("module", "module list"):
        found.append((path, node))
    children: Iterable[tuple[Any, Any]]
    if category in ("list", "module list"):
        children = enumerate(node)
    else:
        children = node.items() if category == "dict" else sorted(vars(node).items())
    above = (*above, id(node))
    cyclic = False
    for name, child in children:
        kind = _category_of_class(_class(child))
        if kind == "variable":
            found.append(((*path, name), child))
        elif kind == "array":
            plain.setdefault((id(node), name), ((*path, name), child))
        elif kind != "other":
            cyclic |= id(child) in above or _walk_nnx(child, (*path, name), above, found, plain)
    return cyclic


_Places = dict[tuple[int, Any], tuple[Path, Any]]


def _settle_plain(module: nnx.Module, plain: _Places, shared: bool) -> tuple[_Places, list[Path]]:
    """The arrays that are data to nnx, and the paths of those that ``nnx.eval_shape`` turned into settings.

    ``nnx.eval_shape`` leaves a tracer or a struct where a module assigned a plain array. Any other array that is
    no data is a setting of the module, and no leaf.
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
    """The object at a path of nnx."""
    found: Any = module
    for name in path:
        found = found[name] if _category(found) in ("module list", "dict", "list") else vars(found)[name]
    return found


def _order_as_defined(node: FlaxNode) -> None:
    """Put leaves and children in the order of the module's attributes.

    This is the order of definition, except in a module that nnx or JAX has rebuilt (``nnx.eval_shape``,
    ``nnx.merge``), where it is sorted.
    """
    if node.module is not None and not isinstance(node.module, nnx.List):
        places = {name: place for place, name in enumerate(vars(node.module))}
        node.leaves = dict(sorted(node.leaves.items(), key=lambda item: places.get(item[0], len(places))))
        node.children = dict(
            sorted(node.children.items(), key=lambda item: places.get(str(item[0]), len(places)))
        )


def _is_variable(thing: Any) -> bool:
    return _category(thing) == "variable"


def _category(thing: object) -> str:
    """What an attribute is: a variable, a module, a container, an array or something else."""
    return _category_of_class(_class(thing))


_class: Any = type  # to a type checker, one that can be hashed


@lru_cache(maxsize=1024)
def _category_of_class(kind: type) -> str:
    # Cached, because nnx's metaclasses make issubclass slow.
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


def read_state(state: nnx.State) -> FlaxTree:
    variables = [(_path(path), variable) for path, variable in nnx.to_flat_state(state)]

    def fill(values: Mapping[Path, Any]) -> nnx.State:
        flat = [
            (path, _fill_variable(variable, _path(path), values))
            for path, variable in nnx.to_flat_state(state)
        ]
        return nnx.from_flat_state(flat)

    # A pure state has lost the types of all its variables; any other has all of them.
    typed = any(_is_variable(variable) for _, variable in variables)
    if typed:
        variables = [(path, one) for path, one in variables if _category(one) in ("variable", "array")]
    return replace(_read_variables(FlaxTreeBuilder(), variables, plain_arrays=typed), fill=fill)


def _read_variables(
    builder: FlaxTreeBuilder, variables: Sequence[tuple[Path, Any]], *, plain_arrays: bool
) -> FlaxTree:
    """The tree of variables by path; ``plain_arrays`` says whether anything else is a plain array."""
    kept, seeded = [], []
    for path, variable in variables:
        value, collection = _value_of(variable), _collection_of(variable)
        if _is_of_a_run(path, variable):
            kept += [leaf._replace(holder=variable) for leaf in leaves_of_a_run(path, collection, value)]
            if issubclass(type(variable), nnx.RngState):
                seeded.append(path)
            continue
        leaf = leaf_of(path, collection, value)
        leaf = leaf._replace(optional=plain_arrays and not _is_variable(variable), holder=variable)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kept.append(leaf)
        else:
            builder.node_at(path[:-1]).leaves[str(path[-1])] = leaf
    return FlaxTree(builder.root, "nnx", tuple(kept), frozenset(seeded), _unfillable)


def _value_of(variable: Any) -> Any:
    """The array; of a variable with code of its own for reading, what that gives."""
    if not _is_variable(variable):
        return variable
    raw = variable.get_raw_value()
    plain = isinstance(raw, jax.ShapeDtypeStruct | jax.Array) and not is_hooked(variable, "get_value")
    return raw if plain else variable.get_value()


def is_hooked(variable: nnx.Variable[Any], verb: str) -> bool:
    """Whether its class overloads ``get_value`` or ``set_value``, or its metadata hooks into it."""
    own: Any = getattr(type(variable), verb)
    return variable.has_metadata(f"on_{verb}") or own is not getattr(nnx.Variable, verb)


def _unfillable(values: Mapping[Path, Any]) -> Any:
    raise NotImplementedError


def _fill_variable(variable: Any, path: Path, values: Mapping[Path, Any]) -> Any:
    """A new variable with the value for its path, or with its own."""
    if not _is_variable(variable):
        return values.get(path, variable)
    if path in values:
        if not is_hooked(variable, "set_value"):
            return variable.copy(values[path])
        filled = variable.copy()
        filled.set_value(values[path])
        return filled
    old = variable.get_value()
    return variable.copy(_start(old, path) if isinstance(variable, nnx.RngState) else old)


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
    return "rngs" in path  # a pure state has lost its types; "rngs" is nnx's name for random streams


def _start(value: Any, path: Path) -> Any:
    """The value of a random stream: an abstract one gets a key of its own by its path, a concrete one is kept."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32("/".join(map(str, path)).encode()))
        return key if not value.shape else jax.random.split(key, value.shape)
    return jnp.zeros(value.shape, value.dtype)


def _path(keys: Any) -> Path:
    return tuple(key if isinstance(key, int) else str(key) for key in keys)
