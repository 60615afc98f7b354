"""CODE CROSSES: functions and modules of one framework, called from the other.

Depends on ``exchange``. Every name loads its file on first touch (PEP 562), so that one direction does not
pay for the other, and flax is imported only by what wraps flax modules.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .jax_in_torch import as_torch_function as as_torch_function
    from .jax_in_torch import as_torch_module as as_torch_module
    from .torch_in_jax import as_jax_function as as_jax_function
    from .torch_in_jax import as_jax_module as as_jax_module

# The file that holds each name.
_LAZY = {
    "as_jax_function": "_jax_function",
    "as_jax_module": "_jax_module",
    "as_torch_function": "_torch_function",
    "as_torch_module": "_torch_module",
}

__all__ = [
    "as_jax_function",
    "as_jax_module",
    "as_torch_function",
    "as_torch_module",
]


if not TYPE_CHECKING:  # a type checker knows the names from above, and should complain of others

    def __getattr__(name: str) -> Any:
        file = _LAZY.get(name)
        if file is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{file}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
