"""Which questions about values are one: asked of what the same functions made of the same tensors."""

from typing import Any

from torchjax_bridge.recording import (
    RANDOM,
    Decision,
    Dim,
    Node,
    Operation,
    Real,
    SizeOf,
    Value,
)

__all__ = ["question_of"]

_DEEPEST = 16  # calls above a question


def question_of(decision: Decision) -> object:
    """A key that two decisions have in common if no input answers one in another way than the other.

    It may differ where the answers are the same, too.
    """
    return decision.reason, tuple(_key(value, _DEEPEST) for value in decision.asked)


def _key(tree: Any, left: int) -> object:
    """What a value was made of; of any other argument what it says."""
    if isinstance(tree, Value):
        return _value_key(tree, left)
    if isinstance(tree, Dim | Real):
        return _size_key(tree.expression, left)
    if isinstance(tree, tuple | list):
        return tuple(_key(item, left) for item in tree)
    if isinstance(tree, dict):
        return tuple((name, _key(item, left)) for name, item in tree.items())
    if isinstance(tree, slice):
        return "slice", _key((tree.start, tree.stop, tree.step), left)
    return type(tree), repr(tree)


def _value_key(value: Value, left: int) -> object:
    made = value.origin
    if not left or not isinstance(made, Node) or made.module is not None or made.inplace:
        return id(value)
    name = made.function.rpartition(".")[2]
    if name in RANDOM or made.result is not value:
        return id(value)
    if _is_whole(name, made):
        return _value_key(made.args[0], left)
    return made.function, _key((made.args, made.kwargs), left - 1)


def _is_whole(name: str, made: Node) -> bool:
    """Whether a slice leaves nothing out."""
    if name != "__getitem__":
        return False
    whole, index = made.args
    parts = index if isinstance(index, tuple) else (index,)
    return whole.shape == made.result.shape and all(isinstance(part, slice) for part in parts)


def _size_key(expression: Any, left: int) -> object:
    if isinstance(expression, SizeOf):
        return _key(expression.value, left), expression.axis
    if isinstance(expression, Operation):
        return (
            expression.symbol,
            _size_key(expression.left, left),
            _size_key(expression.right, left),
        )
    return repr(expression)
