"""Packed sequences: what is packed stays the padded tensor, and recurrent layers are told the lengths."""

from typing import Any

from torchjax_bridge.recording import Dim, Node, SizeOf, Value

from .._lowering import Lowering
from .._placed import Axes, FollowsError, Placed, RefusedError
from ._table import operation

__all__: list[str] = []


@operation("_pack_padded_sequence")
def pack(at: Lowering, node: Node, input: Value, lengths: Value, batch_first: bool) -> list[Placed]:
    data, _ = node.result
    text = at.read(input, _order(batch_first))
    text = text if text.isidentifier() else at.variable(text, node.source)
    at.model.packed[data] = text, at.in_torch_order(lengths), input.shape[0 if not batch_first else 1]
    return [at.nowhere(2), at.nowhere(1)]


@operation("_pad_packed_sequence")
def pad(
    at: Lowering,
    node: Node,
    data: Value,
    batch_sizes: Value,
    batch_first: bool,
    padding_value: Any = 0.0,
    total_length: Any = None,
) -> list[Placed]:
    if data in at.model.refused:
        raise FollowsError
    if data not in at.model.packed:
        raise RefusedError("pad_packed_sequence of what no recurrent layer and no pack_padded_sequence gave")
    text, lengths, length = at.model.packed[data]
    order = _order(batch_first)
    if node.result[0].shape[0 if not batch_first else 1] != length:
        raise RefusedError(
            "pad_packed_sequence gives fewer steps than were packed, as many as the longest length; pass "
            "total_length=x.shape[1]"
        )
    origin = total_length.expression if isinstance(total_length, Dim) else None
    if not (isinstance(origin, SizeOf) and origin.value is not batch_sizes):  # that of the longest length
        at.model.held["batches whose longest sequence is as long as the padded tensor"] = None
    at.body.helpers.add("padded_from")
    value = "" if padding_value == 0 else f", {at.number(padding_value)}"
    return [Placed(f"padded_from({text}, {lengths}{value})", order), Placed(lengths, (0,))]


def _order(batch_first: Any) -> Axes:
    """The order of axes in which the batch is first."""
    return (0, 1, 2) if batch_first else (1, 0, 2)
