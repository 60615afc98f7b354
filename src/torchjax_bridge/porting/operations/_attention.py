"""Scaled dot product attention: JAX's own, which keeps heads before the last axis as the author's view does."""

from typing import Any

import torch

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._masks import shows_keys
from .._placed import Axes, Placed, RefusedError
from ._table import operation

__all__: list[str] = []

_ORDERS: dict[int, Axes] = {3: (0, 1, 2), 4: (0, 2, 1, 3)}


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
    rank = len(query.shape)
    if rank < 3 or len(key.shape) != rank or len(value.shape) != rank:
        raise RefusedError(
            "scaled_dot_product_attention of tensors that are not (batch, heads, length, features); reshape them "
            "first"
        )
    if rank > 4 and (attn_mask is not None or is_causal or query.shape[-1] != value.shape[-1]):
        raise RefusedError(
            "scaled_dot_product_attention of more than four axes with a mask, or with values of another width than "
            "the queries; merge the first axes"
        )
    lead = query.shape[:-2]
    drops = float(dropout_p) > 0
    if drops and not at.model.recording.module.training:
        raise RefusedError(
            "scaled_dot_product_attention drops in evaluation; pass dropout_p=self.p if self.training else 0.0"
        )
    if drops and (enable_gqa or lead != key.shape[:-2] or rank == 3 or query.shape[-1] != value.shape[-1]):
        raise RefusedError(
            "scaled_dot_product_attention with dropout_p > 0 is translated for (batch, heads, length, features) "
            "with as many heads and features of each; repeat the keys and values first"
        )
    one_head = key.shape[:-2] == value.shape[:-2] == (lead[0], 1)  # which torch broadcasts
    shared = rank == 4 and (one_head or (enable_gqa and lead[0] == key.shape[0] == value.shape[0]))
    if (lead != key.shape[:-2] or lead != value.shape[:-2]) and not shared:
        raise RefusedError(
            "scaled_dot_product_attention that broadcasts its keys or values; expand them first"
        )
    if value.shape[-1] != query.shape[-1]:
        return _written_out(at, query, key, value, attn_mask, is_causal, scale, shared)
    order = _ORDERS.get(rank, (0, *range(2, rank - 1), 1, rank - 1))
    head = "[:, :, None]" if rank == 3 else ""
    texts = [at.read(tensor, order) + head for tensor in (query, key, value)]
    if attn_mask is not None:
        word = "mask" if attn_mask.dtype == torch.bool else "bias"
        texts.append(f"{word}={_four_axes(at.in_torch_order(attn_mask), len(attn_mask.shape), rank)}")
    if is_causal:
        texts.append("is_causal=True")
    if scale is not None and (drops or rank > 4):
        placed = at.at(query)
        width = (
            f"{placed.text}.shape[{'-1' if placed.place(rank - 1) == rank - 1 else placed.place(rank - 1)}]"
        )
        texts[0] = f"({at.number(scale)} * {width} ** 0.5 * {texts[0]})"
    elif scale is not None:
        texts.append(f"scale={at.number(scale)}")
    if drops:  # jax.nn drops no attention weights
        at.body.random = True
        texts += [
            "dropout_rng=self.rngs()",
            f"dropout_rate={at.number(dropout_p)}",
            "broadcast_dropout=False",
        ]
        return Placed(f"nnx.dot_product_attention({', '.join(texts)})", order)
    if rank > 4:  # jax.nn takes no more axes
        return Placed(f"nnx.dot_product_attention({', '.join(texts)})", order)
    made = f"jax.nn.dot_product_attention({', '.join(texts)})"
    if attn_mask is not None and attn_mask.dtype == torch.bool and not shows_keys(attn_mask, at.model.outer):
        at.body.helpers.add("zero_where_hidden")
        mask = _four_axes(at.in_torch_order(attn_mask), len(attn_mask.shape), rank)
        made = f"zero_where_hidden({made}, {mask})"
    return Placed(made if rank == 4 else f"{made}[:, :, 0]", order)


def _four_axes(mask: str, mask_rank: int, rank: int) -> str:
    """A mask as ``(batch, heads, queries, keys)``."""
    if mask_rank == 4:
        return mask
    if rank == 3 and mask_rank == 3:
        return f"{mask}[:, None]"
    return f"{mask}[{'None, ' * (4 - mask_rank)}...]"


def _written_out(
    at: Lowering,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    is_causal: Any,
    scale: Any,
    shared: bool,
) -> Placed:
    """Values of another width than the queries, which ``jax.nn`` refuses."""
    if shared and query.shape[1] != key.shape[1]:
        raise RefusedError(
            "scaled_dot_product_attention(enable_gqa=True) with values of another width than the queries; repeat "
            "the keys and values first"
        )
    rank = len(query.shape)
    order = _ORDERS[rank]
    letters = ("bqd", "bkd", "bqk", "bqd") if rank == 3 else ("bqhd", "bkhd", "bhqk", "bqhd")
    q, k, v = (at.read(tensor, order) for tensor in (query, key, value))
    by = f" * {at.number(scale)}" if scale is not None else f" / jnp.sqrt({q}.shape[-1])"
    scores = f"(jnp.einsum('{letters[0]},{letters[1]}->{letters[2]}', {q}, {k}){by})"
    if mask is not None:
        text = at.in_torch_order(mask)
        scores = (
            f"jnp.where({text}, {scores}, -jnp.inf)" if mask.dtype == torch.bool else f"({scores} + {text})"
        )
    if is_causal:
        seen = f"jnp.tril(jnp.ones(({q}.shape[1], {k}.shape[1]), bool))"
        scores = f"jnp.where({seen}, {scores}, -jnp.inf)"
    text = f"jnp.einsum('{letters[2]},{letters[1]}->{letters[3]}', nnx.softmax({scores}), {v})"
    return Placed(text, order)
