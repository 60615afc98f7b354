"""The result of a comparison of two models: its rows, its cause, and both as a table."""

from dataclasses import dataclass
from math import isnan

from .._audit_report import SettingFault
from ._evidence import Cause

__all__ = ["Parity", "ParityRow"]


@dataclass(frozen=True)
class ParityRow:
    """One call of one layer, compared.

    Attributes:
        layer: The class of the torch layer.
        torch_path: Its dotted path; empty for the whole model.
        flax_path: The dotted path of its Flax twin.
        call: Which call of the layer it is, from 0.
        shape: The shape of torch's output; None where there is none.
        difference: The largest ``|torch - Flax|``.
        relative: The same, divided by the largest ``|torch|``.
        ok: Whether that is rounding; None if the outputs could not be compared, or need not agree.
        note: Why not.
    """

    layer: str
    torch_path: str
    flax_path: str
    call: int
    shape: tuple[int, ...] | None
    difference: float
    relative: float
    ok: bool | None
    note: str = ""


@dataclass(frozen=True)
class Parity:
    """Two models, compared layer by layer. Print it to read it as a table.

    Attributes:
        rows: Every call of every layer that both have, in the order in which torch's calls ended. The model's own
            output is among them, with an empty ``torch_path``.
        cause: The likely cause of the first row that differs; None where none does.
        max_difference: The largest ``|torch - Flax|`` of the models' outputs; NaN if one of them gives no arrays.
        settings: Every setting that differs, also where it does not change these outputs.
        notes: What could not be compared, and how the inputs were laid out.
    """

    rows: tuple[ParityRow, ...]
    cause: Cause | None
    max_difference: float
    settings: tuple[SettingFault, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the outputs agree, and every layer, except differences that later layers make up for."""
        return self.cause is None

    @property
    def first(self) -> ParityRow | None:
        """The first row that differs, in the order in which torch runs."""
        return next((row for row in self.rows if row.ok is False), None)

    def __str__(self) -> str:
        if self.ok:
            unseen = sum(row.ok is None and isnan(row.difference) for row in self.rows)
            noted = sum(row.ok is None for row in self.rows) - unseen
            rest = f", {noted} differ and are made up for" if noted else ""
            rest += f" and {unseen} cannot be compared" if unseen else ""
            agree = f"{len(self.rows) - unseen - noted} outputs agree{rest}"
            title = f"parity: {agree}, the models' own within {self.max_difference:.2g}"
        elif isnan(self.max_difference):  # one of them gave no numbers
            title = "parity: the models differ"
        else:
            title = f"parity: the models differ, by up to {self.max_difference:.2g} in their outputs"
        table: list[tuple[str, ...]] = [("", "layer", "torch", "Flax", "shape", "difference", "relative")]
        table += [_cells(row, first=row is self.first) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [title]
        lines += [
            ("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))).rstrip()
            for line in table
        ]
        lines += [f"  cause: {self.cause}"] if self.cause else []
        lines += [f"  setting: {fault}" for fault in self.settings if fault.effect != "rounding"]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _cells(row: ParityRow, *, first: bool) -> tuple[str, ...]:
    mark = {True: "ok", False: "differs", None: "?" if isnan(row.difference) else "note"}[row.ok]
    name = row.torch_path or "(output)"
    call = f" [{row.call}]" if row.call else ""
    compared = not isnan(row.difference) or not row.note
    numbers = (f"{row.difference:.2e}", f"{row.relative:.2e}") if compared else (row.note, "")
    shape = str(row.shape) if row.shape is not None else ""
    twin = row.flax_path or ("(output)" if not row.torch_path else "")
    return ("first" if first else mark, row.layer, name + call, twin, shape, *numbers)
