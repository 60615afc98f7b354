"""Where the author wrote a call: file, line, and which execution of that line it was.

Reads the stack of the running program. Does not read source text.
"""

import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType

import torch

__all__ = ["SourceLine", "author_line", "only_hints", "runs_in_function"]

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
