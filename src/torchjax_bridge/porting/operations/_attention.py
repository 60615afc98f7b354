"""Scaled dot product attention: JAX's own, which keeps heads before the last axis as the author's view does."""

from typing import Any

import torch

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._table import operation

__all__: list[str] = []


@operation("scaled_dot_product_attention")
def attention(
    at: Lowering,
    node: Node,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Placed:
    if len(query.shape) != 4 or len(key.shape) != 4 or len(value.shape) != 4:
        raise RefusedError(
            "scaled_dot_product_attention of tensors that are not (batch, heads, length, features)"
        )
    drops = float(dropout_p) > 0
    if drops and not at.model.recording.module.training:
        raise RefusedError(
            "scaled_dot_product_attention drops in evaluation; pass dropout_p=self.p if self.training else 0.0"
        )
    if drops and enable_gqa:
        raise RefusedError("scaled_dot_product_attention(enable_gqa=True) with dropout_p > 0")
    if is_causal and query.shape[2] != key.shape[2]:
        raise RefusedError(
            "scaled_dot_product_attention(is_causal=True) with queries and keys of different length"
        )
    if query.shape[:2] != key.shape[:2] and not (enable_gqa and query.shape[0] == key.shape[0]):
        raise RefusedError("scaled_dot_product_attention that broadcasts its keys")
    order = (0, 2, 1, 3)
    texts = [at.read(tensor, order) for tensor in (query, key, value)]
    if attn_mask is not None:
        word = "mask" if attn_mask.dtype == torch.bool else "bias"
        rank = len(attn_mask.shape)
        mask = at.in_torch_order(attn_mask) + ("" if rank == 4 else f"[{'None, ' * (4 - rank)}...]")
        texts.append(f"{word}={mask}")
    if is_causal:
        texts.append("is_causal=True")
    if scale is not None and drops:
        texts[0] = f"({at.number(scale)} * {texts[0]}.shape[-1] ** 0.5 * {texts[0]})"
    elif scale is not None:
        texts.append(f"scale={at.number(scale)}")
    if value.shape[3] != query.shape[3]:
        raise RefusedError("scaled_dot_product_attention with values of another width than the queries")
    if drops:  # jax.nn drops no attention weights
        at.body.random = True
        texts += [
            "dropout_rng=self.rngs()",
            f"dropout_rate={at.number(dropout_p)}",
            "broadcast_dropout=False",
        ]
        return Placed(f"nnx.dot_product_attention({', '.join(texts)})", order)
    return Placed(f"jax.nn.dot_product_attention({', '.join(texts)})", order)
