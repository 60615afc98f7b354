"""What the docstring of ``__call__`` says: the shapes that it takes and gives, if all their axes have letters."""

import itertools
from collections.abc import Iterator, Sequence

from torchjax_bridge.recording import Value, tensors_of

from ._axis_letters import AxisLetters
from ._body import Body
from ._placed import Axes

__all__ = ["shape_of", "shape_text"]

_WIDTH = 96
_UNKNOWN = "The code of ``forward``."


def shape_text(bodies: Sequence[Body], letters: AxisLetters) -> str:
    """The docstring of a call, which is true of every instance of a class.

    Args:
        bodies: What the calls of the instances became.
        letters: What axes are called.
    """
    texts = {_text(body, letters) for body in bodies}
    return texts.pop() if len(texts) == 1 else _UNKNOWN


def _text(body: Body, letters: AxisLetters) -> str:
    orders = iter(body.orders)
    shapes: list[str | None] = []
    for _, tree in body.inputs:
        own = list(_shapes(zip(tensors_of(tree), orders), letters))  # noqa: B905
        is_list = isinstance(tree, list) and len(set(own)) == 1
        shapes += [f"a list of {own[0]}" if own[0] else None] if is_list else own
    places = (place.order for place in body.result_places)
    results = list(_shapes(zip(tensors_of(body.frame.result), places, strict=True), letters))
    if None in shapes or None in results:
        return _UNKNOWN
    for most in (2, 1):
        before, after = _listed(shapes, most), _listed(results, most)
        text = f"{before[:1].upper()}{before[1:]} to {after}."
        if before and after and len(text) <= _WIDTH:
            return text
    return _UNKNOWN


def _listed(shapes: Sequence[str | None], most: int) -> str:
    """The first three shapes; more equal ones in a row than ``most`` are counted."""
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby(shapes)]
    return " and ".join(
        f"{count} of {shape}" if count > most else " and ".join([str(shape)] * count)
        for shape, count in runs[:3]
    )


def _shapes(placed: "Iterator[tuple[Value, Axes]]", letters: AxisLetters) -> Iterator[str | None]:
    """The shapes of values as they stand in the code; None for one that has an axis without a letter."""
    for value, order in placed:
        yield "a number" if not value.shape or value.dtype is None else shape_of(value, order, letters)


def shape_of(value: Value, order: Axes, letters: AxisLetters) -> str | None:
    """The shape of an array whose axes stand in an order; None if an axis has no letter."""
    named = letters.of(value)
    if None in named:
        return None
    own = ", ".join(str(named[axis]) for axis in order)
    return f"``({own}{',' if len(order) == 1 else ''})``"
