"""How one JAX array holds one torch tensor, with x64 on or off.

Owns the forms (as it is, in 32 bits, in 32-bit words), the shape and dtype of the array in each form, and the
writing of a result into JAX's memory, with its checks. Refuses results that JAX cannot hold, that do not fit,
or that are not what was announced.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError, NarrowingError, OutputError
from torchjax_bridge.exchange import jax_dtype

from .._settings import x64
from ._graph import Spec

__all__ = ["Encoding"]

_NARROW = {torch.int64: torch.int32, torch.uint64: torch.uint32}
_WIDE = (*_NARROW, torch.float64, torch.complex128)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one JAX array holds one tensor."""

    spec: Spec
    form: str = "plain"
    """``"plain"``: as it is. ``"narrow"``: a 64-bit integer in 32 bits, checked when it is written.
    ``"announced"``: an integer announced with 32 bits; if it has 64, it is checked.
    ``"bits"``: the 32-bit words of a 64-bit value on a new last axis, for residuals with x64 off."""
    name: str = ""

    @classmethod
    def of_output(cls, spec: Spec, name: str) -> "Encoding":
        """For a result that the caller sees.

        Raises:
            DtypeError: JAX has no such dtype, or not with x64 off.
        """
        if spec.dtype in _WIDE and not x64():
            if spec.dtype not in _NARROW:
                half = "torch.float32" if spec.dtype is torch.float64 else "torch.complex64"
                raise DtypeError(
                    f"{name} of the torch function is {spec.dtype}, which needs x64, and that is off. Return "
                    f"it as {half} (.to({half})), or set jax_enable_x64."
                )
            return cls(spec, "narrow", name)
        jax_dtype(spec.dtype)
        return cls(spec, "plain", name)

    @classmethod
    def of_announced(cls, spec: Spec, name: str) -> "Encoding":
        """For a result that the caller has announced, who cannot name int64 to JAX with x64 off.

        Raises:
            DtypeError: As for `of_output`.
        """
        if spec.dtype in _NARROW.values() and not x64():
            return cls(spec, "announced", name)
        return cls.of_output(spec, name)

    @classmethod
    def of_residual(cls, spec: Spec) -> "Encoding":
        """For a tensor that only the backward sees; every bit is kept."""
        return cls(spec, "bits" if spec.dtype in _WIDE and not x64() else "plain", "a residual")

    def struct(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the JAX array."""
        if self.form == "bits":
            return jax.ShapeDtypeStruct((*self.spec.shape, self.spec.dtype.itemsize // 4), np.dtype("int32"))
        dtype = _NARROW[self.spec.dtype] if self.form == "narrow" else self.spec.dtype
        return jax.ShapeDtypeStruct(self.spec.shape, jax_dtype(dtype))

    def batched(self, dim: int | None, size: int) -> "Encoding":
        if dim is None:
            return self
        shape = (*self.spec.shape[:dim], size, *self.spec.shape[dim:])
        return replace(self, spec=Spec(shape, self.spec.dtype))

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """The tensor that JAX's memory holds; ``stored`` is a view of that memory."""
        dtype = self.spec.dtype
        if self.form in ("plain", "announced"):
            return stored
        if self.form == "narrow":
            return stored.to(dtype)
        if dtype.is_complex:
            return torch.view_as_complex(stored.view(torch.float64))
        return stored.view(dtype).squeeze(-1)

    def write(self, stored: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write ``tensor`` to JAX's memory; ``stored`` is a view of that memory.

        Raises:
            OutputError: It has another shape or dtype than was announced.
            NarrowingError: A 64-bit integer does not fit in 32 bits.
        """
        wide = self.form == "announced" and _NARROW.get(tensor.dtype) is self.spec.dtype
        if tensor.shape != self.spec.shape or not (wide or tensor.dtype is self.spec.dtype):
            raise OutputError(
                f"{self.name or 'a result'} of the torch function was announced as {_describe(self.spec)} and is "
                f"{_describe(Spec.of(tensor))}. Correct output_shape=, or return the same shape and dtype for "
                "the same shapes and dtypes of the arguments."
            )
        if wide or self.form == "narrow":
            _check_fits(tensor, stored.dtype, self.name)
        elif self.form == "bits":
            tensor = tensor.resolve_conj().resolve_neg().contiguous()
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.unsqueeze(-1)
            tensor = tensor.view(torch.int32)
        stored.copy_(tensor.detach() if tensor.requires_grad else tensor)


def _describe(spec: Spec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')}[{','.join(map(str, spec.shape))}]"


def _check_fits(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if not tensor.numel():
        return
    bounds = torch.iinfo(dtype)
    # torch cannot compare uint64. Seen as int64, a value that does not fit in uint32 is negative or too large.
    seen = tensor.view(torch.int64) if tensor.dtype is torch.uint64 else tensor
    low, high = (int(v) for v in seen.aminmax())
    if low < bounds.min or high > bounds.max:
        raise NarrowingError(
            f"{name} of the torch function is {tensor.dtype} with values in [{low}, {high}], which do not fit in "
            f"{dtype}; JAX holds no 64-bit integers with x64 off. Set jax_enable_x64, or return "
            "another dtype."
        )
