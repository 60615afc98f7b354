"""The words about feature maps: every fault says what is not known and what to type.

Decides nothing: which layer is asked about is for ``_questions`` to find.
"""

from collections.abc import Iterable, Sequence
from math import isqrt

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..trees import TorchNode

__all__ = ["contradicts", "say_fixed", "say_how", "say_no_layout", "say_shape", "say_whose"]


def contradicts(node: TorchNode, channels: Sequence[int]) -> Iterable[Fault]:
    """Features of which the last, not the first, are the channels of a map."""
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


def say_how(node: TorchNode, width: int, channels: int) -> Fault:
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


def say_fixed(node: TorchNode, width: int, channels: int) -> Fault:
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


def say_whose(node: TorchNode, width: int, linear: TorchNode) -> Fault:
    """A layer that may stand between a Linear and the map that is made of its output."""
    path = join_path(node.origin)
    return Fault(
        "ambiguous",
        f"{node.where} takes {width} features, and {linear.where} gives as many in the order of a map that is made "
        f'of them: say rules=[Flatten("{path}", {linear.output})] if these are the ones that it takes, or '
        f'Flatten("{path}", None) if it takes others',
        path,
    )


def say_shape(node: TorchNode, width: int, channels: int) -> Fault:
    """A Linear of whose output a map may be made."""
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


def say_no_layout(node: TorchNode, width: int) -> Fault:
    """A GroupNorm over flattened features, whose groups are other ones in another order."""
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
