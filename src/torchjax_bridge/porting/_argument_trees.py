"""The arguments and results of calls, trees of arrays and numbers: their expressions, and what takes them apart."""

from collections.abc import Callable, Mapping
from typing import Any

from torchjax_bridge.recording import Value, is_size

__all__ = ["has_dict", "parts_of", "pattern", "takes", "tree_text"]


def takes(tree: Any) -> bool:
    """Whether an argument is passed on: it holds a tensor or a size."""
    if isinstance(tree, tuple | list):
        return any(map(takes, tree))
    if isinstance(tree, dict):
        return any(map(takes, tree.values()))
    return isinstance(tree, Value) or is_size(tree)


def tree_text(tree: Any, text_of: Callable[[Value], str], number: Callable[[Any], str]) -> str:
    """The expression of a tree of values and numbers."""
    if isinstance(tree, Value):
        return text_of(tree)
    if not isinstance(tree, dict | tuple | list):
        return number(tree)
    items = tree.values() if isinstance(tree, dict) else tree
    texts = [tree_text(item, text_of, number) for item in items]
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {text}" for key, text in zip(tree, texts, strict=True)) + "}"
    if isinstance(tree, list):
        return f"[{', '.join(texts)}]"
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def parts_of(name: str, tree: Any) -> list[tuple[Value, str]]:
    """The arrays of an argument, each with its expression."""
    if isinstance(tree, Value):
        return [(tree, name)]
    if isinstance(tree, dict):
        return [pair for key, item in tree.items() for pair in parts_of(f"{name}[{key!r}]", item)]
    if isinstance(tree, tuple | list):
        return [pair for place, item in enumerate(tree) for pair in parts_of(f"{name}[{place}]", item)]
    return []


def has_dict(tree: Any) -> bool:
    """Whether a mapping is in a result, which no left side takes apart."""
    return isinstance(tree, dict) or (isinstance(tree, tuple | list) and any(map(has_dict, tree)))


def pattern(tree: Any, names: Mapping[Value, str]) -> str:
    """The left side that takes a result apart."""
    if isinstance(tree, Value):
        return names[tree]
    if isinstance(tree, tuple | list):
        return "(" + "".join(f"{pattern(item, names)}, " for item in tree) + ")"
    return "_"
