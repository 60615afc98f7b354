"""Overrides of torch functions that a trace would get wrong.

* Recurrent layers with dropout between them run one by one. The decomposition that a trace takes loses the
  dropout: ``_rnn_helper`` in ``torch/_decomp/decompositions.py`` compares the number of layers the wrong way
  round.
* The checks of ``torch.distributions`` pass, because a trace does not know whether values are valid.
* Embeddings with sparse gradients get dense ones, as JAX has no others.
* Operators that demand int64 indices get them, in the trace and at run time.

Attention must give the same values with and without a derivative. Without gradients torch takes a fast path
that fills what a padding mask hides with zeros. torch does not take it under a function mode, so code that
calls attention runs under one at run time, too.

Tracing itself is in ``_trace``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ._indices import widen_indices
from ._torch_internals import NEEDS_VALUES

__all__ = ["RuntimeOverrides", "TraceOverrides"]


class TraceOverrides(TorchFunctionMode):
    """The overrides in a trace.

    Attributes:
        needed_at_run_time: Whether the code would fail, or give other values, without `RuntimeOverrides`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.needed_at_run_time = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wide = widen_indices(func, args, kwargs)
        if wide is not None:
            self.needed_at_run_time = True
            args, kwargs = wide
        elif func is F.multi_head_attention_forward:
            self.needed_at_run_time = True
        if func in _SPARSE:
            args, kwargs = _dense(_SPARSE[func], args, kwargs)
        override = _OVERRIDES.get(func)
        return func(*args, **kwargs) if override is None else override(func, *args, **kwargs)


class RuntimeOverrides(TorchFunctionMode):
    """The overrides that code needs when it runs: int64 indices, and no fast path of attention."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = widen_indices(func, args, kwargs or {}) or (args, kwargs or {})
        return func(*args, **kwargs)


# Functions that may give sparse gradients: the argument that asks for them, and its position.
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
    """The arguments, with the flag for sparse gradients off."""
    name, place = flag
    if len(args) > place:
        args = (*args[:place], False, *args[place + 1 :])
    return args, {**kwargs, name: False} if name in kwargs else kwargs


def _recurrent(func: Callable[..., Any], *args: Any) -> Any:
    """A stack of recurrent layers, one by one, with dropout on the output of each but the last."""
    if not isinstance(args[3], bool):  # packed sequences are never traced, because their lengths are values
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


_OVERRIDES: dict[Any, Callable[..., Any]] = {
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
}
# torch.distributions calls this private function. Without it, its checks ask for values.
if hasattr(torch, "_is_all_true"):
    _OVERRIDES[torch._is_all_true] = _all_true
