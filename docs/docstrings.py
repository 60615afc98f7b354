"""A griffe extension that adapts docstrings to mkdocstrings; loaded by mkdocs.yml.

Marks examples and drawings as code, because Markdown takes ``>>>`` for quotations. Adds the return type to
``Returns:``, because the colon in "A new thing: ..." would end a type.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?m)^([ ]*)>>> (?:.+\n?)+")
_DRAWING = re.compile(r"(?m)^::\n\n((?:    .+\n)+)")
_RETURNS = re.compile(r"(?m)^Returns:\n    (?=\S)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is None:
            return
        text = _EXAMPLE.sub(_as_code, obj.docstring.value)
        text = _DRAWING.sub(r"```text\n\1```\n", text)
        returns = getattr(obj, "returns", None)
        if returns is not None:
            text = _RETURNS.sub(lambda found: f"{found[0]}{returns}: ", text)
        obj.docstring.value = text


def _as_code(example: re.Match[str]) -> str:
    indent = example[1]
    return f"{indent}```pycon\n{example[0].rstrip()}\n{indent}```\n"
