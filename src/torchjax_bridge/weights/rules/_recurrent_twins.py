"""The twins of recurrent layers: cells, ``RNN`` around a cell, ``Bidirectional`` and ``Sequential`` around those.

The twin takes ``(N, length, features)`` and gives the outputs alone; torch gives its last state too. A cell takes
and gives a carry: ``(c, h)`` for an LSTM, where torch has ``(h, c)``.

torch draws every tensor from ``U(-1 / sqrt(hidden), 1 / sqrt(hidden))``. Flax has no such initializer for biases.
"""

from dataclasses import replace

from torch import nn

from ._twin import Symbol, Twin, changed, torch_uniform

__all__ = ["cell_twin", "layer_twin"]

# The Flax cell of each torch class, with its number of stacked gates in nnx.
_CELLS = {
    (nn.LSTM, nn.LSTMCell): ("OptimizedLSTMCell", 4),
    (nn.GRU, nn.GRUCell): ("GRUCell", 3),
    (nn.RNN, nn.RNNCell): ("SimpleCell", 1),
}


def cell_twin(module: nn.RNNCellBase) -> Twin:
    """The twin of an ``LSTMCell``, a ``GRUCell`` or an ``RNNCell``."""
    return _cell(module, module.input_size)


def layer_twin(module: nn.RNNBase) -> Twin:
    """The twin of an ``LSTM``, a ``GRU`` or an ``RNN``: layer by layer, with dropout between them."""
    if module.proj_size:
        raise ValueError("proj_size projects the hidden state, which no Flax cell does")
    directions = 2 if module.bidirectional else 1
    parts = []
    for place in range(module.num_layers):
        width = module.hidden_size * directions if place else module.input_size
        one = [Twin("RNN", {"cell": _cell(module, width)}) for _ in range(directions)]
        names = ("forward_rnn", "backward_rnn")
        parts.append(Twin("Bidirectional", dict(zip(names, one, strict=True))) if directions == 2 else one[0])
        if module.dropout and place < module.num_layers - 1:
            parts.append(Twin("Dropout", {"rate": module.dropout}))
    whole = parts[0] if len(parts) == 1 else Twin("Sequential", {"layers": tuple(parts)})
    return replace(whole, notes=_notes(module))


def _cell(module: nn.RNNBase | nn.RNNCellBase, width: int) -> Twin:
    name, gates = next(cell for kinds, cell in _CELLS.items() if isinstance(module, kinds))
    relu = getattr(module, "nonlinearity", "tanh") == "relu"
    tanh = Symbol("jax.nn.tanh")
    return Twin(
        name,
        {"in_features": width, "hidden_features": module.hidden_size},
        changed(activation_fn=(Symbol("jax.nn.relu") if relu else tanh, tanh)),
        # All gates are one kernel in nnx, whose fan_out is that of a gate times their number.
        {"kernel_init": torch_uniform("fan_out", gates), "recurrent_kernel_init": torch_uniform()},
        own=name == "GRUCell" and bool(module.bias),  # which nnx's has no place for
        notes=_notes(module),
    )


def _notes(module: nn.RNNBase | nn.RNNCellBase) -> tuple[str, ...]:
    if not module.bias:
        return ("bias=False: Flax's cell has a bias, which is zero until it is trained",)
    return ("a gate's two biases in torch are one in Flax, which moves half as far in training",)
