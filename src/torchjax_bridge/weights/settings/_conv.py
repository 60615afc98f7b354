"""Settings of convolutions and transposed convolutions.

torch pads by numbers on both sides, or ``"same"`` at stride 1. Flax takes numbers and words. ``"SAME"``, its
default, pads so that the output has ``ceil(size / stride)`` elements; at a stride over 1 that depends on the
size of the input, so no number of torch's matches it (``jax.lax.padtype_to_pads``). Words are turned into
numbers here where they mean numbers, so that two ways to say the same thing are no difference.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..rules import Convolution, Pads, Transposed, kernel_reach, same_pads, torch_pads, transposed_pads
from ._difference import Difference, differs
from ._layer import FlaxLayer

__all__ = ["convolution", "transposed_convolution"]


def convolution(module: Convolution, layer: FlaxLayer) -> Iterator[Difference]:
    """``ConvNd`` beside ``Conv``."""
    rank = len(module.kernel_size)
    ones = (1,) * rank
    yield from _per_axis("strides", ("stride", module.stride), layer, rank)
    yield from _per_axis("kernel_dilation", ("dilation", module.dilation), layer, rank)
    have = _spread(layer["input_dilation"], rank)
    yield from differs(
        "input_dilation", ones, layer["input_dilation"], torch=("input_dilation", None), have=have
    )
    yield from _groups_and_mask(module, layer)
    yield from _padding(module, layer)


def transposed_convolution(module: Transposed, layer: FlaxLayer) -> Iterator[Difference]:
    """``ConvTransposeNd`` beside ``ConvTranspose``, or beside the ``Conv`` that computes the same."""
    rank = len(module.kernel_size)
    ones = (1,) * rank
    if layer.kind == "Conv":
        have = _spread(layer["input_dilation"], rank)
        yield from differs(
            "input_dilation",
            tuple(module.stride),
            layer["input_dilation"],
            torch=("stride", module.stride),
            have=have,
        )
        have = _spread(layer["strides"], rank)
        yield from differs("strides", ones, layer["strides"], torch=("stride", module.stride), have=have)
    else:
        yield from _per_axis("strides", ("stride", module.stride), layer, rank)
    yield from _per_axis("kernel_dilation", ("dilation", module.dilation), layer, rank)
    yield from _groups_and_mask(module, layer)
    wanted = transposed_pads(module)
    value = _Unquoted(f"{module.padding}, output_padding={module.output_padding}")
    pads = _transposed_pads(module, layer, rank)
    yield from differs("padding", wanted, layer["padding"], torch=("padding", value), have=pads)


def _groups_and_mask(module: Convolution | Transposed, layer: FlaxLayer) -> Iterator[Difference]:
    if "feature_group_count" in layer.values:
        count = layer["feature_group_count"]
        yield from differs("feature_group_count", module.groups, count, torch=("groups", module.groups))
    if layer["mask"] is not None:
        yield Difference("mask", "mask", None, "an array", None, "output", "no mask")


def _per_axis(
    setting: str, torch: tuple[str, Sequence[int]], layer: FlaxLayer, rank: int
) -> Iterator[Difference]:
    wanted = tuple(torch[1])
    have = _spread(layer[setting], rank)
    yield from differs(setting, wanted, layer[setting], torch=(torch[0], wanted), have=have)


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    """One number an axis, from None, a number or a sequence, as Flax reads it."""
    if value is None or isinstance(value, int):
        return (value or 1,) * rank
    return tuple(value)


# --- padding -----------------------------------------------------------------------------------------


def _padding(module: Convolution, layer: FlaxLayer) -> Iterator[Difference]:
    mode, pads = torch_pads(module)
    shown = repr(module.padding) if mode == "zeros" else f"{module.padding!r}, padding_mode={mode!r}"
    theirs = _flax_pads(module, layer)
    if theirs == (mode, pads):
        return
    if mode != "zeros" and theirs == ("zeros", ((0, 0),) * len(pads)):
        return  # Flax has no such mode, so its code pads by hand in front of the layer
    if layer["padding"] == "CAUSAL" and mode == "zeros" and _is_causal_by_hand(pads, kernel_reach(module)):
        return
    wanted, fix = _wanted(module, mode, pads)
    alike = _sizes_that_agree(module, mode, pads, layer) or _by_hand(mode, pads, theirs)
    yield Difference(
        "padding", "padding", _Unquoted(shown), layer["padding"], wanted, "output", fix, unless=alike
    )


def _by_hand(mode: str, pads: Pads, theirs: tuple[str, Pads | None]) -> str:
    """A doubt: if only one side pads, the code of the other may pad by hand. Empty if there is none."""
    if not any(map(any, pads)) and theirs[1] is not None:
        return f"torch pads its input by hand, by {theirs[1]}"
    if mode == "zeros" and theirs == ("zeros", ((0, 0),) * len(pads)):
        return f"the Flax model pads its input by hand, by {pads}"
    return ""


def _is_causal_by_hand(pads: Pads, reach: Sequence[int]) -> bool:
    """Whether torch pads nothing, or by the whole reach on both sides: it has no causal mode.

    Its code then pads the input before the layer, or cuts the end of the output after it.
    """
    return all(pad == (0, 0) for pad in pads) or pads == tuple((total, total) for total in reach)


class _Unquoted(str):
    """Text with the values of several settings, shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _wanted(module: Convolution, mode: str, pads: Pads) -> tuple[Any, str]:
    if mode == "zeros":
        return pads, f"padding={pads!r}"
    word = {"circular": "CIRCULAR", "reflect": "REFLECT"}.get(mode)
    if word is not None and pads == same_pads(kernel_reach(module)):
        return word, f"padding={word!r}"
    how = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}[mode]
    return None, f"padding='VALID', behind jnp.pad(x, ..., mode={how!r})"


def _flax_pads(module: Convolution, layer: FlaxLayer) -> tuple[str, Pads | None]:
    """The mode and the numbers of the Flax layer; None for numbers that depend on the size of the input."""
    padding, reach = layer["padding"], kernel_reach(module)
    none: Pads = ((0, 0),) * len(reach)
    if not isinstance(padding, str):
        return "zeros", _pairs(padding, len(reach))
    if padding == "VALID":
        return "zeros", none
    if padding in ("CIRCULAR", "REFLECT"):
        return (padding.lower() if any(reach) else "zeros"), same_pads(reach)
    if padding == "CAUSAL":
        return "zeros", tuple((total, 0) for total in reach)
    if _spread(layer["input_dilation"], len(reach)) != (1,) * len(reach):
        return "zeros", None
    strides = _spread(layer["strides"], len(reach))
    if any(stride > 1 and total for stride, total in zip(strides, reach, strict=True)):
        return "zeros", None
    pads = same_pads(reach)
    return "zeros", tuple((b, a) for a, b in pads) if padding == "SAME_LOWER" else pads


def _sizes_that_agree(module: Convolution, mode: str, pads: Pads, layer: FlaxLayer) -> str:
    """The input sizes for which ``"SAME"`` pads as torch does, by their remainders; empty if there are none.

    If the stride divides the size, it pads ``max(reach + 1 - stride, 0)``, else ``max(reach + 1 - remainder,
    0)`` (``jax.lax.padtype_to_pads``).
    """
    reach, strides = kernel_reach(module), tuple(module.stride)
    plain = _spread(layer["input_dilation"], len(reach)) == (1,) * len(reach)
    if layer["padding"] not in ("SAME", "SAME_LOWER") or mode != "zeros" or not plain:
        return ""
    if (strides, tuple(module.dilation)) != tuple(
        _spread(layer[name], len(reach)) for name in ("strides", "kernel_dilation")
    ):
        return ""
    found = []
    for pair, total, stride in zip(pads, reach, strides, strict=True):
        places = [
            rest
            for rest in range(stride)
            if _split_pads(max(total + 1 - (rest or stride), 0), str(layer["padding"])) == pair
        ]
        if not places:
            return ""
        if len(places) < stride:
            found.append(f"size % {stride} is {' or '.join(map(str, places))}")
    return " and ".join(dict.fromkeys(found))


def _split_pads(total: int, word: str) -> tuple[int, int]:
    """A total padding, split into before and after as a word splits it."""
    less, more = total // 2, total - total // 2
    return (more, less) if word == "SAME_LOWER" else (less, more)


def _pairs(padding: Any, rank: int) -> Pads | None:
    if isinstance(padding, int):
        return ((padding, padding),) * rank
    if not isinstance(padding, Iterable):
        return None
    return tuple((size, size) if isinstance(size, int) else (size[0], size[1]) for size in padding)


def _transposed_pads(module: Transposed, layer: FlaxLayer, rank: int) -> Pads | None:
    padding = layer["padding"]
    if not isinstance(padding, str):
        return _pairs(padding, rank)
    if layer.kind == "Conv":
        return ((0, 0),) * rank if padding == "VALID" else None
    if padding not in ("SAME", "VALID"):
        return None
    return tuple(
        _transposed_pads_of_word(padding, total + 1, stride)
        for total, stride in zip(kernel_reach(module), _spread(layer["strides"], rank), strict=True)
    )


def _transposed_pads_of_word(padding: str, size: int, stride: int) -> tuple[int, int]:
    """The padding that ``jax.lax.conv_transpose`` makes of a word, for a kernel of this size."""
    if padding == "VALID":
        total = size + stride - 2 + max(size - stride, 0)
        before = size - 1
    else:
        total = size + stride - 2
        before = size - 1 if stride > size - 1 else (total + 1) // 2
    return before, total - before
