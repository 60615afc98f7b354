"""The values that parameters and buffers have in a new model, in linen's form: what ``self.param`` is given.

A function that `flax.linen.initializers` has is called by its name; any other start is a lambda.
"""

from collections.abc import Sequence
from dataclasses import replace

from ._constructors import Call, Column, Items, Start, Text, Tree
from ._starts import KEY

__all__ = ["linen_start"]


def linen_start(name: str, tree: Start) -> Start:
    """``self.param(name, initializer, shape)``, or ``self.variable(collection, name, ...)``.

    Args:
        name: The attribute.
        tree: The start in nnx's form.
    """
    [made] = tree.items
    if tree.start == "nnx.Param(":
        start, items = f'self.param("{name}", ', _initializer(made)
    else:
        collection = "buffers" if tree.start == "nnx.Variable(" else "batch_stats"
        start, items = f'self.variable("{collection}", "{name}", ', _function(made)
    fallback = None if tree.fallback is None else linen_start(name, tree.fallback)
    return replace(tree, start=start, items=items, fallback=fallback)


def _initializer(made: Tree) -> list[Tree]:
    """The initializer, and the shape that it is given."""
    match made:
        case Call("jnp.full", [shape, value]):
            return [Call("initializers.constant", [value]), shape]
        case Items(items=[Column() as mean, Items(items=[std, Call("jax.random.normal", [_, shape])])]) if (
            not any(mean.known)
        ):
            return [Call("initializers.normal", [std]), shape]
        case Call("jax.random.uniform", [_, shape], {"minval": Column() as low, "maxval": high}) if not any(
            low.known
        ):
            return [Call("initializers.uniform", [high]), shape]
        case Items(items=[Call() as function, Items("(", [Text(), shape], ")")]):
            return [function, shape]
    draws = _with_key(made, "key")
    return [Items(f"lambda {'_' if draws is None else 'key'}: ", [draws or made], "")]


def _function(made: Tree) -> list[Tree]:
    """The function of a variable, and its arguments."""
    match made:
        case Call("jnp.full", [shape, Column() as value, dtype], {}):
            for number, function in ((0, "jnp.zeros"), (1, "jnp.ones")):
                if all(one == number for one in value.known):
                    return [Text(function), shape, dtype]
            return [Text("jnp.full"), shape, value, dtype]
    return [Items("lambda: ", [_with_key(made, 'self.make_rng("params")') or made], "")]


def _with_key(tree: Tree, key: str) -> Tree | None:
    """A tree of draws with another key; None if it draws nothing."""
    if isinstance(tree, Call):
        args = _each(tree.args, key)
        return None if args is None else replace(tree, args=args)
    if isinstance(tree, Items):
        items = _each(tree.items, key)
        return None if items is None else replace(tree, items=items)
    return Text(key) if isinstance(tree, Text) and tree.text == KEY else None


def _each(trees: Sequence[Tree], key: str) -> list[Tree] | None:
    changed = [_with_key(tree, key) for tree in trees]
    if all(tree is None for tree in changed):
        return None
    return [new or old for new, old in zip(changed, trees, strict=True)]
