"""``residual = x`` where the author kept a value under another name before he used its name again.

Works on statements that have no names yet. Reads the author's source as a hint.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

from ._authors import author_aliases
from ._body import Body
from ._names import VARIABLE, Line
from ._reserved import argument_name

__all__ = ["with_aliases"]

_counter = itertools.count(1)


def with_aliases(body: Body, lines: Sequence[Line], always: bool = False) -> list[Line]:
    """The statements, with a copy of each value that is read after its name means something else.

    Args:
        body: The body.
        lines: Its statements.
        always: Whether to copy values that are not read, too, so that bodies which read them are like the others.
    """
    found = list(lines)
    code = body.frame.code
    for alias, name, written in author_aliases(code) if code is not None else ():
        # The variable that bears the name where the author copies it.
        before = [
            (place, line)
            for place, line in enumerate(found)
            if line.source.code is code and line.source.line < written
        ]
        own = [line.names[0] for _, line in before if line.author == (name,) and len(line.names) == 1]
        own = own or [variable for variable, text in body.names.items() if text == argument_name(name)]
        if not own:
            continue
        variable = own[-1]
        start = next(
            (
                place
                for place, line in enumerate(found)
                if line.author == (name,) and line.source.code is code and line.source.line > written
            ),
            None,
        )
        if start is None:
            continue
        if not always and not any(variable in VARIABLE.findall(line.text) for line in found[start + 1 :]):
            continue
        copied = f"_v{2 * 10**6 + next(_counter)}_"
        line = Line((copied,), copied, variable, author=(alias,), is_alias=True)
        after = [replace(o, text=re.sub(variable, copied, o.text)) for o in found[start + 1 :]]
        found = [*found[:start], line, found[start], *after]
    return found
