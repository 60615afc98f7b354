"""Which cases of a test run every time, where all of them take minutes."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["slow_but"]


def slow_but(fast: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """All cases for ``parametrize``, a tuple for several arguments; those not among ``fast`` are marked slow."""
    return [
        case
        if case in fast
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in every
    ]
