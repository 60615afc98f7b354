"""What `audit` finds: the settings that differ, printed as a table, raised or warned of."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torchjax_bridge.errors import SettingsError

from .settings import Difference

__all__ = ["Audit", "SettingFault", "SettingsWarning"]


@dataclass(frozen=True)
class SettingFault(Difference):
    """One setting that differs, and its place.

    Attributes:
        torch_path: The dotted path of the torch layer.
        flax_path: The dotted path of the Flax layer.
        torch_layer: The class of the torch layer.
        flax_layer: The class of the Flax layer; empty where a function stands in the torch layer's place.
    """

    torch_path: str
    flax_path: str
    torch_layer: str
    flax_layer: str

    @property
    def in_torch(self) -> str:
        """The setting in torch."""
        return f"{self.torch_name}={self.torch_value!r}"

    @property
    def in_flax(self) -> str:
        """The setting in Flax."""
        return f"{self.setting}={self.flax_value!r}"

    @property
    def to_type(self) -> str:
        """The fix, as a call of the constructor."""
        return f"{self.flax_layer}(..., {self.fix})" if self.flax_layer else self.fix

    def __str__(self) -> str:
        return (
            f"{self.in_torch} in torch, {self.in_flax} in Flax; type {self.to_type} ({_EFFECTS[self.effect]}"
            f"{_unless(self)}) @ "
            f"{self.torch_path or '(root)'} <-> {self.flax_path or '(root)'}"
        )


_EFFECTS = {
    "output": "changes outputs",
    "training": "changes training only",
    "rounding": "changes the last digits only",
}


def _unless(fault: SettingFault) -> str:
    return f" unless {fault.unless}" if fault.unless else ""


class SettingsWarning(UserWarning):
    """The settings of a converted model differ from those of the torch model and change its output."""


@dataclass(frozen=True)
class Audit:
    """The settings of two models, compared. Print it to read it as a table.

    Attributes:
        faults: Every setting that differs, in the order of the torch model.
        layers: The number of pairs of layers that were compared.
        notes: Why some layers could not be paired.
        assumed: Assumptions about pairs of layers beyond settings, such as that a subclass with its own
            ``__call__`` computes what Flax's layer does.
    """

    faults: tuple[SettingFault, ...]
    layers: int
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.faults

    def __str__(self) -> str:
        lines = [f"audit: {_count(self.layers, 'layer')} compared, {_count_differing(self.faults)}"]
        rows = [("layer", "torch", "Flax", "type", "effect")] if self.faults else []
        rows += [
            (_paths(fault), fault.in_torch, fault.in_flax, fault.to_type, f"{fault.effect}{_unless(fault)}")
            for fault in self.faults
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  " + "  ".join([*cells, row[4]]))
        lines += [f"  assumed: {text}" for text in self.assumed]
        lines += [f"  not paired: {note}" for note in self.notes]
        return "\n".join(lines)

    def raise_unless_ok(self) -> None:
        """Raise one `SettingsError` that lists every difference."""
        if self.faults:
            raise SettingsError(_message(self.faults))

    def warn_unless_ok(self, stacklevel: int) -> None:
        """Warn once, with a `SettingsWarning`, of every difference that changes outputs."""
        changes_outputs = [fault for fault in self.faults if fault.effect == "output"]
        if changes_outputs:
            warnings.warn(_message(changes_outputs), SettingsWarning, stacklevel=stacklevel + 1)


def _message(faults: Sequence[SettingFault]) -> str:
    lines = "\n".join(f"  {fault}" for fault in faults)
    return f"the two models are not set up alike: {_count_differing(faults)}\n{lines}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _count_differing(faults: Sequence[SettingFault]) -> str:
    return f"{_count(len(faults), 'setting')} differ" + "s" * (len(faults) == 1)


def _paths(fault: SettingFault) -> str:
    torch_path, flax_path = fault.torch_path or "(root)", fault.flax_path or "(root)"
    return torch_path if torch_path == flax_path else f"{torch_path} <-> {flax_path}"
