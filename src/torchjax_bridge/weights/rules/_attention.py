"""Multi-head attention.

torch projects with three matrices ``(embed, embed)``, stacked in ``in_proj_weight`` or apart where keys or
values have another width (``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``), and one ``out_proj``. Flax
keeps the heads as an axis: ``query``, ``key`` and ``value`` kernels ``(embed, heads, head)`` with biases
``(heads, head)``, and an ``out`` kernel ``(heads, head, embed)``
(A. Vaswani et al., "Attention is all you need", 2017, section 3.2.2;
https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html;
https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/attention.html).

Settings for parity: ``num_heads``, ``use_bias``, ``dropout_rate``; in nnx also ``decode=False`` and
``in_kv_features`` (where ``kdim != vdim``, assign the value kernel in its own shape). torch needs
``batch_first=True`` to take the ``(batch, length, features)`` that Flax takes. Masks are inverted: Flax
attends where its mask is ``True``, torch where ``attn_mask`` and ``key_padding_mask`` are ``False``.
``add_bias_kv`` and ``add_zero_attn`` lengthen the keys and the values. Flax cannot, so they are refused.
"""

from collections.abc import Iterable
from math import prod

from torch import nn

from torchjax_bridge.exchange import Path

from ..layouts import Each, Layout, Permute, Reshape, Split, then
from ._rule import Entry, Layer, Rule
from ._twin import Initializer, Twin, changed, torch_uniform

__all__ = ["PARTS", "RULES"]

# The layers inside Flax's attention. A tensor that is renamed on its own may go into one of these.
PARTS = frozenset({"LinearGeneral", "DenseGeneral"})
_PROJECTIONS = ("query", "key", "value")


def _attention(layer: Layer) -> Iterable[Entry]:
    _refuse_longer_keys(layer.module, "bias_k" in layer.torch)
    heads = {name: _heads(layer, (name, "kernel")) for name in _PROJECTIONS}
    if "in_proj_weight" in layer.torch:
        size, width = layer.torch["in_proj_weight"].shape
        kernel = then(Permute((1, 0)), _unfold((width, size // 3), (width, *heads["query"])))
        yield Entry("in_proj_weight", _leaves("kernel"), then(Split(3), Each(kernel)))
    else:
        for name in _PROJECTIONS:
            weight = layer.torch[f"{name[0]}_proj_weight"]
            size, width = weight.shape
            kernel = then(Permute((1, 0)), _unfold((width, size), (width, *heads[name])))
            yield Entry(f"{name[0]}_proj_weight", f"{name}.kernel", kernel)
    if "in_proj_bias" in layer.torch:
        size = layer.torch["in_proj_bias"].shape[0] // 3
        yield Entry("in_proj_bias", _leaves("bias"), then(Split(3), Each(_unfold((size,), heads["query"]))))
    size, width = layer.torch["out_proj.weight"].shape
    out = layer.flax.get(("out", "kernel"), ())
    yield Entry(
        "out_proj.weight", "out.kernel", then(Permute((1, 0)), _unfold((width, size), (*out[:-1], size)))
    )
    yield Entry("out_proj.bias", "out.bias", optional=True)


def _leaves(name: str) -> tuple[str, ...]:
    return tuple(f"{projection}.{name}" for projection in _PROJECTIONS)


def _unfold(flat: tuple[int, ...], shape: tuple[int, ...]) -> Layout:
    """The layout that splits a flat axis into heads; the identity where Flax keeps it flat."""
    if prod(flat) != prod(shape):
        raise ValueError(f"{flat} does not divide into {shape}")
    return then() if flat == shape else Reshape(flat, shape)


def _heads(layer: Layer, path: Path) -> tuple[int, ...]:
    """The ``(heads, head)`` of a projection, which must be the torch module's own."""
    shape = layer.flax.get(path)
    if shape is None:
        raise ValueError(
            f"there is no '{'.'.join(map(str, path))}'; where the projections have other names, or are one layer, "
            'say rules=[Fused(<path>, "in_proj", <names>)]'
        )
    count = getattr(layer.module, "num_heads", None)
    if len(shape) == 3 and count is not None and shape[1] != count:
        raise ValueError(f"it has {count} heads, not {shape[1]}: set num_heads={count}")
    return shape[1:]


def _refuse_longer_keys(module: nn.Module | None, learned: bool) -> None:
    if learned:
        raise ValueError("add_bias_kv=True appends a learned key and value, which Flax's attention cannot")
    if getattr(module, "add_zero_attn", False):
        raise ValueError("add_zero_attn=True appends a zero key and value, which Flax's attention cannot")


def _twin(module: nn.MultiheadAttention) -> Twin:
    _refuse_longer_keys(module, module.bias_k is not None)
    width, kdim, vdim = module.embed_dim, module.kdim, module.vdim
    if kdim != vdim:
        raise ValueError(f"kdim={kdim} and vdim={vdim}: nnx's attention has one in_kv_features for both")
    sizes = {"num_heads": module.num_heads, "in_features": width}
    # xavier_uniform, of the (3 * width, width) that torch stacks, or of each matrix by itself.
    packed = module.in_proj_weight is not None
    start = (
        Initializer("variance_scaling", (0.5, "fan_in", "uniform"))
        if packed
        else Initializer("xavier_uniform")
    )
    return Twin(
        "MultiHeadAttention",
        sizes,
        changed(
            in_kv_features=(kdim, width),
            use_bias=(module.in_proj_bias is not None, True),
            dropout_rate=(module.dropout, 0.0),
            broadcast_dropout=(not module.dropout, True),
            decode=(False, None),
        ),
        {"kernel_init": start, "out_kernel_init": torch_uniform()},
    )


def _is_attention(names: frozenset[str]) -> bool:
    return "in_proj_weight" in names or {"q_proj_weight", "k_proj_weight", "v_proj_weight"} <= names


RULES = (
    Rule(
        nn.MultiheadAttention,
        _attention,
        flax_types=("MultiHeadAttention", "MultiHeadDotProductAttention", "SelfAttention"),
        required=frozenset({"out_proj.weight"}),
        applies=_is_attention,
        settings=(
            "num_heads, use_bias=bias, dropout_rate=dropout, decode=False (nnx), and inputs of "
            "(batch, length, features); a Flax mask is True where torch's is False"
        ),
        twin=_twin,
    ),
)
