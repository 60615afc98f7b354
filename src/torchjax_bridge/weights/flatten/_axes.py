"""Axes of tensors as products of atoms: what a flatten merges and a view splits, and the order that results.

An `Atom` is a factor of an axis that no operation has split so far. It is a channel, a position, a feature, or
nothing known; what reads it tells. ``unify`` says that two axes are the same one. `order_of` reads off whether an
axis is a flattened map, when all operations are known. Knows no function of torch's: ``_functions`` does.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Literal, NamedTuple

__all__ = [
    "Atom", "Axes", "Axis", "Order", "derived", "hold", "mark", "order_of", "regroup", "size_of", "spoil", "unify",
    "unknown",
]  # fmt: skip

Role = Literal["channel", "space", "feature"]


@dataclass(eq=False)
class Atom:
    """A factor of an axis.

    Attributes:
        size: How many entries it has.
        roles: What it is for sure: a layer over maps has read or given it.
        guess: What it is if nothing else shows it: an axis of an input, a feature of a Linear.
        broken: Whether an unknown function made it or rearranged it.
        leaked: Whether an unknown function reads it, which may view it as a map.
        parts: The atoms into which it was split.
        same: The atom that it was found to be.
        sources: The axes of which it is a part or a concatenation.
        pieces: The atoms that are a part or a concatenation of it.
    """

    size: int
    roles: set[Role] = field(default_factory=set)
    guess: Role | None = None
    broken: bool = False
    leaked: bool = False
    parts: "tuple[Atom, ...]" = ()
    same: "Atom | None" = None
    sources: "list[Axis]" = field(default_factory=list)
    pieces: "list[Atom]" = field(default_factory=list)


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


class Order(NamedTuple):
    """The order of the entries of an axis.

    Attributes:
        kind: ``plain``: the same in torch and in a Flax model with its channels last; ``map``: a flattened map
            ``(C, *space)``; ``input``: an axis of an input may be the channels; ``mixed``: partly a flattened map;
            ``unknown``.
        sizes: The ``(C, *space)``, or the sizes of what is mixed.
    """

    kind: Literal["plain", "map", "input", "mixed", "unknown"]
    sizes: tuple[int, ...] = ()


def size_of(axis: Axis) -> int:
    """How many entries an axis has."""
    return prod(atom.size for atom in axis)


def unknown(shape: Iterable[int]) -> Axes:
    """Axes of which nothing is known."""
    return tuple((Atom(size, broken=True),) for size in shape)


def _found(atom: Atom) -> Atom:
    while atom.same is not None:
        atom = atom.same
    return atom


def _leaves(axis: Iterable[Atom]) -> Iterator[Atom]:
    for atom in map(_found, axis):
        if atom.parts:
            yield from _leaves(atom.parts)
        elif atom.size > 1:
            yield atom


def _add_sources(atom: Atom, sources: "list[Axis]") -> None:
    """Add what an atom is made of; a part of itself is none, and one of a longer axis mixes the orders of both."""
    sources = atom.sources + sources
    found = [[*_axes_with(atom, source)] for source in sources]
    atom.sources = [source for source, axes in zip(sources, found, strict=True) if not axes]
    atom.broken |= any(len(axis) > 1 for axes in found for axis in axes)


def _axes_with(atom: Atom, axis: Axis) -> "Iterator[list[Atom]]":
    """The axes that hold an atom, among those that an axis is made of."""
    leaves = [*_leaves(axis)]
    if atom in leaves:
        yield leaves
    else:
        yield from (found for leaf in leaves for source in leaf.sources for found in _axes_with(atom, source))


def _split(atom: Atom, inner: int) -> tuple[Atom, Atom]:
    """Split an atom into an outer and an inner one of ``inner`` entries."""
    outer, last = (
        Atom(size, set(atom.roles), atom.guess, atom.broken, atom.leaked, sources=list(atom.sources))
        for size in (atom.size // inner, inner)
    )
    atom.parts = outer, last
    return outer, last


def spoil(axes: Iterable[Axis], *, leaked: bool = False) -> None:
    """Nothing is known of these axes any more; with ``leaked``, of what becomes of them elsewhere."""
    for atom in _leaves(atom for axis in axes for atom in axis):
        atom.leaked = True
        atom.broken |= not leaked


def mark(axis: Axis, role: Role) -> None:
    """A layer over maps takes the axis as its channels, or as one of space."""
    for atom in _leaves(axis):
        if not atom.roles:
            atom.roles.add(role)
            for source in atom.sources:
                mark(source, role)


def unify(one: Axis, other: Axis) -> None:
    """Two axes of the same size have the same entries in the same order."""
    left, right = list(one), list(other)
    while left and right:
        a, b = (_found(side.pop()) for side in (left, right))
        if a is b or 1 in (a.size, b.size):
            left += [a] if a is not b and b.size == 1 < a.size else []
            right += [b] if a is not b and a.size == 1 < b.size else []
        elif a.parts or b.parts:
            left += a.parts or (a,)
            right += b.parts or (b,)
        elif a.size == b.size:
            b.same = a
            a.roles |= b.roles
            a.guess = a.guess or b.guess
            a.broken, a.leaked = a.broken or b.broken, a.leaked or b.leaked
            _add_sources(a, b.sources)
            a.pieces += b.pieces
            for source in a.sources:
                for role in a.roles:
                    mark(source, role)
        elif a.size % b.size == 0:
            left += _split(a, b.size)
            right.append(b)
        elif b.size % a.size == 0:
            right += _split(b, a.size)
            left.append(a)
        else:  # two views that do not divide each other
            spoil([(a, *left), (b, *right)])
            return


def hold(whole: Axis, part: Axis) -> None:
    """An axis holds the entries of another among its own, as where a part of a tensor is written to."""
    inside = list(_leaves(whole))
    for atom in inside:
        _add_sources(atom, [part])
        for role in atom.roles:
            mark(part, role)
    for atom in _leaves(part):
        atom.pieces += inside


def regroup(axes: Axes, shape: Iterable[int]) -> Axes:
    """The axes of a tensor that is viewed in another shape."""
    made = tuple((Atom(size),) for size in shape)
    unify(tuple(atom for axis in axes for atom in axis), tuple(atom for axis in made for atom in axis))
    return made


def derived(size: int, sources: Sequence[Axis]) -> Axis:
    """An axis that is a part of another, or a concatenation of several."""
    if size == 1:
        return ()
    made = Atom(size, sources=list(sources))
    for atom in _leaves(atom for axis in sources for atom in axis):
        atom.pieces.append(made)
    return (made,)


def order_of(axis: Axis, *, ups: bool = True, downs: bool = True) -> Order:
    """The order of the entries of an axis."""
    atoms = list(_leaves(axis))
    roles = [_role_of(atom) for atom in atoms]
    sizes = tuple(atom.size for atom in atoms)
    if any(atom.broken or (atom.leaked and not atom.roles) for atom in atoms):
        return Order("unknown")
    around = [order_of(source, downs=False) for atom in atoms for source in atom.sources if ups]
    if downs:
        around += [order_of((piece,), ups=False, downs=False) for atom in _all(axis) for piece in atom.pieces]
    if any(order.kind == "unknown" for order in around) or (len(atoms) > 1 and "both" in roles):
        return Order("unknown")
    if strange := next((order for order in around if order.kind != "plain"), None):
        return Order("mixed", strange.sizes)
    first = next((place for place, role in enumerate(roles) if role in _LAST_IN_FLAX), len(roles))
    order = [role for role, _ in groupby(roles[first:])]
    if order in ([], ["channel"], ["feature"], ["feature", "channel"]):
        return Order("plain")
    sure = all(map(_is_sure, atoms[first:]))
    if order == ["channel", "space"] and first == 0:
        count = roles.count("channel")
        return Order("map" if sure else "input", (prod(sizes[:count]), *sizes[count:]))
    return Order("mixed" if sure and "space" in order else "unknown", sizes)


_LAST_IN_FLAX = ("channel", "feature")


def _role_of(atom: Atom) -> str | None:
    roles: set[str] = {*atom.roles} or {
        role for source in atom.sources for one in _leaves(source) if (role := _role_of(one)) is not None
    }
    if {"channel", "space"} <= roles:
        return "both"
    return next((role for role in ("channel", "space", "feature") if role in roles), atom.guess)


def _is_sure(atom: Atom) -> bool:
    """Whether its role is more than a guess."""
    parts = [one for source in atom.sources for one in _leaves(source)]
    return bool(atom.roles) or (bool(parts) and all(map(_is_sure, parts)))


def _all(axis: Iterable[Atom]) -> Iterator[Atom]:
    """Every atom of an axis, and the parts of each."""
    for atom in map(_found, axis):
        yield atom
        yield from _all(atom.parts)
