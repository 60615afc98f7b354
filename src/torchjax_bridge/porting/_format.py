"""Source as the usual formatters lay it out: double quotes, no line longer than the limit.

Knows Python's brackets and nothing else.
"""

import io
import re
import tokenize

__all__ = ["formatted"]

_INDENT = "    "
# Operators that bind weakest first.
_PRIORITIES = (
    ("or",),
    ("and",),
    ("==", "!=", "<", "<=", ">", ">=", "in", "is"),
    ("|",),
    ("&",),
    ("+", "-"),
    ("*", "/", "//", "%", "@"),
)
_KEYWORD = re.compile(r"\b(return|not|and|or|in|is|if|else|lambda|for)\($")

# Between a name, an attribute or a number, and such a one.
_POWER = re.compile(
    r"(?<![\w.)\]])([A-Za-z_][\w.]*|\d[\w.]*) \*\* (-?(?:[A-Za-z_][\w.]*|\d[\w.]*))(?![\w.(\[])"
)
_LABEL = re.compile(r"getattr\(self, f'(\w+\{[^'\"]*\})'\)")  # the only f-strings of a file


def formatted(lines: list[str], limit: int) -> list[str]:
    """Lines of code, each a whole statement or the head of one, within a limit of characters.

    Args:
        lines: As ``ast.unparse`` gives them: one line each, with their indentation.
        limit: The most characters that a line should have; one without brackets may be longer.
    """
    found = []
    for line in lines:
        text = _POWER.sub(r"\1**\2", _spaced_slices(_double_quoted(line)))
        found += _split(text, limit) if line.strip() else [""]
    return found


def _double_quoted(line: str) -> str:
    line = _LABEL.sub(r'getattr(self, f"\1")', line)
    if "'" not in line:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    text = line.strip()
    parts, end = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and token.string[:1] == "'" and token.string[:3] != "'''":
            inner = token.string[1:-1]
            if '"' not in inner:
                start = token.start[1]
                escaped = inner.replace("\\'", "'")
                parts.append(text[end:start] + f'"{escaped}"')
                end = token.end[1]
    return indent + "".join(parts) + text[end:]


def _spaced_slices(line: str) -> str:
    """``x[:, ::self.stride]`` as ``x[:, :: self.stride]``: ends that are no plain name or number get spaces."""
    if ":" not in line or line.lstrip().startswith(("def ", "class ", '"')):
        return line
    stack: list[int] = []
    changes: list[tuple[int, int, str]] = []
    for place, character in _outside_strings(line):
        if character in "([{":
            stack.append(place)
        elif character in ")]}" and stack:
            start = stack.pop()
            if character == "]" and start and (line[start - 1].isalnum() or line[start - 1] in "_])"):
                at = start + 1
                for item in _items(line[start + 1 : place]):
                    changes.append((at, at + len(item), _slice(item)))
                    at += len(item) + 1
    nested = [c for c in changes if not any(o[0] <= c[0] and c[1] <= o[1] and o is not c for o in changes)]
    for begin, end, changed in sorted(nested, reverse=True):
        line = line[:begin] + changed + line[end:]
    return line


def _slice(item: str) -> str:
    lead = item[: len(item) - len(item.lstrip())]
    parts = _split_at(item.strip(), ":")
    if len(parts) == 1 or all(re.fullmatch(r"-?\w*", part) for part in parts):
        return item
    text = parts[0].strip()
    for place, part in enumerate(parts[1:]):
        text += " " if (parts[place].strip() or text) and not text.endswith(":") else ""
        text += ":" + (f" {part.strip()}" if part.strip() else "")
    return lead + text


def _split_at(text: str, mark: str) -> list[str]:
    """The parts of a text between marks that are in no bracket."""
    depth, start, found = 0, 0, []
    for place, character in _outside_strings(text):
        depth += (character in "([{") - (character in ")]}")
        if character == mark and depth == 0:
            found.append(text[start:place])
            start = place + 1
    return [*found, text[start:]]


def _conditional(line: str) -> list[str] | None:
    """The start, ``a``, ``if test`` and ``else b`` of ``start a if test else b``; no start inside of brackets."""
    found = re.match(r"( *(?:[\w.]+ = |return )?)(.*)", line)
    if found is None or line.endswith((",", ":")):
        return None
    start, text = found.groups()
    places: dict[str, int] = {}
    depth = 0
    for place, character in _outside_strings(text):
        depth += (character in "([{") - (character in ")]}")
        for word in (" if ", " else "):
            if depth == 0 and text.startswith(word, place):
                places.setdefault(word, place)
    if len(places) < 2 or places[" if "] > places[" else "]:
        return None
    first, second = places[" if "], places[" else "]
    return [start, text[:first], text[first + 1 : second], text[second + 1 :]]


def _operation(line: str) -> list[str] | None:
    """The start, and the operands of ``start a + b - c``: but for the first, each with the operator before it."""
    found = re.match(r"( *(?:[\w., ]+ = |return )?)(.*)", line)
    if found is None or line.endswith(":") or re.match(r" *(for|if|lambda)\b", line):
        return None
    start, text = found.groups()
    for operators in _PRIORITIES:
        depth, places = 0, [0]
        for place, character in _outside_strings(text):
            depth += (character in "([{") - (character in ")]}")
            if depth == 0 and any(text.startswith(f" {one} ", place) for one in operators):
                places.append(place + 1)
        if len(places) > 1:
            ends = [place - 1 for place in places[1:]]
            return [start, *(text[a:b] for a, b in zip(places, [*ends, None], strict=True))]
    return None


def _split(line: str, limit: int) -> list[str]:
    """A line split at its last bracket; where that leaves a longer one, at another bracket or at its operators."""
    if len(line) <= limit:
        return [line]
    pairs = _pairs(line)[::-1]
    lines = _split_at_brackets(line, limit, pairs[0] if pairs else None)
    for pair in pairs[1:]:
        if max(map(len, lines)) > limit:
            lines = min(lines, _split_at_brackets(line, limit, pair), key=lambda found: max(map(len, found)))
    longest = max(map(len, lines))
    operation = _operation(line) if longest > limit else None
    if operation is None:
        return lines
    start, *parts = operation
    indent = line[: len(line) - len(line.lstrip())]
    if start.strip():
        inner = [one for part in parts for one in _split(indent + _INDENT + part, limit)]
        other = [f"{start}(", *inner, f"{indent})"]
    else:  # inside of brackets
        other = [one for part in parts for one in _split(indent + part, limit)]
    return other if max(map(len, other)) < longest else lines


def _split_at_brackets(line: str, limit: int, pair: tuple[int, int] | None) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    conditional = _conditional(line)
    if conditional is not None:
        lead, *parts = conditional
        if not lead.strip():
            return [one for text in parts for one in _split(indent + text, limit)]
        whole = " ".join(parts)
        deeper = indent + _INDENT
        if len(deeper) + len(whole) <= limit:
            return [f"{lead}(", f"{deeper}{whole}", f"{indent})"]
        return [f"{lead}(", *(part for text in parts for part in _split(deeper + text, limit)), f"{indent})"]
    if pair is None:
        return [line]
    start, end = pair
    head, inside, tail = line[: start + 1], line[start + 1 : end], line[end:]
    items = _items(inside)
    deeper = indent + _INDENT
    loop = _comprehension(inside)
    if loop is not None:
        return [
            head,
            *_split(f"{deeper}{loop[0]}", limit),
            f"{deeper}{loop[1]}",
            *_split(indent + tail, limit),
        ]
    if len(deeper) + len(inside) <= limit and not _is_definition(line):
        if len(items) == 1 and not head.endswith("(") and not inside.strip().startswith("*"):
            return [head, f"{deeper}{inside.strip()}", *_split(indent + tail, limit)]
        if len(items) == 1 and "," not in inside:
            return [head, f"{deeper}{inside.strip()}", *_split(indent + tail, limit)]
        if not inside.rstrip().endswith(",") and not _is_collection(head):
            return [head, f"{deeper}{inside.strip()}", *_split(indent + tail, limit)]
    if _is_definition(line) and len(deeper) + len(inside) <= limit:
        return [head, f"{deeper}{inside.strip()}", indent + tail]
    if len(items) == 1 and not inside.rstrip().endswith(",") and not _takes_comma(head):
        return [head, *_split(f"{deeper}{inside.strip()}", limit), *_split(indent + tail, limit)]
    found = [head]
    for item in items:
        found += _split(f"{deeper}{item.strip()},", limit)
    return [*found, *_split(indent + tail, limit)]


def _takes_comma(head: str) -> bool:
    """Whether a comma after the only item changes nothing: in a call, a list or a dict, and not in ``(a + b)``."""
    return _is_collection(head) or (re.search(r"[\w\])]\($", head) is not None and not _KEYWORD.search(head))


def _is_collection(head: str) -> bool:
    """Whether what ends in a bracket begins a list or a dict."""
    return head.endswith("{") or (head.endswith("[") and not re.search(r"[\w\])]\[$", head))


def _comprehension(inside: str) -> tuple[str, str] | None:
    """The element and the ``for`` of a comprehension."""
    depth = 0
    for place, character in _outside_strings(inside):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and inside.startswith(" for ", place):
            return inside[:place].strip(), inside[place:].strip()
    return None


def _is_definition(line: str) -> bool:
    return line.lstrip().startswith(("def ", "class "))


def _pairs(line: str) -> list[tuple[int, int]]:
    """Each bracket at depth 0 that holds something, and where it closes; of a definition, that of its arguments."""
    stack: list[int] = []
    found = []
    for place, character in _outside_strings(line):
        if character in "([{":
            stack.append(place)
        elif character in ")]}" and stack:
            start = stack.pop()
            if not stack and place - start > 1:
                found.append((start, place))
    return found[:1] if _is_definition(line) else found


def _outside_strings(line: str) -> list[tuple[int, str]]:
    found, quote, skip = [], "", False
    for place, character in enumerate(line):
        if skip:
            skip = False
        elif quote:
            skip = character == "\\"
            if character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        else:
            found.append((place, character))
    return found


def _items(text: str) -> list[str]:
    """The arguments of a call; a comprehension is one."""
    depth, start, found = 0, 0, []
    for place, character in _outside_strings(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append(text[start:place])
            start = place + 1
    return [item for item in (*found, text[start:]) if item.strip()]
