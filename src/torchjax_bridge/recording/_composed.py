"""Functions of torch's that a recording takes apart, because their parts are what a port has words for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COMPOSED"]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``multi_head_attention_forward`` of ``(length, batch, features)``, by the formula of its documentation."""
    if (
        any(one is not None for one in (bias_k, bias_v, static_k, static_v))
        or add_zero_attn
        or query.dim() != 3
    ):
        return NotImplemented
    length, batch = query.shape[:2]
    weights: Any = q_proj_weight, k_proj_weight, v_proj_weight
    if not use_separate_proj_weight and in_proj_weight is not None:
        weights = in_proj_weight.chunk(3)
    biases: Any = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(given, weight, bias).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        for given, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    mask = None
    if attn_mask is not None:
        mask = attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch, num_heads, length, -1)
        mask = _added(mask, q.dtype)
    if key_padding_mask is not None:
        hidden = _added(key_padding_mask[:, None, None], q.dtype)
        mask = hidden if mask is None else mask + hidden
    rate = dropout_p if training else 0.0
    shares = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        shares = (scores if mask is None else scores + mask).softmax(-1)
        if rate > 0:
            shares = F.dropout(shares, rate)
        heads = shares @ v
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, rate)
    out = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    return out, shares if shares is None or not average_attn_weights else shares.mean(1)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores: -inf where it hides."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


# By the whole name. Each gives NotImplemented for arguments that it does not take apart.
COMPOSED: dict[str, Callable[..., Any]] = {"torch.nn.functional.multi_head_attention_forward": _attention}
