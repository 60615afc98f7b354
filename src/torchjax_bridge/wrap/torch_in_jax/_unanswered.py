"""Notes what a trace was asked for and had no value for, also where the code catches the error and goes on.

Such code (``try: scale = x.max().item()`` with an ``except`` that takes 1.0) does in a trace what it does not do
with values, and its derivative would be that of another function.
"""

from typing import Any

from torch.overrides import TorchFunctionMode

from ._torch_internals import NEEDS_VALUES

__all__ = ["UnansweredQuestions", "asks_for_values", "forget"]


def asks_for_values(err: BaseException) -> bool:
    """Whether an error says that a fake tensor has no values."""
    return isinstance(err, NEEDS_VALUES) or ".numpy() is not supported for tensor subclasses" in str(err)


class UnansweredQuestions(TorchFunctionMode):
    """While active, a question without an answer is noted.

    Attributes:
        first: The error of the first such question; None as long as there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first: BaseException | None = None

    def __enter__(self) -> "UnansweredQuestions":
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        _active.remove(self)
        super().__exit__(*raised)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except BaseException as err:
            if self.first is None and asks_for_values(err):
                self.first = err
            raise


def forget(err: BaseException) -> None:
    """Say that the question which raised this was answered after all."""
    for noted in _active:
        if noted.first is err:
            noted.first = None


# There is one trace at a time.
_active: list[UnansweredQuestions] = []
