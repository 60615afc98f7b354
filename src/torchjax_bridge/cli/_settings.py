"""The settings in which two models differ, as lines and as data."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ._terminal import say

if TYPE_CHECKING:
    from torchjax_bridge.weights import Audit, SettingFault

__all__ = ["say_settings", "settings_as_data"]


def say_settings(audit: "Audit | None") -> None:
    """A warning for what changes outputs, as `to_flax` warns of it, and a note for what changes training."""
    for fault in audit.faults if audit is not None else ():
        if fault.effect != "rounding":
            say(f"{'warning' if fault.effect == 'output' else 'note'}: {fault}")


def settings_as_data(faults: "Iterable[SettingFault]") -> list[dict[str, Any]]:
    """Every setting that differs, with values that are no data as text."""
    return [
        {name: _plain(value) for name, value in asdict(fault).items()} | {"type": fault.to_type}
        for fault in faults
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
