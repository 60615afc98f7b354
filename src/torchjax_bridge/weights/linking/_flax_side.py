"""The Flax side of a link: an nnx module, whose Variables are read and set in place, or a tree, which is made anew.

Both take and give the arrays of the leaves that cross as a list in the order of the plan, and refuse a leaf that is
gone or new. A tree is an nnx state or linen variables.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax
import numpy as np
from flax import nnx

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path

from ..trees import FlaxLeaf, FlaxTree, is_hooked, read_flax
from ._stale import changed, raise_if_stale

__all__ = ["FlaxSide", "NnxModule", "Tree"]


class FlaxSide:
    """What both kinds have in common.

    Args:
        template: What the link was made with.
        tree: The template, as it was read.
        paths: The leaves that cross, in the order of the plan.
    """

    in_place = False

    def __init__(self, template: Any, tree: FlaxTree, paths: Sequence[Path]) -> None:
        self._template = template
        self._tree = tree
        self._paths = paths
        self.leaves = _leaves(tree)

    def check(self) -> None:
        """Raise a `PlanError` that names every leaf that was added, removed or given another shape."""

    def values(self, given: Any) -> list[Any]:
        """The value of each leaf, in ``given`` if the link is not in place."""
        raise NotImplementedError

    def put(self, arrays: Mapping[int, jax.Array]) -> Any:
        """The model with these arrays, by their places among the leaves: itself, or a new tree."""
        raise NotImplementedError

    def _compare(self, now: Mapping[Path, FlaxLeaf], what: str) -> None:
        before = {join_path(path): leaf.shape for path, leaf in self.leaves.items()}
        after = {join_path(path): leaf.shape for path, leaf in now.items()}
        raise_if_stale(
            [
                *changed(before, after, what),
                *(
                    f"{what} '{name}' had shape {shape} and has {after[name]} now"
                    for name, shape in before.items()
                    if after.get(name, shape) != shape
                ),
            ]
        )


class NnxModule(FlaxSide):
    """An nnx module: its Variables get new values, and stay the objects that they are."""

    in_place = True

    def __init__(
        self, module: nnx.Module, tree: FlaxTree, paths: Sequence[Path], replan: Callable[[], None]
    ) -> None:
        super().__init__(module, tree, paths)
        self._replan = replan
        self._note()
        self._planned = [_settings(module)]

    def _note(self) -> None:
        """Note the structure, and how each leaf is read and set."""
        everything = list(_holders(self._template))
        self._dicts = [one for one in everything if isinstance(one, dict)]
        self._lists = [one for one in everything if not isinstance(one, dict)]
        self._sizes_then, self._contents_then = self._sizes(), list(self._contents())
        holders = [self.leaves[path].holder for path in self._paths]
        verbs = [_verbs(self._template, path, one) for path, one in zip(self._paths, holders, strict=True)]
        self._readers = [reader for reader, _ in verbs]
        self._setters = [setter for _, setter in verbs]
        # Code of the user's may raise while the Variables are set, and anyone may press Ctrl-C.
        self._undo = [
            (one.get_raw_value, one.set_raw_value) if isinstance(one, nnx.Variable) else verb
            for one, verb in zip(holders, verbs, strict=True)
        ]

    def _sizes(self) -> list[int]:
        return [*map(len, self._dicts), *map(len, self._lists)]

    def _contents(self) -> Iterator[Any]:
        """Every attribute and item."""
        return chain(chain.from_iterable(map(dict.values, self._dicts)), chain.from_iterable(self._lists))

    def check(self) -> None:
        """Raise a `PlanError` that names every Variable that was added, removed or given another shape.

        Or one that says what fits no more, if a layer was replaced by one of another class or a setting changed.
        Settings that come and go, as those of ``eval()``, are planned for once.
        """
        if self._sizes() == self._sizes_then and all(
            map(operator.is_, self._contents(), self._contents_then)
        ):
            return
        leaves = _leaves(read_flax(self._template))
        self._compare(leaves, "Variable")
        # A setting changed, or a Variable was replaced by one of its shape.
        now = _settings(self._template)
        if not any(len(now) == len(one) and all(map(operator.is_, now, one)) for one in self._planned):
            self._replan()
            self._planned = [*self._planned[-7:], now]
        self.leaves = leaves
        self._note()

    def values(self, given: Any) -> list[Any]:
        """The value of each Variable."""
        if given is not None and given is not self._template:
            raise TypeError(
                f"pull() reads the nnx module that the link was made with, not {what_kind(given)}: leave "
                "the argument out, or make a link with the other model."
            )
        self.check()
        return [read() for read in self._readers]

    def put(self, arrays: Mapping[int, jax.Array]) -> nnx.Module:
        """Set the Variables, and return the module. If a hook of one raises, all are as they were."""
        before = [read() for read, _ in self._undo]
        try:
            for place, array in arrays.items():
                self._setters[place](array)
        except BaseException:
            for (_, put), value in zip(self._undo, before, strict=True):
                put(value)
            raise
        return self._template


class Tree(FlaxSide):
    """An nnx state or linen variables: a push gives a new tree."""

    def __init__(self, template: Any, tree: FlaxTree, paths: Sequence[Path]) -> None:
        super().__init__(template, tree, paths)
        found, structure = jax.tree.flatten(template)
        self._structure: Any = structure
        places = {id(value): place for place, value in enumerate(found)}
        ours = [places.get(id(self.leaves[path].value), -1) for path in paths]
        crossing = set(paths)
        rest = [*(leaf for path, leaf in self.leaves.items() if path not in crossing), *tree.kept]
        self._own = [(leaf.path, leaf.value) for leaf in rest if isinstance(leaf.value, jax.Array)]
        # An array that is in the tree twice does not say which leaf it is.
        self._places = ours if len(places) == len(found) and -1 not in ours else None

    def values(self, given: Any) -> list[Any]:
        """The value of each leaf of the tree that is given."""
        if given is None:
            raise TypeError(
                "pull() needs the state or the variables to read, since those of the link never change: "
                "link.pull(variables)."
            )
        if self._places is not None:
            found, structure = jax.tree.flatten(given)
            if structure == self._structure:
                return [found[place] for place in self._places]
        now = _leaves(read_flax(given))
        self._compare(now, "leaf")
        return [now[path].value for path in self._paths]

    def put(self, arrays: Mapping[int, jax.Array]) -> Any:
        """A new tree with these arrays and the template's other leaves."""
        for path, array in self._own:
            if array.is_deleted():
                raise PlanError(
                    f"'{join_path(path)}', which torch has not, is one array in every tree that the link gives, "
                    "and was deleted, as by donation. Donate a copy, or make a new link with the tree that the "
                    "function returned."
                )
        return self._tree.fill({self._paths[place]: array for place, array in arrays.items()})


def _leaves(tree: FlaxTree) -> dict[Path, FlaxLeaf]:
    return {leaf.path: leaf for leaf in tree.root.flat().values()}


# --- nnx ----------------------------------------------------------------------------------------------


def _verbs(module: nnx.Module, path: Path, holder: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """What reads and what sets a leaf. The raw verbs, where nothing hooks into the others, cost a tenth of them."""
    if not isinstance(holder, nnx.Variable):
        return partial(_read_plain, module, path), partial(_set_plain, module, path)
    plain = isinstance(holder.get_raw_value(), jax.Array | jax.ShapeDtypeStruct | np.ndarray)
    return (
        holder.get_raw_value if plain and not is_hooked(holder, "get_value") else holder.get_value,
        holder.set_raw_value if plain and not is_hooked(holder, "set_value") else holder.set_value,
    )


def _holders(module: nnx.Module) -> Iterator[Any]:
    """The attributes of every module, and every list, tuple and dict among them."""
    stack: list[Any] = [module]
    seen: set[int] = set()
    while stack:
        one = stack.pop()
        if isinstance(one, nnx.Variable) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nnx.Pytree):
            one = vars(one)
        elif not isinstance(one, dict | list | tuple):
            continue
        yield one
        stack.extend(_contents(one))


def _settings(module: nnx.Module) -> list[Any]:
    """What a plan may depend on: the class of each attribute that holds weights, and each that holds none."""
    contents = chain.from_iterable(map(_contents, _holders(module)))
    return [type(one) if isinstance(one, _HOLDING) else one for one in contents]


def _contents(holder: Any) -> tuple[Any, ...]:
    return tuple(holder.values()) if isinstance(holder, dict) else tuple(holder)


def _read_plain(module: nnx.Module, path: Path) -> Any:
    """An array that is in no Variable."""
    found: Any = module
    for name in path:
        found = found[name] if isinstance(found, _ITEMS) else getattr(found, str(name))
    return found


def _set_plain(module: nnx.Module, path: Path, array: jax.Array) -> None:
    """Set an array that is in no Variable."""
    holder = _read_plain(module, path[:-1])
    if isinstance(holder, _ITEMS):
        holder[path[-1]] = array
    else:
        setattr(holder, str(path[-1]), array)


_ITEMS: Any = (dict, list, tuple, nnx.List)
_HOLDING: Any = (nnx.Variable, nnx.Pytree, dict, list, tuple, jax.Array, np.ndarray, jax.ShapeDtypeStruct)
