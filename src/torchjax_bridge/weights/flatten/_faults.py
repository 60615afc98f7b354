"""The faults about feature maps. Each says what is not known and what to type.

Decides nothing: ``_questions`` finds the layers to ask about.
"""

from collections.abc import Iterable, Sequence
from math import isqrt

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..rules import Flatten
from ..trees import TorchNode

__all__ = [
    "contradicted", "fixed_order", "flattened_input", "input_order", "mixed_order", "viewed_output", "wrong_order",
]  # fmt: skip

# What comes first where a run would answer.
_RUN = "Pass inputs=<what the torch model takes>, and a run of it answers; or say what the Flax model does: "
_SEE = "Pass inputs=<what the torch model takes> to see whether they are. "
_SAY = "Say what the Flax model does: "


def wrong_order(node: TorchNode, channels: Sequence[int]) -> Iterable[Fault]:
    """Faults of `Flatten` features whose last number, not the first, is the channels of a map."""
    for features, output in ((node.features, False), (node.output, True)):
        first, *rest = features or (0,)
        square = len(rest) > 1 and first == rest[0] != rest[-1]
        if first not in channels and {*rest} & {*channels} and (square or first < min(channels)):
            turned = Flatten(join_path(node.origin), (rest[-1], first, *rest[:-1]), output)
            message = (
                f"no layer has maps of {first} channels, and Flatten takes (C, H, W) as torch has it, also where "
                f"the Flax model has the channels last: rules=[{turned}]"
            )
            yield Fault("rules", message, turned.torch)


def contradicted(node: TorchNode, said: tuple[int, ...], rule: Flatten) -> Fault:
    """A `Flatten` of the caller's that names another map than a run of the torch model shows."""
    message = f"Flatten says {said}, and with these inputs torch flattens {rule.features}: rules=[{rule}]"
    return Fault("rules", message, rule.torch)


def _question(node: TorchNode, text: str) -> Fault:
    return Fault("ambiguous", f"{node.where} {text}", join_path(node.origin))


def input_order(node: TorchNode, sizes: tuple[int, ...]) -> Fault:
    """A layer that reads an input of the model, flattened."""
    path = join_path(node.origin)
    return _question(
        node,
        f"reads axes {sizes} of an input, which torch flattens in this order, and no layer shows whether Flax "
        f"takes that input with its channels last: rules=[{Flatten(path, sizes)}] if it does, or "
        f"{Flatten(path, None)} if it takes it as torch does",
    )


def mixed_order(node: TorchNode, width: int, *, output: bool = False) -> Fault:
    """A layer of whose features a part is a flattened map."""
    what = f"takes {width} features, of which some are a flattened map, beside others"
    if output:
        what = f"gives {width} features, of some of which a map is made"
    return _question(
        node,
        f"{what}: torch keeps a map (C, H, W) where Flax keeps (H, W, C), and no layout makes such a mixture "
        "alike. Move the channels to the front in Flax where torch has them and say "
        f"rules=[{Flatten(join_path(node.origin), None, output)}]",
    )


def flattened_input(node: TorchNode, width: int, channels: int, *, can_run: bool) -> Fault:
    """A layer whose input may be a flattened map; ``can_run`` if a run of the model could tell."""
    path = join_path(node.origin)
    return _question(
        node,
        f"takes {width} inputs in a model with feature maps, and no layer is sure to give that many: if they "
        "are a flattened map, torch flattens (C, H, W) where Flax flattens (H, W, C). "
        f'{_RUN if can_run else _SAY}rules=[Flatten("{path}", {_shape(width, channels)})], with what torch '
        f"flattens, if it flattens its own channels-last map, or {Flatten(path, None)} if it moves the channels "
        "to the front first, or if nothing is flattened (a map pooled to one position, a latent vector)",
    )


def fixed_order(node: TorchNode, width: int, channels: int, *, can_run: bool) -> Fault:
    """An attention, a bilinear layer or a GroupNorm whose input may be a flattened map."""
    return _question(
        node,
        f"takes {width} features in a model with feature maps, and no layer is sure to give that many: if they "
        f"are a flattened map {_shape(width, channels)}, torch flattens (C, H, W) where Flax flattens "
        f"(H, W, C), and no layout of its weights makes the two alike. {_SEE if can_run else ''}Move the "
        "channels to the front in Flax before flattening; say "
        f"rules=[{Flatten(join_path(node.origin), None)}] if it does so, or if nothing is flattened",
    )


def viewed_output(node: TorchNode, width: int, channels: int, *, can_run: bool) -> Fault:
    """A Linear whose output may become a map."""
    path = join_path(node.origin)
    return _question(
        node,
        f"gives {width} outputs, and no layer is sure to read them as they are: if a map is made of them, torch "
        f"views them as (C, H, W) where Flax views them as (H, W, C). {_RUN if can_run else _SAY}"
        f'rules=[Flatten("{path}", {_shape(width, channels)}, output=True)], with the map that torch makes, if '
        f"Flax makes a channels-last one, or {Flatten(path, None, output=True)} if it makes torch's and moves "
        "the channels to the end, or if no map is made",
    )


def _shape(width: int, channels: int) -> str:
    side = isqrt(width // channels) if channels else 0
    square = bool(channels) and side * side * channels == width
    return f"({channels}, {side}, {side})" if square else f"({channels or 'C'}, ...)"
