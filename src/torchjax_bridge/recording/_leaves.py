"""Which modules are recorded as one call: layers of torch's own whose forward nobody has changed.

Knows the classes. Does not know what becomes of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["has_hooks", "is_leaf", "is_normed", "layer_class", "mixes_hooks"]

_NORMS = (WeightNorm, SpectralNorm)
_INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LEAVES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.PReLU,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.LSTM,
    nn.GRU,
    nn.RNN,
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
)


def is_leaf(module: nn.Module) -> bool:
    """Whether the module computes what its torch class computes."""
    base = layer_class(module)
    return (
        base is not None
        and all(
            getattr(type(module), name, None) is getattr(base, name, None)
            for name in ("forward", "_conv_forward")
        )
        and "forward" not in vars(module)
        and not getattr(module, "track_running_stats", False) & isinstance(module, _INSTANCE_NORM)
        and all(_is_normed(part) for part in _parametrizations(module))
    )


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """The layer of torch's own that a module is, or derives from."""
    return next((kind for kind in type(module).__mro__ if kind in _LEAVES), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether the user registered hooks that run in a call, other than those that compute a normed weight."""
    return bool(module._forward_hooks or _own_pre_hooks(module))


def mixes_hooks(module: nn.Module) -> bool:
    """Whether hooks of the user's run among those that compute a normed weight."""
    own = _own_pre_hooks(module)
    return bool(own) and len(own) < len(module._forward_pre_hooks)


def _own_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    return [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, _NORMS)]


def is_normed(module: nn.Module) -> bool:
    """Whether torch computes a weight of the module in every call, by ``weight_norm`` or ``spectral_norm``."""
    hooked = any(isinstance(hook, _NORMS) for hook in module._forward_pre_hooks.values())
    return hooked or any(_is_normed(part) for part in _parametrizations(module))


def _parametrizations(module: nn.Module) -> Iterator[nn.Module]:
    for chain in getattr(module, "parametrizations", {}).values():
        yield from chain


def _is_normed(part: nn.Module) -> bool:
    """Whether a parametrization is one of torch's two, which `to_flax` computes."""
    kind = type(part)
    return (kind.__module__, kind.__name__) in {
        ("torch.nn.utils.parametrizations", "_WeightNorm"),
        ("torch.nn.utils.parametrizations", "_SpectralNorm"),
    }
