"""How one torch tensor is carried by one JAX array, with x64 on or off.

Owns the carriages (as it is, in 32 bits, in 32-bit words), the JAX type of each, and the writing of a
result into JAX's memory, with its checks. Refuses results that JAX cannot hold, that do not fit, or that
are not what was announced.
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
    """How one tensor is carried by a JAX array."""

    spec: Spec
    carry: str = "plain"
    """``"plain"``: as it is. ``"narrow"``: a 64-bit integer in 32 bits, checked when it is written.
    ``"announced"``: an integer said to have 32 bits, which may turn out to have 64 and is then checked.
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
        """For a result that the caller has announced: with x64 off JAX has no word for torch's int64.

        Raises:
            DtypeError: As for `of_output`.
        """
        if spec.dtype in _NARROW.values() and not x64():
            return cls(spec, "announced", name)
        return cls.of_output(spec, name)

    @classmethod
    def of_residual(cls, spec: Spec) -> "Encoding":
        """For a tensor that only the backward sees: kept to the bit."""
        return cls(spec, "bits" if spec.dtype in _WIDE and not x64() else "plain", "a residual")

    def struct(self) -> jax.ShapeDtypeStruct:
        """The JAX array that carries it."""
        if self.carry == "bits":
            return jax.ShapeDtypeStruct((*self.spec.shape, self.spec.dtype.itemsize // 4), np.dtype("int32"))
        dtype = _NARROW[self.spec.dtype] if self.carry == "narrow" else self.spec.dtype
        return jax.ShapeDtypeStruct(self.spec.shape, jax_dtype(dtype))

    def batched(self, dim: int | None, size: int) -> "Encoding":
        if dim is None:
            return self
        shape = (*self.spec.shape[:dim], size, *self.spec.shape[dim:])
        return replace(self, spec=Spec(shape, self.spec.dtype))

    def decode(self, carrier: torch.Tensor) -> torch.Tensor:
        """The tensor that ``carrier`` holds."""
        dtype = self.spec.dtype
        if self.carry in ("plain", "announced"):
            return carrier
        if self.carry == "narrow":
            return carrier.to(dtype)
        if dtype.is_complex:
            return torch.view_as_complex(carrier.view(torch.float64))
        return carrier.view(dtype).squeeze(-1)

    def write(self, carrier: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write ``tensor`` to the memory of the JAX array.

        Raises:
            OutputError: It has another shape or dtype than was announced.
            NarrowingError: A 64-bit integer does not fit in 32 bits.
        """
        wide = self.carry == "announced" and _NARROW.get(tensor.dtype) is self.spec.dtype
        if tensor.shape != self.spec.shape or not (wide or tensor.dtype is self.spec.dtype):
            raise OutputError(
                f"{self.name or 'a result'} of the torch function was announced as {_words(self.spec)} and is "
                f"{_words(Spec.of(tensor))}. Correct output_shape=, or return the same shape and dtype for "
                "the same shapes and dtypes of the arguments."
            )
        if wide or self.carry == "narrow":
            _check_fits(tensor, carrier.dtype, self.name)
        elif self.carry == "bits":
            tensor = tensor.resolve_conj().resolve_neg().contiguous()
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.unsqueeze(-1)
            tensor = tensor.view(torch.int32)
        carrier.copy_(tensor.detach() if tensor.requires_grad else tensor)


def _words(spec: Spec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')}[{','.join(map(str, spec.shape))}]"


def _check_fits(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if not tensor.numel():
        return
    bounds = torch.iinfo(dtype)
    # uint64 has no comparisons in torch; seen as int64, what does not fit in uint32 is negative or too large.
    seen = tensor.view(torch.int64) if tensor.dtype is torch.uint64 else tensor
    low, high = (int(v) for v in seen.aminmax())
    if low < bounds.min or high > bounds.max:
        raise NarrowingError(
            f"{name} of the torch function is {tensor.dtype} with values in [{low}, {high}], which do not fit in "
            f"{dtype}; JAX holds no 64-bit integers with x64 off. Set jax_enable_x64, or return "
            "another dtype."
        )
