"""A function that a subclass of a torch layer calls on its own tensors: the layer of Flax that it derives from."""

from typing import Any

from torch import nn

from torchjax_bridge.recording import Parameter, Value

from .._lowering import Lowering
from .._parameters import place_of

__all__ = ["is_own_layer"]


def is_own_layer(
    at: Lowering, kind: type[nn.Module] | tuple[type[nn.Module], ...], settings: dict[str, Any], *tensors: Any
) -> bool:
    """Whether these are all the tensors and the settings of the running module: its base class computes this.

    Args:
        at: The translation of the frame.
        kind: The layer whose function is called.
        settings: What it is called with, by the names of the layer's settings.
        tensors: The tensors that it is called with, but for the input.
    """
    module = at.frame.module
    inside = (tensor for child in module.children() for tensor in (*child.parameters(), *child.buffers()))
    if not isinstance(module, kind) or next(inside, None) is not None:
        return False
    if any(getattr(module, name) != setting for name, setting in settings.items()):
        return False
    owners = [tensor.origin for tensor in tensors if isinstance(tensor, Value)]
    count = sum(tensor is not None for tensor in module._parameters.values())
    mine = [
        origin
        for origin in owners
        if isinstance(origin, Parameter) and (origin.owner is module or _is_shared_table(at, origin))
    ]
    parameters = [origin for origin in mine if not origin.is_buffer]
    if len(mine) != len(owners) or len(parameters) != count:
        return False
    for origin in mine:
        if origin.owner is not module:
            at.model.share(at.frame.path, "embedding", origin.path)
    at.model.base_twin(at.frame.path, module)  # refuses settings without a counterpart
    at.body.base_call = True
    return True


def _is_shared_table(at: Lowering, origin: Parameter) -> bool:
    """Whether the running module is an Embedding that has the table of another one."""
    own = f"{at.frame.path}.weight"
    return (
        isinstance(at.frame.module, nn.Embedding)
        and at.model.tied_parameters.get(own) == origin.path
        and place_of(origin)[0] == "embedding"
        and at.model.to == "nnx"
    )
