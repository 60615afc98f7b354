"""Parameters and buffers that code reads by itself: which attribute holds them, in which order of axes.

A layer of torch's own keeps its tensors where its Flax twin keeps them. Any other module keeps them as they
are in torch.
"""

from torch import nn

from torchjax_bridge.recording import Parameter, layer_class

from ._placed import Axes, torch_order

__all__ = ["parameter_place", "place_of"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def parameter_place(origin: Parameter, is_layer: bool) -> tuple[str, Axes]:
    """The attribute of the owner's Flax twin that holds a parameter, and the order of its axes.

    Args:
        origin: The parameter.
        is_layer: Whether its owner becomes one Flax layer.
    """
    rank = origin.tensor.dim()
    is_layer = is_layer or isinstance(origin.owner, nn.EmbeddingBag)
    name, order = _leaf(origin.owner, origin.name, rank) if is_layer else (origin.name, None)
    return name, order or torch_order(rank)


def place_of(origin: Parameter) -> tuple[str, Axes]:
    """`parameter_place` of a parameter whose owner is, or derives from, whatever its class says."""
    return parameter_place(origin, layer_class(origin.owner) is not None)


def _leaf(owner: nn.Module, name: str, rank: int) -> tuple[str, Axes | None]:
    if isinstance(owner, nn.Linear) and name == "weight":
        return "kernel", (1, 0)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and name == "weight":
        return "kernel", (*range(2, rank), 0, 1)
    if isinstance(owner, nn.modules.conv._ConvNd) and name == "weight":
        return "kernel", (*range(2, rank), 1, 0)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding", None
    if isinstance(owner, _NORMS):
        return {"weight": "scale", **_STATISTICS}.get(name, name), None
    if isinstance(owner, nn.PReLU):
        return "negative_slope", None
    return name, None
