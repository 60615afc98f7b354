"""Convolutions and transposed convolutions.

A convolution's weight is ``(out, in / groups, *space)`` in torch and ``(*space, in / groups, out)`` in Flax.
A transposed convolution's weight is ``(in, out / groups, *space)`` in torch. In Flax it depends on
``transpose_kernel``. With ``True`` the kernel is ``(*space, out, in)``, as in the convolution that it is the
gradient of. With ``False``, the default, it is ``(*space, in, out)``, turned by 180 degrees. Flax has no
transposed convolution with groups, but a ``Conv`` with ``stride - 1`` zeros between the elements of its input
is one. Its kernel is ``(*space, in / groups, out)``, also turned. A convolution with a kernel of 1 may be a
dense layer in Flax.

Sources of the formulas: https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html (shapes),
``jax.lax.conv_transpose`` (what ``transpose_kernel`` swaps and flips), and V. Dumoulin and F. Visin, "A guide
to convolution arithmetic for deep learning" (2016), section 4, for the padding of a transposed convolution.

Settings for parity. ``Conv``: the kernel size as a tuple (an int makes a 1-D convolution), ``strides``,
``padding=((p, p), ...)`` in numbers (``"SAME"`` pads a strided convolution on other sides),
``kernel_dilation``, ``feature_group_count``. ``padding_mode`` has a counterpart only where the output keeps
its size (``"CIRCULAR"``, ``"REFLECT"``); else pad by hand (``jnp.pad`` modes ``wrap``, ``reflect``, ``edge``)
and convolve with ``"VALID"``. ``ConvTranspose``: ``padding=((a, a + output_padding), ...)`` where
``a = dilation * (kernel - 1) - padding``, for every axis; with groups the same padding, ``strides=1``,
``input_dilation=stride`` and ``feature_group_count=groups`` on a ``Conv``.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

from torch import nn

from ..layouts import Flip, Layout, Permute, Reshape, then
from ._padding import Convolution, Pads, Transposed, kernel_reach, same_pads, torch_pads, transposed_pads
from ._rule import Entry, Layer, Rule
from ._twin import Pad, Twin, changed, torch_uniform

__all__ = ["RULES", "TWIN_RULES"]


def _convolution(layer: Layer) -> Iterable[Entry]:
    rank = _rank(layer)
    outputs, inputs, *_ = layer.torch["weight"].shape
    if len(layer.flax.get(("kernel",), ())) == 2:
        return _entries(
            _pointwise(layer), _MAY_BE_TRANSPOSED if layer.kind is None and inputs == outputs else ""
        )
    _same_groups(layer)
    # A bare weight with as many inputs as outputs could be a transposed convolution's just as well.
    doubtful = layer.kind is None and layer.flax_kind is None and inputs == outputs
    return _entries(Permute((*range(2, rank), 1, 0)), _MAY_BE_TRANSPOSED if doubtful else "")


_MAY_BE_TRANSPOSED = "taken for a convolution, and could be a transposed one"


def _pointwise(layer: Layer) -> Layout:
    """The weight ``(out, in, 1, ...)`` of a convolution that is a dense layer at every position."""
    outputs, inputs, *space = weight = tuple(layer.torch["weight"].shape)
    groups, strides, pads = (getattr(layer.module, name, ()) for name in ("groups", "stride", "padding"))
    plain = groups in ((), 1) and set(strides) <= {1} and (isinstance(pads, str) or not any(pads))
    if any(size > 1 for size in space) or not plain:
        raise ValueError(
            "a dense layer stands for a convolution only where that has a kernel of 1, stride 1, no padding and no "
            "groups; use a Conv"
        )
    return then(Reshape(weight, (outputs, inputs)), Permute((1, 0)))


def _transposed(layer: Layer, swapped: bool | None = None) -> Iterable[Entry]:
    rank = _rank(layer)
    weight = tuple(layer.torch["weight"].shape)
    kernel = layer.flax.get(("kernel",))
    if kernel is None or len(kernel) != rank:
        raise ValueError(f"there is no kernel of {rank} axes")
    groups = getattr(layer.module, "groups", 1)
    if groups > 1:
        if layer.flax_kind == "ConvTranspose":
            raise ValueError(
                f"groups={groups}: Flax's ConvTranspose has no groups. Use Conv(strides=1, input_dilation=stride, "
                f"feature_group_count={groups}) with padding ((a, a + output_padding), ...), "
                "a = dilation * (kernel - 1) - padding"
            )
        _same_groups(layer)
        return _entries(_grouped(weight, groups))
    if layer.flax_kind == "Conv":
        dilated = getattr(layer.flax_module, "input_dilation", None)
        if layer.module is None and (dilated is None or _all_ones(dilated)):
            raise ValueError("a Conv is taken for a Conv, unless the torch module says otherwise")
        return _entries(_flipped(rank))
    swapped = getattr(layer.flax_module, "transpose_kernel", swapped)
    if swapped is None and weight[0] != weight[1]:
        swapped = kernel[-2:] == (weight[1], weight[0])
    if swapped is None:
        raise ValueError(_which_kernel(rank, _kind(layer)))
    return _entries(Permute((*range(2, rank), 1, 0)) if swapped else _flipped(rank))


@lru_cache(maxsize=256)
def _entries(kernel: Layout, assumed: str = "") -> tuple[Entry, ...]:
    return (Entry("weight", "kernel", kernel, assumed=assumed), Entry("bias", "bias", optional=True))


def _flipped(rank: int) -> Layout:
    """``(in, out, *space)`` to ``(*space, in, out)``, turned by 180 degrees."""
    space = tuple(range(2, rank))
    return then(Flip(space), Permute((*space, 0, 1)))


def _grouped(weight: tuple[int, ...], groups: int) -> Layout:
    """``(in, out / groups, *space)`` to ``(*space, in / groups, out)``, turned, the groups side by side."""
    inputs, outputs, *space = weight
    apart = (groups, inputs // groups, outputs, *space)
    axes = tuple(range(3, len(apart)))
    return then(
        Reshape(weight, apart),
        Flip(axes),
        Permute((*axes, 1, 0, 2)),
        Reshape((*space, inputs // groups, groups, outputs), (*space, inputs // groups, groups * outputs)),
    )


def _same_groups(layer: Layer) -> None:
    """Raise if the groups differ though the kernels have the same shape (as many inputs in each group)."""
    ours, theirs = getattr(layer.module, "groups", 1), getattr(layer.flax_module, "feature_group_count", None)
    if layer.module is not None and theirs is not None and ours != theirs:
        raise ValueError(f"groups={ours} in torch, feature_group_count={theirs} in Flax")


def _rank(layer: Layer) -> int:
    rank = layer.torch["weight"].ndim
    if not 3 <= rank <= 5:
        raise ValueError(f"a convolution has a weight of 3 to 5 axes, not {rank}")
    return rank


def _all_ones(dilation: int | tuple[int, ...]) -> bool:
    return all(step == 1 for step in ((dilation,) if isinstance(dilation, int) else dilation))


def _kind(layer: Layer) -> str:
    return type(layer.module).__name__ if layer.module is not None else f"ConvTranspose{_rank(layer) - 2}d"


def _which_kernel(rank: int, kind: str) -> str:
    space = ", ".join(map(str, range(2, rank)))
    flipped = f"({space},)" if rank == 3 else f"({space})"
    return (
        "as many channels go in as come out, so neither names nor shapes say whether the Flax layer has "
        f'transpose_kernel=True; pass rules=[Rule(nn.{kind}, [Entry("weight", "kernel", '
        f'Permute(({space}, 1, 0))), Entry("bias", "bias", optional=True)])] if it has, or the same with '
        f"then(Flip({flipped}), Permute(({space}, 0, 1))) if it has not"
    )


# --- the twins ---------------------------------------------------------------------------------------

_MODES = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}  # of jnp.pad


def _convolution_twin(module: Convolution) -> Twin:
    mode, pads = torch_pads(module)
    by_hand = None
    if mode != "zeros":
        if mode != "replicate" and pads == same_pads(kernel_reach(module)):
            padding: object = mode.upper()
        else:
            by_hand = Pad(((0, 0), *pads, (0, 0)), _MODES[mode])
            padding = "VALID"
    else:
        padding = "SAME" if module.padding == "same" else _shortest(pads) or "VALID"
    return Twin(
        "Conv",
        _sizes(module),
        changed(
            strides=(_shortest_steps(module.stride), 1),
            padding=(padding, "SAME"),
            kernel_dilation=(_shortest_steps(module.dilation), 1),
            feature_group_count=(module.groups, 1),
            use_bias=(module.bias is not None, True),
        ),
        {"kernel_init": torch_uniform()},
        pad=by_hand,
    )


def _transposed_twin(module: Transposed) -> Twin:
    sizes, padding = _sizes(module), _shortest(transposed_pads(module))  # where "VALID" means another thing
    dilation = (_shortest_steps(module.dilation), 1)
    bias = (module.bias is not None, True)
    stride = _shortest_steps(module.stride)
    if module.groups == 1:
        settings = changed(
            strides=(stride, 1), padding=(padding, "SAME"), kernel_dilation=dilation, use_bias=bias
        )
        return Twin("ConvTranspose", sizes, settings, {"kernel_init": torch_uniform("fan_out")})
    settings = changed(
        padding=(padding, "SAME"),
        input_dilation=(stride, 1),
        kernel_dilation=dilation,
        feature_group_count=(module.groups, 1),
        use_bias=bias,
    )
    return Twin("Conv", sizes, settings, {"kernel_init": torch_uniform("fan_out", module.groups)})


def _sizes(module: Convolution | Transposed) -> dict[str, object]:
    return {
        "in_features": module.in_channels,
        "out_features": module.out_channels,
        "kernel_size": tuple(module.kernel_size),
    }


def _shortest(pads: Pads) -> object:
    """Paddings as one number, or one an axis, where that says the same."""
    if any(before != after for before, after in pads):
        return pads
    return _shortest_steps([before for before, _ in pads])


def _shortest_steps(steps: Sequence[int]) -> int | tuple[int, ...]:
    return steps[0] if len(set(steps)) == 1 else tuple(steps)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

RULES = (
    Rule(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        _convolution,
        flax_types=("Conv", "Dense", "Linear"),
        required=frozenset({"weight"}),
        settings=(
            "kernel_size as a tuple (an int is a 1-D convolution), strides, padding=((p, p), ...) and never "
            "'SAME' for a number, kernel_dilation, feature_group_count=groups (linen's variables do not tell it: "
            "audit compares it), use_bias; a kernel of 1 fills a Dense too"
        ),
        twin=_convolution_twin,
    ),
    Rule(
        _TRANSPOSED,
        _transposed,
        flax_types=("ConvTranspose", "Conv"),
        required=frozenset({"weight"}),
        settings=(
            "strides, kernel_dilation, padding=((a, a + output_padding), ...) with "
            "a = dilation * (kernel - 1) - padding, use_bias; with groups a Conv with strides=1, "
            "input_dilation=stride, feature_group_count=groups and the same padding"
        ),
        twin=_transposed_twin,
    ),
)

# A twin never has transpose_kernel=True. The variables of linen do not show that where the kernel is square.
TWIN_RULES = (Rule(_TRANSPOSED, partial(_transposed, swapped=False)),)
