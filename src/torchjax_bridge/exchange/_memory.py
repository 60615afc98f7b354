"""Whether XLA can read a tensor's memory in place, and the copy for when it cannot.

Handles layout, alignment, conj and neg bits, and the narrowing of integers. A copy is always row-major.
"""

import torch

from torchjax_bridge.errors import NarrowingError

from ._dlpack import ALIGNMENT
from ._paths import Path
from ._refusals import leaf_name

__all__ = ["is_dense", "narrow", "row_major_copy", "why_not_shareable", "with_row_major_strides"]

_row_major = torch.contiguous_format


def why_not_shareable(tensor: torch.Tensor) -> str:
    """Why XLA cannot read this tensor's memory in place; empty when it can."""
    if tensor.is_conj():
        return "its conjugate bit is set, and JAX would read the unconjugated memory"
    if tensor.is_neg():
        return "its negative bit is set, and JAX would read the memory without the sign"
    if tensor.numel() == 0:
        return ""
    if not is_dense(tensor):
        return (
            f"its strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)} leave gaps or overlap, "
            "and XLA reads only gap-free layouts"
        )
    if offset := tensor.data_ptr() % ALIGNMENT:
        return (
            f"its address is {offset} bytes past a multiple of {ALIGNMENT}, "
            "and XLA reads only aligned buffers"
        )
    return ""


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether some permutation of the axes makes this tensor row-major without gaps."""
    if tensor.is_contiguous():
        return True
    strides, shape = tensor.stride(), tensor.shape
    if 0 in strides and 1 not in shape:  # expanded, as the gradient of every sum is: a shortcut
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def with_row_major_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, with the strides of size-1 axes set as in a row-major array.

    torch ignores the stride of an axis of size 1. XLA would read a permuted layout from it, and every new layout
    costs a compilation (https://github.com/jax-ml/jax/issues/24680).
    """
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    strides.reverse()
    return tensor if tensor.stride() == tuple(strides) else tensor.as_strided(tensor.shape, strides)


def row_major_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy of the tensor, its conj and neg bits resolved."""
    if tensor.is_complex():
        if tensor.data_ptr() % tensor.element_size():
            return _copy_by_parts(tensor)
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.clone(memory_format=_row_major)


def _copy_by_parts(tensor: torch.Tensor) -> torch.Tensor:
    """`row_major_copy` of a complex tensor whose address is not a multiple of its element size.

    torch does not allocate such memory, but a mapped file may have it. Some of torch's complex128 loops (clone is
    one) read 16 aligned bytes at once and would end in a segmentation fault. Its float64 loops do not.
    """
    conj = tensor.is_conj()
    parts = torch.view_as_real(tensor.conj() if conj else tensor)
    copied = torch.view_as_complex(parts.resolve_neg().clone(memory_format=torch.contiguous_format))
    return copied.conj_physical() if conj else copied


def narrow(tensor: torch.Tensor, dtype: torch.dtype, path: Path) -> torch.Tensor:
    """A row-major 32-bit copy, if every value fits."""
    if tensor.numel():
        if tensor.dtype is torch.uint64:
            # As int64, values of 2**63 and above are negative.
            low, high = (int(v) for v in torch.aminmax(tensor.view(torch.int64)))
            worst = high if low >= 0 and high >= 2**32 else (low % 2**64 if low < 0 else None)
        else:
            low, high = (int(v) for v in torch.aminmax(tensor))
            worst = low if low < -(2**31) else (high if high >= 2**31 else None)
        if worst is not None:
            raise NarrowingError(
                f"cannot share {leaf_name(path)} with JAX: x64 is off, so {tensor.dtype} becomes {dtype}, which "
                f"cannot hold {worst}. Set jax_enable_x64, or bring the values into range first."
            )
    return tensor.to(dtype, memory_format=torch.contiguous_format)
