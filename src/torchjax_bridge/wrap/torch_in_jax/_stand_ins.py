"""What stands in for torch functions: in a trace for those that cannot be traced truly as they are.

* Recurrent layers with dropout between them: the decomposition that a trace takes loses the dropout
  (``_rnn_helper`` in ``torch/_decomp/decompositions.py`` compares the number of layers the wrong way
  round), so the layers are run one by one.
* The checks of ``torch.distributions``: whether all values are valid is not known without values, and is
  taken to be so.
* Embeddings with sparse gradients: JAX has dense ones.
* Operators that demand int64 indices, where they are given others: these are widened, in the trace and at run time.

Attention modules must not give other values in a call for the value alone than in one that is differentiated: the
fast path of torch without gradients fills what a padding mask hides with zeros. It is not taken under a function
mode, so such code is run under one.

Owns these alone; what is traced, and when, is in ``_graph``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ._indices import widened
from ._torch_internals import NEEDS_VALUES

__all__ = ["AsTraced", "StandIns"]


class StandIns(TorchFunctionMode):
    """While active, calls of these functions go to what stands in for them.

    Attributes:
        matter: Whether one was met without which the code would fail, or give other values, at run time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matter = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wide = widened(func, args, kwargs)
        if wide is not None:
            self.matter = True
            args, kwargs = wide
        elif func is F.multi_head_attention_forward:
            self.matter = True
        if func in _SPARSE:
            args, kwargs = _dense(_SPARSE[func], args, kwargs)
        stand_in = _STAND_INS.get(func)
        return func(*args, **kwargs) if stand_in is None else stand_in(func, *args, **kwargs)


class AsTraced(TorchFunctionMode):
    """While active, code that is run for its value does what it did in its trace, where that matters."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = widened(func, args, kwargs or {}) or (args, kwargs or {})
        return func(*args, **kwargs)


# Functions that may give sparse gradients: the argument that says so, and its position.
_SPARSE: dict[Any, tuple[str, int]] = {
    F.embedding: ("sparse", 6),
    F.embedding_bag: ("sparse", 7),
    torch.embedding: ("sparse", 4),
    torch.embedding_bag: ("sparse", 5),
    torch.gather: ("sparse_grad", 3),
    torch.Tensor.gather: ("sparse_grad", 3),
}


def _dense(
    flag: tuple[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The call, asked for a dense gradient."""
    name, place = flag
    if len(args) > place:
        args = (*args[:place], False, *args[place + 1 :])
    return args, {**kwargs, name: False} if name in kwargs else kwargs


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
