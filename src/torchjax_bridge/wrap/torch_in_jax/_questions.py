"""Code that asks a tensor for a value, which a trace does not have: when its answer cannot matter, it is given.

A trace that fails on a value is tried again, as libraries expect to be traced, and only then given up:

* A question is answered where every other answer ends in an error: of ``if not x.all(): raise ...``, and of an
  assertion, only one branch has a result. Both are tried, and the one that raises in the very function that asked
  is not taken. Where both go on, the answer is a choice between results, and is not given.
* So it is where torch asks whether a mask is causal, which only chooses a faster kernel, and where distributions
  ask whether their arguments are valid.
* ``torch.compiler.is_compiling()`` is true: libraries have branches of their own for it, with equal results.

What is run for its value has the values, and so asks and checks as ever. Owns the questions and their answers.
"""

import dis
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

from torchjax_bridge.errors import WrapError

from ._graph import NeedsValues, is_fake
from ._torch_internals import NEEDS_VALUES, compiling

__all__ = ["settled"]

_Call = Callable[..., Any]
_Found = TypeVar("_Found")

# Code that asks more often is not asked any longer.
_MOST = 64
# A tracer that has no values raises one of these; RuntimeErrors of other kinds are told apart by the question.
_UNANSWERED: tuple[type[BaseException], ...] = (*NEEDS_VALUES, RuntimeError)
_RAISE = dis.opmap["RAISE_VARARGS"]


class _Place(NamedTuple):
    """Where in the code a question is asked."""

    code: types.CodeType
    instruction: int


class _Answer(NamedTuple):
    place: _Place
    value: bool


def settled(call: _Call, inspect: Callable[[_Call], _Found]) -> tuple[_Call, _Found] | None:
    """The call with answers to the questions that it asks in a trace, and what ``inspect`` finds out about that.

    Args:
        call: Torch code, which in a trace has asked for a value.
        inspect: Traces a call; raises `NeedsValues` where that asks for one.

    Returns:
        None where an answer would choose between results.

    Raises:
        WrapError: The code asks for nothing more, and cannot be wrapped for another reason.
    """
    for as_compiled in (False, True):
        trial = _settled(call, inspect, as_compiled)
        if trial is not None:
            return _answered(call, trial.given, as_compiled), trial.found
    return None


@dataclass(frozen=True, slots=True)
class _Trial:
    """What came of a trace with some answers: a finding, a further question, or an error."""

    given: tuple[_Answer, ...]
    found: Any = None
    open: _Place | None = None
    error: Exception | None = None


def _settled(call: _Call, inspect: Callable[[_Call], Any], as_compiled: bool) -> _Trial | None:
    def attempt(given: tuple[_Answer, ...]) -> _Trial:
        answers = _Answers(given)
        try:
            return _Trial(given, found=inspect(_answered(call, given, as_compiled, answers)))
        except NeedsValues:
            return _Trial(given, open=answers.open)
        except BaseException as err:
            if not isinstance(err, Exception):
                raise
            return _Trial(given, error=err)

    trial = attempt(())
    while trial.open and len(trial.given) < _MOST:
        tried = [attempt((*trial.given, _Answer(trial.open, value))) for value in (True, False)]
        possible = [other for other in tried if not _raises_at(other, trial.open)]
        if len(possible) != 1:
            return None
        (trial,) = possible
    if isinstance(trial.error, WrapError):
        raise trial.error
    return trial if trial.error is None and trial.open is None and trial.found is not None else None


def _raises_at(trial: _Trial, place: _Place) -> bool:
    """Whether it ended in a ``raise`` or ``assert`` of the function that had asked."""
    trace = None if trial.error is None else trial.error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code is not place.code:
        return False
    return place.code.co_code[trace.tb_lasti] == _RAISE


def _answered(call: _Call, given: Sequence[_Answer], as_compiled: bool, once: Any = None) -> _Call:
    """The call, which in a trace gets these answers."""

    def answered(*tensors: torch.Tensor) -> Any:
        if not is_fake(torch.empty(0)):
            return call(*tensors)
        with once or _Answers(given), compiling() if as_compiled else nullcontext():
            return call(*tensors)

    return answered


class _Answers(TorchFunctionMode):
    """Answers what is known, then what is given, in order; ``open`` is the first question with no answer."""

    def __init__(self, given: Sequence[_Answer]) -> None:
        super().__init__()
        self.open: _Place | None = None
        self._given: Iterator[_Answer] = iter(given)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except _UNANSWERED as err:
            if func is torch._assert and isinstance(err, NEEDS_VALUES):
                return None
            if func not in _QUESTIONS or (func in _OF_ONE and not _is_bit(args[0])):
                raise
            frame = sys._getframe(1)
            known = _known(frame)
            if known is not None:
                return known
            place, answer = _Place(frame.f_code, frame.f_lasti), next(self._given, None)
            if answer is None:
                self.open = self.open or place
            if answer is None or answer.place != place:
                raise
            return answer.value


_OF_ONE = (torch.Tensor.__bool__, torch.Tensor.item)
_QUESTIONS = (*_OF_ONE, torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose)


def _is_bit(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.bool and tensor.numel() == 1


def _known(frame: types.FrameType) -> bool | None:
    """The answer to a question of torch's own that does not choose between results."""
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
# By the function that asks; a private one that torch does not have any longer asks nothing.
_KNOWN = _codes(
    {
        getattr(transformer, "_detect_is_causal_mask", None): False,  # a flag for a faster kernel
        torch.distributions.Wishart.__init__: False,  # is a parameter out of range, or low?
        torch.distributions.Geometric.__init__: True,  # are all valid?
    }
)
