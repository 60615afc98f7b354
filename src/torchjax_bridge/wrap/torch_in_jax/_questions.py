"""Answers for code that asks a tensor for a value in a trace, where there are none.

Owns the questions and their answers. A question is answered only where the answer cannot change the result:

* One of the two answers ends in an error. In ``if not x.all(): raise ...``, and in an assertion, only one
  branch has a result. Both are tried; one that raises in the very function that asked is not taken. Where
  neither raises, the answer would choose between results, and is not given. A branch that raises because it is
  traced does not count: it asked for another value, or knows of compilers.
* torch asks whether a mask is causal, which only chooses a faster kernel, or ``torch.distributions`` ask
  whether their arguments are valid.

If that does not do, the code is traced once more with ``torch.compiler.is_compiling()`` true. Libraries have
branches for it, with equal results.

Code that runs for its value has the values, so there it asks and checks as always.
"""

import dis
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

from torchjax_bridge.errors import WrapError

from ._torch_internals import NEEDS_VALUES, compiling
from ._trace import NeedsValues, is_fake
from ._unanswered import forget

__all__ = ["answer_questions"]

_Call = Callable[..., Any]
_Found = TypeVar("_Found")

# After so many questions the code is given up.
_MAX_QUESTIONS = 64
# A question without an answer raises one of these. Only a RuntimeError of a known question counts.
_UNANSWERED: tuple[type[BaseException], ...] = (*NEEDS_VALUES, RuntimeError)
_RAISE = dis.opmap["RAISE_VARARGS"]


class _Place(NamedTuple):
    """Where in the code a question is asked."""

    code: types.CodeType
    instruction: int


class _Answer(NamedTuple):
    place: _Place
    value: bool


def answer_questions(call: _Call, inspect: Callable[[_Call], _Found]) -> tuple[_Call, _Found] | None:
    """The call with answers to the questions that it asks in a trace, and what ``inspect`` finds for it.

    Args:
        call: Torch code that asked for a value in a trace.
        inspect: Traces a call; raises `NeedsValues` if the call asks for a value.

    Returns:
        None if an answer would choose between results.

    Raises:
        WrapError: All questions are answered, and the code cannot be wrapped for another reason.
    """
    for as_compiled in (False, True):
        trial = _find_answers(call, inspect, as_compiled)
        if trial is not None:
            return _with_answers(call, trial.given, as_compiled), trial.found
    return None


@dataclass(frozen=True, slots=True)
class _Trial:
    """A trace with some answers, and its outcome: a finding, a further question, or an error."""

    given: tuple[_Answer, ...]
    found: Any = None
    open: _Place | None = None
    error: Exception | None = None


def _find_answers(call: _Call, inspect: Callable[[_Call], Any], as_compiled: bool) -> _Trial | None:
    def attempt(given: tuple[_Answer, ...], compiled_to_the_end: bool = True) -> _Trial:
        answers = _Answers(given)
        once = _with_answers(call, given, as_compiled, answers, compiled_to_the_end)
        try:
            return _Trial(given, found=inspect(once))
        except NeedsValues:
            return _Trial(given, open=answers.open)
        except BaseException as err:
            if not isinstance(err, Exception):
                raise
            return _Trial(given, error=err)

    def ends_in_an_error(trial: _Trial, place: _Place) -> bool:
        """Whether code with values raises too, and not because it takes the trace for a compiler's."""
        return _raises_at(trial, place) and (
            not as_compiled or _raises_at(attempt(trial.given, compiled_to_the_end=False), place)
        )

    trial = attempt(())
    while trial.open and len(trial.given) < _MAX_QUESTIONS:
        tried = [attempt((*trial.given, _Answer(trial.open, value))) for value in (True, False)]
        possible = [other for other in tried if not ends_in_an_error(other, trial.open)]
        if len(possible) != 1:
            return None
        (trial,) = possible
    if isinstance(trial.error, WrapError):
        raise trial.error
    return trial if trial.error is None and trial.open is None and trial.found is not None else None


def _raises_at(trial: _Trial, place: _Place) -> bool:
    """Whether it ended in a ``raise`` or ``assert`` of the function that asked."""
    trace = None if trial.error is None else trial.error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code is not place.code:
        return False
    return place.code.co_code[trace.tb_lasti] == _RAISE


def _with_answers(
    call: _Call,
    given: Sequence[_Answer],
    as_compiled: bool,
    answers: Any = None,
    compiled_to_the_end: bool = True,
) -> _Call:
    """The call with these answers, if it runs in a trace.

    Without ``compiled_to_the_end``, ``is_compiling()`` is false again once the last answer is given.
    """

    def answered(*tensors: torch.Tensor) -> Any:
        if not is_fake(torch.empty(0)):
            return call(*tensors)
        given_now = answers or _Answers(given)
        with given_now, compiling() if as_compiled else nullcontext() as stop_compiling:
            if not compiled_to_the_end:
                given_now.after_the_last = stop_compiling
            return call(*tensors)

    return answered


class _Answers(TorchFunctionMode):
    """Gives the known answers, and to other questions the given ones in order.

    Attributes:
        open: The first question without an answer.
        after_the_last: Called when the last answer is given.
    """

    def __init__(self, given: Sequence[_Answer]) -> None:
        super().__init__()
        self.open: _Place | None = None
        self.after_the_last: Callable[[], None] | None = None
        self._given = deque(given)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except _UNANSWERED as err:
            if func is torch._assert and isinstance(err, NEEDS_VALUES):
                forget(err)
                return None
            if func not in _QUESTIONS or (func in _OF_ONE_VALUE and not _is_bit(args[0])):
                raise
            frame = sys._getframe(1)
            answer = _known(frame)
            if answer is None:
                answer = self._next(_Place(frame.f_code, frame.f_lasti))
            if answer is None:
                raise
            forget(err)
            return answer

    def _next(self, place: _Place) -> bool | None:
        """The next given answer; None where there is none, or where it is for another question."""
        if not self._given:
            self.open = self.open or place
            return None
        answer = self._given.popleft()
        if answer.place != place:
            return None
        if not self._given and self.after_the_last is not None:
            self.after_the_last()
        return answer.value


_OF_ONE_VALUE = (torch.Tensor.__bool__, torch.Tensor.item)
_QUESTIONS = (*_OF_ONE_VALUE, torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose)


def _is_bit(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.bool and tensor.numel() == 1


def _known(frame: types.FrameType) -> bool | None:
    """The answer to a question that torch itself asks, if it does not change the result."""
    if frame.f_globals.get("__name__") == "torch.distributions.constraints":
        caller: types.FrameType | None = frame
        while caller is not None and caller.f_code not in _VALIDATING:
            caller = caller.f_back
        return None if caller is None else True  # are the values valid so far?
    return _KNOWN.get(frame.f_code)


def _codes(answers: dict[Any, bool]) -> dict[types.CodeType, bool]:
    return {function.__code__: answer for function, answer in answers.items() if function is not None}


_distribution = torch.distributions.Distribution
_VALIDATING = (_distribution.__init__.__code__, _distribution._validate_sample.__code__)
# By the function that asks. A private one may be missing in other releases.
_KNOWN = _codes(
    {
        getattr(transformer, "_detect_is_causal_mask", None): False,  # a flag for a faster kernel
        torch.distributions.Wishart.__init__: False,  # is a parameter out of range, or low?
        torch.distributions.Geometric.__init__: True,  # are all valid?
    }
)
