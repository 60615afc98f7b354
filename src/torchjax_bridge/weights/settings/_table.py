"""Which checks are for which torch layer; the entry point of the settings."""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ._conv import convolution, transposed_convolution
from ._dense import dense, dense_as_convolution, dense_general
from ._difference import Difference
from ._layer import FlaxLayer
from ._norm import batch_norm, group_norm, instance_norm, layer_norm, own_epsilon, rms_norm
from ._others import any_layer, attention, dropout, recurrent

__all__ = ["differences", "is_compared"]

_Check = Callable[[Any, FlaxLayer], Iterator[Difference]]

_CELLS = frozenset({"LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "RNN"})

# Torch classes, the Flax classes they are compared with, and the checks.
_TABLE: tuple[tuple[tuple[type, ...], frozenset[str], tuple[_Check, ...]], ...] = (
    (
        (nn.Linear,),
        frozenset({"Linear", "Dense", "LinearGeneral", "DenseGeneral", "Einsum", "Conv"}),
        (dense, dense_general, dense_as_convolution),
    ),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), frozenset({"Conv"}), (convolution, dense)),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        frozenset({"ConvTranspose", "Conv"}),
        (transposed_convolution, dense),
    ),
    (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        frozenset({"BatchNorm"}),
        (batch_norm,),
    ),
    ((nn.LayerNorm,), frozenset({"LayerNorm"}), (layer_norm,)),
    ((nn.RMSNorm,), frozenset({"RMSNorm"}), (rms_norm,)),
    ((nn.GroupNorm,), frozenset({"GroupNorm"}), (group_norm,)),
    (
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        frozenset({"InstanceNorm", "GroupNorm", "BatchNorm"}),
        (instance_norm,),
    ),
    (
        (nn.MultiheadAttention,),
        frozenset({"MultiHeadAttention", "MultiHeadDotProductAttention", "SelfAttention"}),
        (attention,),
    ),
    ((nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell), _CELLS, (recurrent,)),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), frozenset({"Dropout"}), (dropout,)),
    ((nn.Embedding,), frozenset({"Embed"}), ()),
)


def differences(module: nn.Module, layer: FlaxLayer, declared: type | None = None) -> tuple[Difference, ...]:
    """Every setting of a pair of layers that differs; none if the class of either is unknown.

    Args:
        module: The torch layer.
        layer: Its Flax twin.
        declared: The torch class that a layer of the caller's own acts like, if the caller says so.
    """
    if declared is not None and not isinstance(module, declared):
        known = _row(declared)
        if known is None or layer.kind not in known[0]:
            return ()
        return tuple(own_epsilon(module, layer))
    row = _row(type(module))
    if row is None or layer.kind not in row[0]:
        return ()
    return tuple(found for check in (*row[1], any_layer) for found in check(module, layer))


def is_compared(module: nn.Module, layer: FlaxLayer | None) -> bool:
    """Whether all settings of this pair are compared."""
    row = _row(type(module))
    return row is not None and layer is not None and layer.kind in row[0]


def _row(kind: type) -> tuple[frozenset[str], tuple[_Check, ...]] | None:
    if kind not in _ROWS:
        _ROWS[kind] = next((row[1:] for row in _TABLE if issubclass(kind, row[0])), None)
    return _ROWS[kind]


_ROWS: WeakKeyDictionary[type, tuple[frozenset[str], tuple[_Check, ...]] | None] = WeakKeyDictionary()
