"""What a module made and did not return, while another module reads it: a hook or an attribute kept it.

A call of the module then returns it, too, beside what it returns. What depends on no input, as a table that a cache
of the process keeps, is made again where it is read.
"""

from collections.abc import Callable
from typing import Any

from ._frames import Frame, Node, Value
from ._numbers import Dim, Real

__all__ = ["calls_between", "made_again", "returned_too"]


def calls_between(outer: Frame, inner: Frame) -> list[Node]:
    """The calls through which a frame that has ended was reached from another one, innermost first.

    Empty where the one is not inside the other, or still runs.
    """
    calls: list[Node] = []
    frame = inner
    while frame is not outer:
        if frame.parent is None:
            return []
        call = next((node for node in reversed(frame.parent.nodes) if node.frame is frame), None)
        if call is None:
            return []
        calls.append(call)
        frame = frame.parent
    return calls


def returned_too(call: Node, value: Value) -> Value:
    """The value outside of a call of a module that is ``value`` inside, which the call now returns."""
    frame = call.frame
    if frame is None:
        raise ValueError("a layer of torch's own returns what it returns")
    if frame.parent is None:
        raise ValueError("nothing is outside of the model")
    if value in frame.kept:
        return frame.kept[value]
    if not frame.kept:
        frame.result, call.result = (frame.result, []), (call.result, [])
    outside = Value(value.shape, value.dtype, frame.parent, call, value.name, varies=value.varies)
    outside.constant = value.constant
    value.uses += 1
    frame.result[1].append(value)
    call.result[1].append(outside)
    frame.kept[value] = outside
    return outside


def made_again(value: Value, frame: Frame) -> Value | None:
    """A value of another module's call, made once more in a frame by the same functions.

    None if it depends on inputs or parameters, or if a module made it.
    """
    if value.varies:
        return None
    known: dict[Node, Node] = {}
    copied: dict[Value, Value] = {}

    def again(old: Value) -> Value:
        if old in copied:
            return copied[old]
        new = Value(old.shape, old.dtype, frame, old.origin, old.name, varies=False, constant=old.constant)
        copied[old] = new
        if isinstance(old.origin, Node):
            new.origin = call(old.origin)
        elif old.origin is None:
            raise LookupError("an argument of the other call")
        return new

    def call(old: Node) -> Node:
        if old in known:
            return known[old]
        if old.module is not None:
            raise LookupError("a module made it")
        known[old] = new = Node((), {}, old.source, function=old.function, inplace=old.inplace)
        new.args, new.kwargs = _mapped((old.args, old.kwargs), read)
        new.result = _mapped(old.result, lambda result: again(result))
        frame.nodes.append(new)
        return new

    def read(old: Value) -> Value:
        new = again(old)
        new.uses += 1
        return new

    before = len(frame.nodes)
    try:
        return again(value)
    except LookupError:
        del frame.nodes[before:]
        return None


def _mapped(tree: Any, change: Callable[[Value], Value]) -> Any:
    """The arguments or results of a call with other values; sizes are plain numbers."""
    if isinstance(tree, Value):
        return change(tree)
    if isinstance(tree, Dim):
        return int(tree)
    if isinstance(tree, Real):
        return float(tree)
    if isinstance(tree, tuple | list):
        items = [_mapped(item, change) for item in tree]
        return type(tree)._make(items) if hasattr(tree, "_make") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _mapped(item, change) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*_mapped((tree.start, tree.stop, tree.step), change))
    return tree
