"""Parameters and buffers that code reads by itself: which attribute holds them, in which order of axes.

A layer of torch's own keeps its tensors where its Flax twin keeps them. Any other module keeps them as they
are in torch.
"""

from typing import TYPE_CHECKING

from torch import nn

from torchjax_bridge.recording import Parameter

from ._placed import Axes, Placed, torch_order

if TYPE_CHECKING:
    from ._lowering import Lowering

__all__ = ["parameter_place"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def parameter_place(lowering: "Lowering", origin: Parameter) -> Placed:
    """Where a parameter stands in the Flax model."""
    path = origin.path.rpartition(".")[0]
    rank = origin.tensor.dim()
    name, order = (
        _leaf(origin.owner, origin.name, rank) if lowering.model.is_layer(path) else (origin.name, None)
    )
    attribute = f"{lowering.attribute(path)}.{name}"
    lowering.model.note_read(origin)
    return Placed(f"{attribute}[...]", order or torch_order(rank))


def _leaf(owner: nn.Module, name: str, rank: int) -> tuple[str, Axes | None]:
    if isinstance(owner, nn.Linear) and name == "weight":
        return "kernel", (1, 0)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and name == "weight":
        return "kernel", (*range(2, rank), 0, 1)
    if isinstance(owner, nn.modules.conv._ConvNd) and name == "weight":
        return "kernel", (*range(2, rank), 1, 0)
    if isinstance(owner, nn.Embedding):
        return "embedding", None
    if isinstance(owner, _NORMS):
        return {"weight": "scale", **_STATISTICS}.get(name, name), None
    if isinstance(owner, nn.PReLU):
        return "negative_slope", None
    return name, None
