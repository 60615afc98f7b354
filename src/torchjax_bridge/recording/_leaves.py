"""Which modules are recorded as one call: layers of torch's own whose forward nobody has changed.

Knows the classes. Does not know what becomes of them.
"""

from torch import nn

__all__ = ["has_hooks", "is_leaf", "layer_class"]

_LEAVES = (
    nn.Linear,
    nn.Bilinear,
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
        and not has_hooks(module)
        and not hasattr(module, "parametrizations")
    )


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """The layer of torch's own that a module is, or derives from."""
    return next((kind for kind in type(module).__mro__ if kind in _LEAVES), None)


def has_hooks(module: nn.Module) -> bool:
    """Whether the user registered hooks that run in a call."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
