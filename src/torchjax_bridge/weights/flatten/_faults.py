"""The faults about feature maps. Each says what is not known and what to type.

Decides nothing: ``_questions`` finds the layers to ask about.
"""

from collections.abc import Iterable, Sequence
from math import isqrt

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..trees import TorchNode

__all__ = [
    "fixed_order_fault",
    "flattened_input_fault",
    "group_norm_fault",
    "unclear_reader_fault",
    "viewed_output_fault",
    "wrong_order_faults",
]


def wrong_order_faults(node: TorchNode, channels: Sequence[int]) -> Iterable[Fault]:
    """Faults of `Flatten` features whose last number, not the first, is the channels of a map."""
    for features, output in ((node.features, ""), (node.output, ", output=True")):
        if not features or not channels or features[0] in channels:
            continue
        first, *rest = features
        square = len(rest) > 1 and first == rest[0] != rest[-1]
        if any(size in channels for size in rest) and (square or first < min(channels)):
            path, turned = join_path(node.origin), (rest[-1], first, *rest[:-1])
            message = (
                f"no layer has maps of {first} channels, and Flatten takes (C, H, W) as torch has it, also where "
                f'the Flax model has the channels last: rules=[Flatten("{path}", {turned}{output})]'
            )
            yield Fault("rules", message, path)


def flattened_input_fault(node: TorchNode, width: int, channels: int) -> Fault:
    """A layer whose input may be a flattened map."""
    path = join_path(node.origin)
    return Fault(
        "ambiguous",
        f"{node.where} takes {width} inputs in a model with feature maps, and no layer is sure to give that many: "
        "if they are a flattened map, torch flattens (C, H, W) where Flax flattens (H, W, C). Say what the Flax "
        f'model does: rules=[Flatten("{path}", {_shape(width, channels)})], with what torch flattens, if it '
        f'flattens its own channels-last map, or Flatten("{path}", None) if it moves the channels to the front '
        "first, or if nothing is flattened (a map pooled to one position, a latent vector)",
        path,
    )


def fixed_order_fault(node: TorchNode, width: int, channels: int) -> Fault:
    """An attention or a bilinear layer whose input may be a flattened map."""
    path = join_path(node.origin)
    return Fault(
        "ambiguous",
        f"{node.where} takes {width} features in a model with feature maps, and no layer is sure to give that "
        f"many: if they are a flattened map {_shape(width, channels)}, torch flattens (C, H, W) where Flax "
        "flattens (H, W, C), and its weights are laid out for torch's order only. Move the channels to the front "
        f'in Flax before flattening; say rules=[Flatten("{path}", None)] if it does so, or if nothing is flattened',
        path,
    )


def unclear_reader_fault(node: TorchNode, width: int, linear: TorchNode) -> Fault:
    """A layer that may read the output of a Linear before it becomes a map."""
    path = join_path(node.origin)
    return Fault(
        "ambiguous",
        f"{node.where} takes {width} features, and {linear.where} gives as many in the order of a map that is made "
        f'of them: say rules=[Flatten("{path}", {linear.output})] if these are the ones that it takes, or '
        f'Flatten("{path}", None) if it takes others',
        path,
    )


def viewed_output_fault(node: TorchNode, width: int, channels: int) -> Fault:
    """A Linear whose output may become a map."""
    path = join_path(node.origin)
    return Fault(
        "ambiguous",
        f"{node.where} gives {width} outputs, and no layer is sure to read them as they are: if a map is made of "
        "them, torch views them as (C, H, W) where Flax views them as (H, W, C). Say what the Flax model does: "
        f'rules=[Flatten("{path}", {_shape(width, channels)}, output=True)], with the map that torch makes, if '
        f'Flax makes a channels-last one, or Flatten("{path}", None, output=True) if it makes torch\'s and moves '
        "the channels to the end, or if no map is made",
        path,
    )


def group_norm_fault(node: TorchNode, width: int) -> Fault:
    """A GroupNorm over flattened features: another order changes its groups."""
    path = join_path(node.origin)
    return Fault(
        "ambiguous",
        f"{node.where} takes {width} features, as many as are flattened: torch's groups are neighbouring channels, "
        "which are no neighbours in features that Flax flattens (H, W, C), so that no layout makes the two alike. "
        f'Move the channels to the front in Flax before flattening and say rules=[Flatten("{path}", None)], or say '
        "it if it takes other features",
        path,
    )


def _shape(width: int, channels: int) -> str:
    side = isqrt(width // channels) if channels else 0
    square = bool(channels) and side * side * channels == width
    return f"({channels}, {side}, {side})" if square else f"({channels or 'C'}, ...)"
