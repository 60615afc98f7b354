"""What stands in, during a trace, for torch functions that cannot be traced truly as they are.

* Recurrent layers with dropout between them: the decomposition that a trace takes loses the dropout
  (``_rnn_helper`` in ``torch/_decomp/decompositions.py`` compares the number of layers the wrong way
  round), so the layers are run one by one.
* The checks of ``torch.distributions``: whether all values are valid is not known without values, and is
  taken to be so.

Owns these two alone; what is traced, and when, is in ``_jax_graph``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ._jax_torch import NEEDS_VALUES

__all__ = ["StandIns"]


class StandIns(TorchFunctionMode):
    """While active, calls of these functions go to what stands in for them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stand_in = _STAND_INS.get(func)
        if stand_in is None:
            return func(*args, **(kwargs or {}))
        return stand_in(func, *args, **(kwargs or {}))


def _recurrent(func: Callable[..., Any], *args: Any) -> Any:
    """A stack of recurrent layers, one by one, with dropout on the output of each but the last."""
    if not isinstance(args[3], bool):  # packed sequences, whose lengths are values: these are never traced
        return func(*args)
    output, hidden, weights, biased, layers, dropout, train, both_ways, batch_first = args
    if layers < 2 or not train or dropout == 0:
        return func(*args)
    finals = []
    ways, count = (2 if both_ways else 1), len(weights) // layers
    for i in range(layers):
        rows = slice(ways * i, ways * (i + 1))
        states = hidden[rows] if isinstance(hidden, torch.Tensor) else tuple(h[rows] for h in hidden)
        one = weights[count * i : count * (i + 1)]
        output, *final = func(output, states, one, biased, 1, 0.0, train, both_ways, batch_first)
        finals.append(final)
        if i < layers - 1:
            output = torch.nn.functional.dropout(output, dropout)
    return (output, *(torch.cat(states) for states in zip(*finals, strict=True)))


def _all_true(func: Callable[..., Any], values: torch.Tensor) -> Any:
    try:
        return bool(func(values))
    except NEEDS_VALUES:
        return True


_STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
}
# What torch.distributions calls; private, so it may go: then its checks ask for values, as before.
if hasattr(torch, "_is_all_true"):
    _STAND_INS[torch._is_all_true] = _all_true
