"""Names that an emitted file needs itself, or that are no good: an argument or an attribute gets an underscore.

Arguments are lower case.
"""

import functools
import keyword

from flax import linen, nnx

from ._helpers import HELPERS

__all__ = ["RESERVED", "argument_name", "attribute_name"]

RESERVED = frozenset(
    {"self", "jnp", "jax", "nnx", "np", "nn", "math", "partial", "initializers", "Any", "train", *HELPERS}
    | {"I", "O", "l"}  # which are hard to tell from numbers
    | {"enumerate", "float", "int", "list", "range", "slice", "super", "tuple", "zip"}
)


def argument_name(name: str) -> str:
    """The argument of the emitted code for an argument of ``forward``."""
    lower = name.lower()
    return f"{lower}_" if lower in RESERVED else lower


def attribute_name(name: str) -> str:
    """The attribute of the Flax class for a name in torch, which may be a number."""
    if not name.isidentifier():
        return f"layer{name}"
    return f"{name}_" if name in _of_modules() or keyword.iskeyword(name) else name


@functools.lru_cache(maxsize=1)
def _of_modules() -> frozenset[str]:
    """What every module of nnx or linen has, and what emitted ones have."""
    return frozenset({*dir(nnx.Module), *dir(linen.Module), "rngs", "deterministic"})
