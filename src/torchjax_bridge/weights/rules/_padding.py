"""How a convolution of torch's pads its input, in numbers: before and after on every axis of space."""

from collections.abc import Sequence

from torch import nn

__all__ = ["Convolution", "Pads", "Transposed", "kernel_reach", "same_pads", "torch_pads", "transposed_pads"]

Pads = tuple[tuple[int, int], ...]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def kernel_reach(module: Convolution | Transposed) -> tuple[int, ...]:
    """How far the kernel reaches beyond its first element, on each axis."""
    return tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))


def same_pads(reach: Sequence[int]) -> Pads:
    """What torch's "same" pads, Flax's "CIRCULAR" and "REFLECT", and its "SAME" at stride 1."""
    return tuple((total // 2, total - total // 2) for total in reach)


def torch_pads(module: Convolution) -> tuple[str, Pads]:
    """The mode of a convolution, "zeros" where it pads nothing, and the numbers."""
    total = kernel_reach(module)
    if module.padding == "same":
        pads: Pads = same_pads(total)
    elif isinstance(module.padding, str):
        pads = ((0, 0),) * len(total)
    else:
        pads = tuple((_number(size), _number(size)) for size in module.padding)
    return (module.padding_mode if any(map(any, pads)) else "zeros"), pads


def transposed_pads(module: Transposed) -> Pads:
    """What is added around the stretched input of a transposed convolution, so that a convolution computes it."""
    return tuple(
        (total - _number(p), total - _number(p) + _number(o))
        for total, p, o in zip(kernel_reach(module), module.padding, module.output_padding, strict=True)
    )


def _number(value: object) -> int:
    # torch's stubs allow a word where torch itself refuses it.
    return int(value)  # type: ignore[call-overload]
