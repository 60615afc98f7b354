"""What the nodes of both trees have in common: leaves and children by name, and a description for messages."""

from collections.abc import Iterable
from typing import Any, Self

from torchjax_bridge.exchange import Path, join_path

__all__ = ["Node"]


class Node:
    """A module of either side. Subclasses know its path and class name."""

    leaves: dict[str, Any]
    children: dict[str | int, Any]

    def walk(self) -> Iterable[Self]:
        """This node and all below it, in the order of the children."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            if node.children:
                todo += reversed(node.children.values())

    @property
    def empty(self) -> bool:
        """Whether there is no leaf at or below this node."""
        return not self.leaves and all(child.empty for child in self.children.values())

    def _where(self, path: Path, kind: str | None) -> str:
        """The dotted path, and the class where it is known."""
        name = f"'{join_path(path)}'" if path else "the root"
        return f"{name} ({kind})" if kind else name
