"""What ``nn.Flatten``, ``nn.Unflatten`` and their neighbours in a ``Sequential`` show about flattened maps.

Knows nothing about widths; ``_questions`` asks the questions.
"""

from torch import nn

from ..trees import TorchNode

__all__ = [
    "NO_READER",
    "PER_FEATURE",
    "TAKES_FEATURES",
    "in_sequentials",
    "is_of_maps",
    "loose_flattens",
    "takes_all",
]

# Layers with one number a feature, which work in any order of the features. A GroupNorm does not.
PER_FEATURE = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)
TAKES_FEATURES = (nn.Linear, nn.RNNBase, nn.RNNCellBase, *PER_FEATURE)
# Layers that only a model with feature maps has.
_OF_MAPS = (
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Dropout2d, nn.Dropout3d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold, nn.Fold,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.LPPool2d, nn.ChannelShuffle,
)  # fmt: skip


def is_of_maps(kind: type | None) -> bool:
    """Whether only a model with feature maps has such a layer."""
    return kind is not None and issubclass(kind, _OF_MAPS)


def in_sequentials(root: TorchNode) -> tuple[dict[int, int], dict[int, int]]:
    """The layers right after an ``nn.Flatten``, and the Linears right before an ``nn.Unflatten``.

    Maps the id of each node to the channels of the map, 0 where the ``Sequential`` does not show them.
    """
    behind: dict[int, int] = {}
    before: dict[int, int] = {}
    for node in root.walk():
        if not isinstance(node.module, nn.Sequential):
            continue
        channels, flat = 0, False
        last: TorchNode | None = None
        for child in node.children.values():
            module = child.module
            if isinstance(module, nn.Flatten):
                flat = takes_all(module)
            elif isinstance(module, nn.Unflatten):
                sizes = [size[1] if isinstance(size, tuple) else size for size in module.unflattened_size]
                if last is not None and len(sizes) > 1 and sizes[0] > 1:
                    before[id(last)] = sizes[0]
                last, flat = None, False
            elif child.empty:
                if isinstance(module, nn.PixelShuffle | nn.GLU | nn.Unfold | nn.Fold | nn.Sequential):
                    channels = 0
            else:
                if flat and isinstance(module, TAKES_FEATURES):
                    behind[id(child)] = channels
                flat = flat and isinstance(module, PER_FEATURE)
                channels = _gives_channels(module)
                if isinstance(module, nn.Linear):
                    last = child
                elif not isinstance(module, PER_FEATURE):
                    last = None
    return behind, before


def takes_all(module: nn.Flatten) -> bool:
    """Whether it flattens all axes but the batch."""
    return module.start_dim == 1 and module.end_dim == -1


def _gives_channels(module: nn.Module | None) -> int:
    """The channels of a layer's output map; 0 where they are not known."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    return module.num_features if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) else 0


NO_READER = (
    "an nn.Flatten, and each layer's input may be another layer's output, so it is assumed to flatten maps of "
    "one position (rules=[Flatten(<layer>, (C, H, W))] says which layer reads it, Flatten(<layer>, None) that no "
    "order is lost)"
)


_POOLS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


def _pools_to_a_point(module: nn.Module | None) -> bool:
    """Whether a layer leaves a single position."""
    return isinstance(module, _POOLS) and module.output_size in (1, (1,), (1, 1), (1, 1, 1))


def loose_flattens(root: TorchNode) -> list[TorchNode]:
    """Each ``nn.Flatten`` whose reader no ``Sequential`` shows; none where maps are pooled to a point."""
    nodes = list(root.walk())
    if any(_pools_to_a_point(node.module) for node in nodes):
        return []
    found = []
    for node in nodes:
        children = list(node.children.values())
        for place, child in enumerate(children):
            if not (isinstance(child.module, nn.Flatten) and takes_all(child.module)):
                continue
            if not isinstance(node.module, nn.Sequential) or all(n.empty for n in children[place:]):
                found.append(child)
    return found
