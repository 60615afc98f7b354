"""How a torch tensor stands in the emitted code: an expression, and the order of its axes.

torch keeps channels first, Flax keeps them last. A permutation in torch emits no code: it changes the order.
"""

from dataclasses import dataclass, replace

from torchjax_bridge.errors import PortError

__all__ = ["Axes", "FollowsError", "Placed", "RefusedError", "Several", "channels_last", "torch_order"]

# ``order[place]`` is the torch axis that stands at that place of the emitted array.
Axes = tuple[int, ...]


class RefusedError(PortError):
    """One call has no translation; the port goes on, so that all such calls are reported at once."""


class FollowsError(RefusedError):
    """A call has no translation because a call before it, which is reported, has none."""


def torch_order(rank: int) -> Axes:
    """The order of torch itself."""
    return tuple(range(rank))


def channels_last(rank: int) -> Axes:
    """``(N, C, *space)`` as ``(N, *space, C)``."""
    return (0, *range(2, rank), 1) if rank > 2 else torch_order(rank)


@dataclass(frozen=True)
class Placed:
    """A value in the emitted code.

    Attributes:
        text: A Python expression: a name, an attribute, a call, or something in parentheses.
        order: The torch axis at each place of the emitted array.
        map_axis: The axis of features that are a flattened map in Flax's order ``(*space, C)``, or None.
        map_shape: The ``(C, *space)`` of that map.
    """

    text: str
    order: Axes
    map_axis: int | None = None
    map_shape: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.order)

    def place(self, axis: int) -> int:
        """Where a torch axis (which may be negative) stands."""
        return self.order.index(axis % self.rank if self.rank else 0)

    def with_text(self, text: str) -> "Placed":
        """The same layout, another expression."""
        return replace(self, text=text)


@dataclass(frozen=True)
class Several:
    """The results of a call that returns several arrays: one expression, one layout for each array.

    ``items`` are the expressions of each by itself, where code that reads few of them is better off with these.
    """

    text: str
    orders: tuple[Axes, ...]
    items: tuple[str, ...] = ()
