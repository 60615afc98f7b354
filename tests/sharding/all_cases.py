"""The cases of a job, in the order in which every process runs them."""

from collections.abc import Callable

import exchange_cases
import weights_cases


def cases(count: int) -> dict[str, Callable[[], None]]:
    """The cases for a job of this size."""
    prefixes = ("case_", "four_") if count == 4 else ("case_",)
    return {
        name: case
        for module in (exchange_cases, weights_cases)
        for prefix in prefixes
        for name, case in vars(module).items()
        if name.startswith(prefix)
    }
