"""One setting that differs: its value on each side, and what to pass to the Flax constructor."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Difference", "Effect", "differs"]

Effect = Literal["output", "training", "rounding"]


@dataclass(frozen=True)
class Difference:
    """One setting of a pair of layers that does not agree.

    Attributes:
        setting: Flax's name for it (``"epsilon"``).
        torch_name: torch's name for it (``"eps"``).
        torch_value: What the torch layer has.
        flax_value: What the Flax layer has.
        wanted: The value that the Flax constructor needs; None if no value works.
        effect: ``"output"`` (the layers compute different things), ``"training"`` (they do so in training only)
            or ``"rounding"`` (they lose different digits).
        fix: What to type.
        unless: The inputs for which both still compute the same; empty if there are none.
    """

    setting: str
    torch_name: str
    torch_value: Any
    flax_value: Any
    wanted: Any
    effect: Effect
    fix: str
    unless: str = field(default="", kw_only=True)


def differs(
    setting: str,
    wanted: Any,
    flax_value: Any,
    *,
    torch: tuple[str, Any],
    have: Any = None,
    effect: Effect = "output",
    fix: str = "",
) -> Iterator[Difference]:
    """Yield a `Difference` unless the Flax value is the wanted one.

    Args:
        setting: Flax's name.
        wanted: The value that agrees with torch.
        flax_value: The value of the Flax layer, as it was given.
        torch: torch's name and value.
        have: The Flax value in the form of ``wanted``, if several forms mean the same.
        effect: What the difference does.
        fix: What to type, where it is not ``setting=wanted``.
    """
    if (flax_value if have is None else have) != wanted:
        name, value = torch
        yield Difference(setting, name, value, flax_value, wanted, effect, fix or f"{setting}={wanted!r}")
