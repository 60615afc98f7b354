"""Settings of dropout, attention and recurrent layers, and the settings that every layer has."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from torch import nn

from torchjax_bridge.errors import DtypeError
from torchjax_bridge.exchange import jax_dtype

from ._difference import Difference, Effect, differs
from ._layer import FlaxLayer

_Dropout = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d

__all__ = ["any_layer", "attention", "dropout", "recurrent", "recurrent_dropout"]


def any_layer(module: nn.Module, layer: FlaxLayer) -> Iterator[Difference]:
    """The dtype to compute in: torch computes in the dtype of its weights."""
    if layer["dtype"] is None:
        return
    weight = next(module.parameters(recurse=False), None)
    if weight is None or not weight.is_floating_point():
        return
    try:
        wanted = jax_dtype(weight.dtype)
    except DtypeError:
        return
    name = jnp.dtype(layer["dtype"]).name
    yield from differs(
        "dtype", wanted.name, name, torch=("dtype", weight.dtype), fix=f"dtype=jnp.{wanted.name}"
    )


def dropout(module: _Dropout, layer: FlaxLayer) -> Iterator[Difference]:
    """``Dropout`` beside ``Dropout``; ``DropoutNd`` drops whole channels, over the axes of space."""
    yield from differs("rate", module.p, layer["rate"], torch=("p", module.p), effect="training")
    axes = {nn.Dropout1d: (1,), nn.Dropout2d: (1, 2), nn.Dropout3d: (1, 2, 3)}.get(type(module), ())
    dims = tuple(layer["broadcast_dims"] or ())
    pair = ("the class", type(module).__name__)
    yield from differs("broadcast_dims", axes, dims, torch=pair, effect="training")
    yield from _deterministic(module, layer)


def recurrent_dropout(module: nn.RNNBase, layer: FlaxLayer | None) -> Iterator[Difference]:
    """The dropout between the layers of an ``LSTM``, ``GRU`` or ``RNN`` beside a ``Dropout``, or beside none."""
    rate = layer["rate"] if layer else None
    pair = ("dropout", module.dropout)
    fix = "" if layer else f"Dropout({module.dropout:g}) between the layers of cells"
    yield from differs("rate", module.dropout, rate, torch=pair, effect="training", fix=fix)


def attention(module: nn.MultiheadAttention, layer: FlaxLayer) -> Iterator[Difference]:
    """``MultiheadAttention`` beside ``MultiHeadAttention`` or ``MultiHeadDotProductAttention``."""
    yield from differs(
        "num_heads", module.num_heads, layer["num_heads"], torch=("num_heads", module.num_heads)
    )
    if "use_bias" in layer.values:
        has = module.in_proj_bias is not None
        yield from differs("use_bias", has, layer["use_bias"], torch=("bias", has))
    rate = ("dropout", module.dropout)
    yield from differs("dropout_rate", module.dropout, layer["dropout_rate"], torch=rate, effect="training")
    yield from differs("normalize_qk", False, bool(layer["normalize_qk"]), torch=("normalize_qk", None))
    # The default is None in both flavours: linen reads it as False, nnx leaves it open.
    yield from differs("decode", False, bool(layer["decode"]), torch=("decode", None))
    if module.dropout or layer["dropout_rate"]:
        yield from _deterministic(module, layer)


def _deterministic(module: nn.Module, layer: FlaxLayer) -> Iterator[Difference]:
    fixed = layer["deterministic"]
    if layer.flavour == "linen" and fixed is not None:  # an nnx module follows .train() and .eval()
        effect: Effect = "training" if module.training else "output"
        pair, fix = ("training", module.training), "deterministic=None, and say it in the call"
        yield from differs("deterministic", not module.training, fixed, torch=pair, effect=effect, fix=fix)


def recurrent(module: nn.RNNBase | nn.RNNCellBase, layer: FlaxLayer) -> Iterator[Difference]:
    """The direction, and the functions of a cell: sigmoid and tanh in LSTM and GRU, tanh or relu in RNN."""
    if layer.kind == "RNN" and not getattr(module, "bidirectional", False):
        yield from differs("reverse", False, layer["reverse"], torch=("bidirectional", False))
    word = getattr(module, "nonlinearity", "tanh")
    name = word if isinstance(word, str) else "tanh"
    for setting, wanted in (("activation_fn", name), ("gate_fn", "sigmoid")):
        have = _function(layer[setting])
        if setting in layer.values and have is not None:
            pair: tuple[str, Any] = (
                ("nonlinearity", name) if setting == "activation_fn" else ("gates", "sigmoid")
            )
            yield from differs(setting, wanted, have, torch=pair, fix=f"{setting}=jax.nn.{wanted}")


_FUNCTIONS = {jax.nn.relu: "relu", jax.nn.tanh: "tanh", jnp.tanh: "tanh", jax.nn.sigmoid: "sigmoid"}


def _function(value: Any) -> str | None:
    return next((name for function, name in _FUNCTIONS.items() if function is value), None)
