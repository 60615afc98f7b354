"""Sizes that Python code turned into plain numbers: found by a second recording with other sizes.

``len(x)``, ``int(n)`` and ``math.ceil(n / 2)`` forget where a number came from, so one recording holds the
number of the example. A number that differs in a second recording is a size of some tensor, and is given that
origin. If it is none, or if the second run made other calls, that is a fault.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ._faults import Fault
from ._frames import Constant, Frame, Value, tensors_of
from ._numbers import Dim, Expression, Operation, SizeOf, is_size
from ._recorder import Recording
from ._source import SourceLine

__all__ = ["generalize"]

_Noted = Callable[[str], None]


def generalize(recording: Recording, other: Recording) -> list[Fault]:
    """Give the numbers of a recording that are sizes an origin.

    Args:
        recording: What is changed.
        other: A recording of the same module with inputs of other sizes.

    Returns:
        What holds for the sizes of the first recording alone.
    """
    faults: list[Fault] = []
    _frames(recording.top, other.top, faults)
    return faults


def _frames(frame: Frame, other: Frame, faults: list[Fault]) -> None:
    pairs = [_values(frame.inputs, other.inputs)]

    def fault_at(source: SourceLine, told: bool) -> _Noted:
        return lambda words: faults.append(Fault(words, frame.path, source, follows=told))

    for place, node in enumerate(frame.nodes):
        twin = other.nodes[place] if place < len(other.nodes) else None
        fault = fault_at(node.source, node.told)
        if twin is None or (node.function, node.path) != (twin.function, twin.path):
            fault("with inputs of other sizes torch makes other calls from here on")
            return
        if len(_values(node.result, node.result)) != len(_values(twin.result, twin.result)):
            fault("with inputs of other sizes torch makes more or fewer tensors; compute with the whole one")
            return
        if node.frame is not None and twin.frame is not None:
            _frames(node.frame, twin.frame, faults)
        own = _values((node.args, node.kwargs), (twin.args, twin.kwargs))
        node.args = _tree(node.args, twin.args, [own, *pairs], fault)
        node.kwargs = _tree(node.kwargs, twin.kwargs, [own, *pairs], fault)
    if len(other.nodes) > len(frame.nodes):
        last = other.nodes[len(frame.nodes)]
        fault_at(last.source, last.told)("with inputs of other sizes torch makes more calls")
    if frame.nodes:
        frame.result = _tree(frame.result, other.result, pairs, fault_at(frame.end, frame.told))


def _values(one: Any, two: Any) -> list[tuple[Value, Value]]:
    """The values of two calls, side by side."""
    return list(zip(tensors_of(one), tensors_of(two), strict=False))


def _tree(
    one: Any,
    two: Any,
    visible: list[list[tuple[Value, Value]]],
    fault: _Noted,
) -> Any:
    """The first of two arguments, with an origin for the numbers in which they differ."""
    if isinstance(one, Value):
        if isinstance(one.origin, Constant) and not _same_constant(one, two):
            fault("a tensor that no call made depends on sizes")
        return one
    if isinstance(one, tuple | list) and isinstance(two, tuple | list) and len(one) == len(two):
        items = [_tree(a, b, visible, fault) for a, b in zip(one, two, strict=True)]
        return type(one)._make(items) if hasattr(one, "_make") else type(one)(items)
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {key: _tree(item, two[key], visible, fault) for key, item in one.items()}
    if isinstance(one, slice) and isinstance(two, slice):
        ends = ((one.start, two.start), (one.stop, two.stop), (one.step, two.step))
        return slice(*(_tree(a, b, visible, fault) for a, b in ends))
    if is_size(one):
        return one
    if type(one) is type(two) and (
        not isinstance(one, int | float | str) or one == two or repr(one) == repr(two) == "nan"
    ):
        return one
    if isinstance(one, int) and isinstance(two, int):
        for pairs in visible:
            for expression in _sizes(int(one), int(two), pairs):
                return Dim(one, expression)
    if isinstance(one, str) and isinstance(two, str):
        fault(f"{one!r} is {two!r} with inputs of other sizes, and a port has one of them for all")
        return one
    fault(
        f"{one!r} is {two!r} with inputs of other sizes, and is no size of a tensor that this call can see, nor "
        "computed from sizes by operators (write n**0.5 for math.sqrt(n))"
    )
    return one


def _same_constant(one: Value, two: Any) -> bool:
    if (
        not isinstance(two, Value)
        or not isinstance(two.origin, Constant)
        or not isinstance(one.origin, Constant)
    ):
        return False
    first, second = one.origin.tensor, two.origin.tensor
    if first is None or second is None:
        return True  # the recording says what is wrong
    if first.is_meta or second.is_meta:
        return one.shape == two.shape
    return first.shape == second.shape and bool((first == second).all())


def _sizes(one: int, two: int, pairs: list[tuple[Value, Value]]) -> Iterator[Expression]:
    """Expressions over sizes of these values that are ``one`` in the first recording and ``two`` in the second."""
    axes = [
        (SizeOf(value, axis), size, other.shape[axis])
        for value, other in pairs
        if len(value.shape) == len(other.shape)
        for axis, size in enumerate(value.shape)
        if size != other.shape[axis]
    ]
    yield from (size for size, a, b in axes if (a, b) == (one, two))
    for size, a, b in axes:
        if a and b and one % a == 0 and two % b == 0 and one // a == two // b:
            yield Operation("*", size, one // a)
