"""Dropout without chance, in both frameworks: every dropout multiplies by ``1 - rate``.

With this stand-in two models in training mode agree only if they have the same dropouts at the same rates in the
same places, which rates of 0 would not tell. Attention is linear in its weights, so dropout inside
``scaled_dot_product_attention``, and inside that of nnx, multiplies what it gives. Randomness of other kinds stays.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from flax import nnx

__all__ = ["dropouts_without_chance"]


@contextmanager
def dropouts_without_chance() -> Iterator[None]:
    """Replace the dropouts of torch and of nnx for the time of the block; compiled calls keep theirs."""
    attention, flax_attention = F.scaled_dot_product_attention, nnx.dot_product_attention

    def attend(*args: Any, dropout_p: float = 0.0, **options: Any) -> torch.Tensor:
        if len(args) > 4:
            *args, dropout_p = args[:5]  # type: ignore[assignment]
        return attention(*args, **options) * (1 - dropout_p)

    def attend_in_flax(*args: Any, dropout_rate: float = 0.0, dropout_rng: Any = None, **options: Any) -> Any:
        return flax_attention(*args, **options) * (1 - (dropout_rate if dropout_rng is not None else 0))

    with ExitStack() as stack:
        for name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
            stack.enter_context(mock.patch.object(F, name, _torch_dropout))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch.object(nnx, "dot_product_attention", attend_in_flax))
        stack.enter_context(mock.patch.object(nnx.Dropout, "__call__", _nnx_dropout))
        yield


def _torch_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if not training:
        return input
    return input.mul_(1 - p) if inplace else input * (1 - p)


def _nnx_dropout(self: nnx.Dropout, inputs: Any, *, deterministic: bool | None = None, **_: Any) -> Any:
    silent = self.deterministic if deterministic is None else deterministic
    return inputs if silent else inputs * (1 - self.rate)
