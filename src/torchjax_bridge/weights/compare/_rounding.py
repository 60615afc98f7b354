"""Decides in float64 which differences are rounding, where float32 cannot tell.

A norm, or the depth of a model, may make a small difference of rounding alone. Then both models run once more in
float64 (``_float64`` makes the copies): what is still different there is a mistake.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isnan

from torch import nn

from ._compare import Bounds
from ._float64 import (
    FLOAT64_ERRORS,
    flax_in_float64,
    in_float64,
    inputs_in_float64,
    torch_in_float64,
    weight_gap,
)
from ._models import Arguments, compare_models
from ._result import Parity, ParityRow
from ._steps import Step
from ._twins import Twins, read_twins
from ._values import tolerance

__all__ = ["decide_in_float64", "may_be_rounding"]

_SURE = tolerance("float32")
_EQUAL = 1e-7  # the last digit of float32


def may_be_rounding(found: Parity, bad: Step | None) -> bool:
    """Whether the first difference is so small that a norm, or depth, may have made it of rounding alone."""
    if bad is None or found.first is None or found.first.note or found.cause is None or not bad.torch.outputs:
        return False
    dtype = bad.torch.outputs[0].dtype
    if dtype == "float64" or not found.first.relative <= 1e4 * tolerance(dtype):
        return False
    for fault in (
        found.settings
    ):  # a way of computing that rounds more is no mistake, but it is known and has a remedy
        if fault.effect == "rounding" and fault.setting == found.cause.kind and found.cause.proved:
            return fault.torch_path != found.first.torch_path
    return True


def decide_in_float64(
    found: Parity, torch_module: nn.Module, twins: Twins, given: Arguments, steps: Sequence[Step]
) -> Parity:
    """The result after both models have run in float64, where rounding is no difference any more."""
    weights = weight_gap(twins, steps, Bounds(rtol=_SURE))
    try:
        with in_float64():
            wide = flax_in_float64(twins, torchs=weights < float("inf"))
            inputs, *kwargs = map(inputs_in_float64, (given.inputs, given.torch_kwargs, given.flax_kwargs))
            again = Arguments(given.rules, inputs, given.channels_last, given.ignore, *kwargs)
            both = read_twins(torch_in_float64(torch_module), wide, given.rules)
            sure, _, _ = compare_models(both, again, Bounds(rtol=_SURE), Bounds(rtol=_EQUAL))
    except FLOAT64_ERRORS:
        return found
    known = {_key(row): row for row in sure.rows}
    compared = [row for row in found.rows if row.ok is not None]
    if any(_key(row) not in known or isnan(known[_key(row)].difference) for row in compared):
        return found  # in float64 the models ran differently
    rows = [_with_verdict(row, known[_key(row)]) if row.ok is not None else row for row in found.rows]
    rows += [row for row in sure.rows if _key(row) not in {_key(row) for row in rows}]
    excused = [
        row for row, now in zip(found.rows, rows, strict=False) if row.ok is False and now.ok is not False
    ]
    if not excused:
        return replace(found, cause=sure.cause) if sure.cause is not None and sure.cause.proved else found
    most, left = max(row.relative for row in excused), max(known[_key(row)].relative for row in excused)
    outputs = "1 output differs" if len(excused) == 1 else f"{len(excused)} outputs differ"
    note = f"{outputs} by up to {most:.1e}, which is rounding: in float64 by no more than {left:.1e}"
    if _EQUAL < weights < float("inf"):
        note += f" with the same weights, which differ by up to {weights:.1e} of their largest"
    return replace(found, rows=tuple(rows), cause=sure.cause, notes=(*found.notes, note))


def _with_verdict(row: ParityRow, sure: ParityRow) -> ParityRow:
    return replace(row, ok=sure.ok, note=sure.note)


def _key(row: ParityRow) -> tuple[str, str, int]:
    return row.layer, row.torch_path, row.call
