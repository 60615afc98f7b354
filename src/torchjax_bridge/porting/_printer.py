"""Text with places where a line may end, printed within a limit of characters.

All places of one group end lines together, if the group does not fit on one line.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "COMMA",
    "END",
    "SPACE",
    "Break",
    "Group",
    "Indent",
    "Text",
    "bracketed",
    "flat",
    "in_optional_brackets",
    "joined",
    "printed",
]

_INDENT = 4


@dataclass(frozen=True)
class Break:
    """What stands in a group that is on one line, and what in one that is not."""

    flat: str
    broken: str = "\n"


@dataclass(frozen=True)
class Indent:
    content: "Text"


@dataclass(frozen=True)
class Group:
    """On one line if that fits; otherwise each of its own breaks is one."""

    content: "Text"


Text: TypeAlias = str | Break | Indent | Group | Sequence["Text"]
_Place: TypeAlias = tuple[int, bool, Text]  # how far it is indented, and whether its group is broken
END, SPACE, COMMA = Break(""), Break(" "), Break("", ",")


def printed(text: Text, limit: int, indent: int, expand: bool = False) -> str:
    """The text in lines within a limit; with ``expand``, no group is on one line."""
    stack: list[_Place] = [(indent, True, text)]
    found = ""
    while stack:
        indent, broken, text = stack.pop()
        if isinstance(text, str):
            found += text
        elif isinstance(text, Break):
            part = text.broken if broken else text.flat
            found += part + " " * indent if part == "\n" else part
        elif isinstance(text, Indent):
            stack.append((indent + _INDENT, broken, text.content))
        elif isinstance(text, Group):
            room = limit - len(found) + found.rfind("\n") + 1
            broken = broken and (expand or not _fits([*stack, (indent, False, text.content)], room))
            stack.append((indent, broken, text.content))
        else:
            stack += [(indent, broken, part) for part in reversed(text)]
    return found


def _fits(stack: list[_Place], room: int) -> bool:
    """Whether what is on top of a stack, and below it all up to where a line may end, has room."""
    while stack and room >= 0:
        indent, broken, text = stack.pop()
        if isinstance(text, Break):
            text = text.broken if broken else text.flat
        if text == "\n":
            return True
        if isinstance(text, str):
            room -= len(text)
        elif isinstance(text, Indent | Group):
            stack.append((indent, broken, text.content))
        elif not isinstance(text, Break):
            stack += [(indent, broken, part) for part in reversed(text)]
    return room >= 0


def bracketed(ends: str, content: Text) -> Text:
    return Group([ends[0], Indent([END, content]), END, ends[1]]) if content else ends


def in_optional_brackets(content: Text) -> Text:
    return Group([Break("", "("), Indent([END, content]), END, Break("", ")")])


def joined(texts: Sequence[Text], least: int = 2) -> list[Text]:
    """Texts with commas between them, and in lines after the last, if there are as many as ``least``."""
    found = [part for text in texts for part in (text, ",", SPACE)][:-2]
    return [*found, COMMA] if len(texts) >= least else found


def flat(text: Text) -> str:
    return printed(Group(text), sys.maxsize, 0)
