"""Finds where a feature map is flattened, or a vector viewed as a map: torch and Flax do it in different orders.

Arrays do not show the order. A run of the torch model does (`Recorded`); without one the plan asks the caller, who
passes ``inputs=`` or answers with `Flatten`. It asks about each layer of a model with feature maps if nothing else
explains its input width, and in a live model, which a run could answer for, also where a flattened map could be as
wide; and likewise about each Linear whose output may become a map.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import isqrt, prod

from torch import nn

from .._report import Fault
from ..pairing import Move
from ..rules import Flatten
from ..trees import TorchNode, TorchTree
from . import _faults
from ._axes import Order
from ._recorded import Recorded
from ._widths import COMPUTED, CONVOLUTIONS, PER_FEATURE, Reader, Widths, has_a_factor, read_widths

__all__ = ["COMPUTED", "ask_about_maps", "can_be_flattened", "knows_one_order", "output_order"]

# Layers whose weights no `Flatten` can lay out.
_FIXED = (nn.GroupNorm, nn.MultiheadAttention, nn.Bilinear)


def can_be_flattened(node: TorchNode, rule: Flatten) -> bool:
    """Whether a `Flatten` can apply to this layer. Judges by its tensors where its class is not known."""
    if knows_one_order(node):
        return rule.features is None and not rule.output
    shapes = {
        name.removeprefix(f"{COMPUTED}."): leaf.meta.ndim for name, leaf in (node.flat() | node.moved).items()
    }
    vectors = {*shapes.values()} <= {0, 1}
    if node.kind is not None and node.kind.__module__.startswith("torch.nn."):
        takes = issubclass(node.kind, nn.Linear if rule.output else _TAKES_FEATURES)
        return takes and (vectors or not issubclass(node.kind, PER_FEATURE))
    matrix = any(ndim == 2 and name.startswith("weight") for name, ndim in shapes.items())
    return matrix or (vectors and not rule.output)


_TAKES_FEATURES = (nn.Linear, nn.RNNBase, nn.RNNCellBase, *PER_FEATURE)


def knows_one_order(node: TorchNode) -> bool:
    """Whether a layer takes features in torch's order only, so that ``Flatten(..., None)`` alone applies."""
    return node.kind is not None and issubclass(node.kind, _FIXED)


def output_order(node: TorchNode) -> tuple[int, ...] | None:
    """The ``(C, H, W)`` whose order a layer's output has, if the caller declared one."""
    if node.kind is not None and issubclass(node.kind, PER_FEATURE):
        return node.features  # its output has the order of its input
    return node.output


def ask_about_maps(
    tree: TorchTree, moves: Sequence[Move], recorded: Recorded | None
) -> tuple[list[Fault], list[tuple[str, str]]]:
    """A fault for each missing `Flatten`, and the assumptions as pairs: the layer, and the text."""
    nodes = list(tree.root.walk())
    reads, gives, _ = recorded or Recorded({}, {}, {})
    maps = any(move.rule in CONVOLUTIONS for move in moves) or any(_is_of_maps(node.kind) for node in nodes)
    told = any("features" in node.told for node in nodes)
    lost = any(id(node.module) in reads and "features" not in node.told for node in nodes)
    loose = [] if maps or (told and not lost) else [node for node in nodes if _flattens(node.module)]
    assumed = [(node.where, _ASSUMED) for node in loose]
    if not (maps or lost or any(node.told for node in nodes)):
        return [], assumed  # a language model, for example: its many tensors need no look
    widths = read_widths(tree, moves)
    faults = [fault for one in widths.readers for fault in _faults.wrong_order(one.node, widths.channels)]
    can_run = tree.module is not None and recorded is None
    asked = _asked_readers(widths, reads, maps=maps, can_run=can_run)
    return [*faults, *asked.values(), *_of_outputs(nodes, widths, gives, asked, can_run=can_run)], assumed


def _asked_readers(
    widths: Widths, reads: Mapping[int, Order], *, maps: bool, can_run: bool
) -> dict[TorchNode, Fault]:
    """The fault of each layer that may read a flattened map."""
    viewed = {out: one.node.output for one in widths.readers if one.node.output for out in one.gives}
    asked: dict[TorchNode, Fault] = {}
    before: list[Reader] = []
    for reader in widths.readers:
        node, width, order = reader.node, reader.width, reads.get(id(reader.node.module), _UNKNOWN)
        last = before[-1] if before else None
        follows = last is not None and widths.follows(reader, last)
        sure = follows or widths.reads_channels(reader)
        # A layer that is asked about explains none that leads back to it.
        back = {width, *reader.gives}
        givers = (
            one for one in before if width in one.gives and not (one.node in asked and one.width in back)
        )
        explained = widths.explains(reader) or any(givers)
        room = node.module is not None and has_a_factor(width, widths.channels)
        doubt = (
            order.kind != "unknown" or width in viewed or (maps and (not explained or (room and not sure)))
        )
        told = "features" in node.told or node in asked
        if not told and doubt and order.kind != "plain" and _has_an_order(width):
            likely = viewed.get(width) or (widths.likely_channels(reader),)
            asked[node] = _fault_of(reader, order, order.sizes or likely, can_run)
        reader.flat = told or node in asked or (follows and last is not None and last.flat)
        reader.sure = sure or reader.flat
        before += [reader] if reader.gives else []
    return asked


def _fault_of(reader: Reader, order: Order, sizes: tuple[int, ...], can_run: bool) -> Fault:
    if order.kind == "input":
        return _faults.input_order(reader.node, sizes)
    if order.kind == "mixed":
        return _faults.mixed_order(reader.node, reader.width)
    fixed = order.sizes or reader.kind in ("fixed", "grouped")
    words = _faults.fixed_order if fixed else _faults.flattened_input
    return words(reader.node, reader.width, sizes[0], can_run=can_run)


def _of_outputs(
    nodes: Sequence[TorchNode],
    widths: Widths,
    gives: Mapping[int, Order],
    asked: Collection[TorchNode],
    *,
    can_run: bool,
) -> Iterator[Fault]:
    """A fault for each Linear of whose output a map may be made."""
    apart = {prod(sizes): sizes[0] for node in nodes if len(sizes := _unflattened(node.module)) > 1}
    upsamples = any(isinstance(node.module, nn.Upsample) for node in nodes)
    linear = [reader for reader in widths.readers if reader.kind == "linear"]
    # Without a module, an output that another Linear reads belongs to a hidden layer, though it may fit a map.
    hidden = {r.width for r in linear if r.node not in asked and not r.node.features}
    hidden |= {*widths.channels, *widths.upwards}
    for node, out in ((reader.node, out) for reader in linear for out in reader.gives):
        order = gives.get(id(node.module), _UNKNOWN)
        channels = apart.get(out) or widths.of_a_map_made_of(out, upsamples)
        sure = node.module is None and out in hidden and out not in apart
        if "output" in node.told or order.kind == "plain":
            continue
        if order.kind != "unknown":
            yield _faults.mixed_order(node, out, output=True)
        elif 1 < channels < out and not sure:
            yield _faults.viewed_output(node, out, channels, can_run=can_run)


_UNKNOWN = Order("unknown")
_ASSUMED = (
    "an nn.Flatten, which is assumed to flatten in one order on both sides, as it does with one channel or none "
    "(rules=[Flatten(<layer>, (C, H, W))] says which layer reads it, Flatten(<layer>, None) that no order is lost)"
)


def _has_an_order(width: int) -> bool:
    """Whether a map of this many numbers can have several channels and positions: false for a prime."""
    return has_a_factor(width, range(2, isqrt(width) + 1))


def _is_of_maps(kind: type | None) -> bool:
    """Whether only a model with feature maps has such a layer."""
    torchs = [base for base in kind.__mro__ if base.__module__.startswith("torch.nn.")] if kind else []
    return any(base in _OF_MAPS or base.__name__.endswith(("2d", "3d")) for base in torchs)


_OF_MAPS = nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold, nn.Fold, nn.ChannelShuffle


def _flattens(module: nn.Module | None) -> bool:
    """Whether it flattens all axes but the batch."""
    return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)


def _unflattened(module: nn.Module | None) -> list[int]:
    """The sizes of the map that an ``nn.Unflatten`` makes."""
    sizes = module.unflattened_size if isinstance(module, nn.Unflatten) else ()
    return [size[1] if isinstance(size, tuple) else size for size in sizes]
