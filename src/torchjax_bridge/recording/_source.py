"""Where the author wrote a call: file, line, and which execution of that line it was.

Reads the stack of the running program; of source text only what a condition decides.
"""

import ast
import functools
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType

import torch

__all__ = ["SourceLine", "author_line", "only_hints", "only_raises", "runs_in_function", "torch_line"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_RECORDER = os.path.join(os.path.dirname(__file__), "_recorder.py")
_APPLY = torch.autograd.Function.apply.__code__
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclass(frozen=True)
class SourceLine:
    """A line of the author's code while it ran.

    Attributes:
        file: The file, or ``""`` where the code has none.
        line: The line, from 1.
        code: The function that the line is in.
        instruction: The place of the call in the bytecode of the function. Two calls of one line differ in it,
            and it goes back when a loop starts again.
        caller: The line that called that function, if the author's ``forward`` did not make the call itself.
    """

    file: str = ""
    line: int = 0
    code: CodeType | None = None
    instruction: int = 0
    caller: "SourceLine | None" = None

    @property
    def text(self) -> str:
        """The line as it stands in the file, or ``""``."""
        return linecache.getline(self.file, self.line).strip() if self.file else ""

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}" if self.file else "an unknown line"


def author_line() -> SourceLine:
    """The innermost running line that belongs neither to torch nor to this library, and is part of the model.

    What calls the recording is none: where the model itself is a module of torch's, its own line is taken.
    """
    frame: FrameType | None = sys._getframe(1)
    outermost: FrameType | None = None
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, _OURS, "<frozen")):
        if frame.f_code.co_name == "record" and frame.f_code.co_filename == _RECORDER:
            return _line(outermost, 0)
        if frame.f_code.co_name == "forward":
            outermost = frame
        frame = frame.f_back
    return _line(frame, 8)


def torch_line() -> SourceLine | None:
    """The innermost running line if it is torch's own; None where the author's runs, or this library alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return None if frame is None or not frame.f_code.co_filename.startswith(_TORCH) else _line(frame, 0)


def only_raises(line: SourceLine) -> bool:
    """Whether a line only decides if an error or a warning is given: what it does not refuse is computed alike."""
    return line.line in _checks(line.file)


@functools.lru_cache(maxsize=64)
def _checks(file: str) -> frozenset[int]:
    """The lines of a file with conditions of errors and warnings."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    return frozenset(
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.Assert) and _refuses(node)
        for line in range(node.test.lineno, (node.test.end_lineno or node.test.lineno) + 1)
    )


def _refuses(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return all(map(_refuses, [*statement.body, *statement.orelse]))
    warns = isinstance(statement, ast.Expr) and "warn" in ast.unparse(statement.value).partition("(")[0]
    return warns or isinstance(statement, ast.Assert | ast.Raise | ast.Pass)


def runs_in_function() -> bool:
    """Whether the ``forward`` of an ``autograd.Function`` is running, where torch keeps no gradients of its own."""
    return any(frame.f_code is _APPLY for frame in _running())


def only_hints() -> bool:
    """Whether torch asks if a mask is causal, which is a hint beside the mask itself and changes no result."""
    return any(
        frame.f_code.co_name == "_detect_is_causal_mask" and frame.f_code.co_filename.startswith(_TORCH)
        for frame in _running()
    )


def _running() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _line(frame: FrameType | None, most: int) -> SourceLine:
    """The running line of a frame, with the author's lines that called it, up to torch's own."""
    if frame is None:
        return SourceLine()
    outer, caller = frame.f_back, None
    inside = frame.f_code.co_name not in ("forward", "__call__", "<module>")
    if most and inside and outer is not None and not outer.f_code.co_filename.startswith((_TORCH, _OURS)):
        caller = _line(outer, most - 1)
    return SourceLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code, frame.f_lasti, caller)
