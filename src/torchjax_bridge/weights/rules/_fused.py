"""The hint for layers that one side keeps as one: which they are, and in which order.

A hint like those of ``_hints``; `pairing` finds the tensors and leaves.
"""

from dataclasses import dataclass

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path

from ._hints import matches_path

__all__ = ["Fused"]


@dataclass(frozen=True)
class Fused:
    """Dense layers that one side keeps as one, as attention often does with its queries, keys and values.

    Arrays do not show the order of such a layer's rows, and a wrong order goes unnoticed, so the caller must
    say it. By default all rows of the first layer come first, then all of the second, and so on. With ``heads``
    the rows come head by head, one head of each layer in turn, as in GPT-NeoX and BLOOM. If there are fewer
    heads of keys and values, and the rows come in such groups, ``heads`` counts those.

    Args:
        module: The dotted path of the torch module that holds the layers, or a pattern (``"blocks.*.attn"``); empty
            for the model itself.
        torch: What torch calls the layer, or the layers in the order of their rows, relative to the module; the
            packed weights of an ``nn.MultiheadAttention`` are ``"in_proj"``.
        flax: What Flax calls the layer, or the layers in the order of torch's rows. If both sides have one
            layer, its rows are in the same order.
        heads: The number of heads, if rows come head by head. By default one layer comes whole after the other.

    Raises:
        PlanError: Both sides are several layers, or ``heads`` is not a number.

    >>> print(Fused("blocks.*.attn", "qkv", ("query", "key", "value")))
    Fused("blocks.*.attn", "qkv", ("query", "key", "value"))
    """

    module: str
    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    heads: int | None = None

    def __post_init__(self) -> None:
        for name in ("torch", "flax"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))
        several = [side for side in (self.torch, self.flax) if not isinstance(side, str)]
        tuples = all(isinstance(side, tuple) and len(set(side)) == len(side) > 1 for side in several)
        names = [name for side in (self.torch, self.flax) if tuples for name in _each(side)]
        if len(several) > 1 or not names or not all(isinstance(name, str) and name for name in names):
            raise PlanError(
                "Fused takes the name of one layer on one side and a tuple of names on the other, such as "
                f'Fused("attn", "qkv", ("query", "key", "value")), not {self.torch!r} and {self.flax!r}.'
            )
        if not several and self.heads is not None:
            raise PlanError(
                "Fused takes heads where one side has several layers; where both have one, its rows stay in order."
            )
        if not isinstance(self.module, str):
            raise PlanError(
                f"Fused({self.module!r}, ...) takes the dotted name of a module, or a pattern, first."
            )
        if self.heads is not None and not (type(self.heads) is int and self.heads > 0):
            raise PlanError(
                f'Fused("{self.module}", ...) takes heads as a number of heads, not {self.heads!r}.'
            )

    def matches(self, path: Path) -> bool:
        """Whether the pattern matches the module at this path."""
        return matches_path(self.module, path)

    def __str__(self) -> str:
        sides = ", ".join(
            f'"{side}"' if isinstance(side, str) else "(" + ", ".join(f'"{name}"' for name in side) + ")"
            for side in (self.torch, self.flax)
        )
        turns = "" if self.heads is None else f", heads={self.heads}"
        return f'Fused("{self.module}", {sides}{turns})'


def _each(side: str | tuple[str, ...]) -> tuple[str, ...]:
    return (side,) if isinstance(side, str) else side
