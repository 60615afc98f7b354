"""The settings in which two models differ, as lines and as JSON."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ._terminal import print_line

if TYPE_CHECKING:
    from torchjax_bridge.weights import Audit, SettingFault

__all__ = ["print_settings", "settings_as_json"]


def print_settings(audit: "Audit | None") -> None:
    """Print a warning for each setting that changes outputs, a note for each that changes training."""
    for fault in audit.faults if audit is not None else ():
        if fault.effect != "rounding":
            print_line(f"{'warning' if fault.effect == 'output' else 'note'}: {fault}")


def settings_as_json(faults: "Iterable[SettingFault]") -> list[dict[str, Any]]:
    """Every setting that differs; a value that JSON cannot hold is its ``repr``."""
    return [
        {name: _as_json_value(value) for name, value in asdict(fault).items()} | {"type": fault.to_type}
        for fault in faults
    ]


def _as_json_value(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json_value(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
