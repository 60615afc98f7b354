"""The layouts of weights that torch computes: in Flax they are the computed weight, or other parts.

Folding is neither linear nor lossless. The formulas are those of ``torch.nn.utils.parametrizations`` in
evaluation. ``_parametrized`` chooses the layout for a layer, and names the sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts import Layout, same_bits

__all__ = ["SpectralNormed", "SpectralParts", "WeightNormed", "WeightParts"]


@dataclass(frozen=True)
class WeightNormed(Layout):
    """``v`` and its length ``g``, folded to ``g v / |v|``; the length is over the axes where ``g`` has size 1."""

    length: tuple[int, ...]
    is_view = False
    is_linear = False
    lossless = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(v, g)`` to the weight."""
        direction, length = tensors
        return (direction * (length / _length(direction, self.length)),)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The previous parts if they fold to this weight, else the weight and its length.

        ``weight_norm`` itself makes these of a weight, and they fold to it to the bit. A zero weight has no
        direction; a vector of ones takes its place.
        """
        (weight,) = tensors
        if was is not None and same_bits(self.forward(was)[0], weight):
            return tuple(was)
        length = _length(weight, self.length)
        return torch.where(length == 0, torch.ones_like(weight), weight), length

    def __str__(self) -> str:
        return "g v / |v| (lossy)"


@dataclass(frozen=True)
class WeightParts(Layout):
    """``v`` and ``g`` of torch beside the kernel and the scales of ``nnx.WeightNorm``; no scale is negative.

    ``nnx.WeightNorm`` writes the normalised kernel over its own in every call, so a negative scale would flip
    it every time. The sign goes into the kernel, once.
    """

    kernel: Layout
    scales: tuple[int, ...]
    is_view = False
    is_linear = False
    lossless = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(v, g)`` to the kernel and the scales."""
        direction, length = tensors
        turned = torch.where(length < 0, -direction, direction)
        return *self.kernel.forward((turned,)), length.abs().reshape(self.scales)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The previous parts if they give these, else these: they fold to the same weight."""
        if was is not None and all(map(same_bits, self.forward(was), tensors)):
            return tuple(was)
        kernel, scales = tensors
        (direction,) = self.kernel.inverse((kernel,))
        return direction, scales.reshape(-1, *[1] * (direction.ndim - 1))

    def __str__(self) -> str:
        return f"v by {self.kernel}, and g, the sign of g in v (lossy)"


@dataclass(frozen=True)
class SpectralNormed(Layout):
    """``W`` and its singular vectors ``u`` and ``v``, folded to ``W / (u' W v)``."""

    dim: int
    is_view = False
    is_linear = False
    lossless = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(W, u, v)`` to the weight."""
        original, left, right = tensors
        return (original / sigma(original, left, right, self.dim),)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The previous parts if they fold to this weight, else the weight with its singular vectors.

        torch divides by the singular value again, so a weight with a singular value other than 1 has no parts.
        """
        (weight,) = tensors
        if was is not None and same_bits(self.forward(was)[0], weight):
            return tuple(was)
        wide = torch.promote_types(weight.dtype, torch.float32)
        left, values, right = torch.linalg.svd(_matrix(weight, self.dim).to(wide), full_matrices=False)
        if not weight.is_meta and abs(float(values[0]) - 1) > 1e-4:
            raise ValueError(
                f"the largest singular value of the weight is {float(values[0]):.4g}, and torch's spectral_norm "
                "would divide by it; remove it from the torch module first"
            )
        return weight, left[:, 0].to(weight.dtype), right[0].to(weight.dtype)

    def __str__(self) -> str:
        return "W / (u' W v) (lossy)"


@dataclass(frozen=True)
class SpectralParts(Layout):
    """``W``, ``u`` and ``v`` of torch beside the kernel, ``u`` and ``sigma`` of linen's ``SpectralNorm``."""

    dim: int
    kernel: Layout
    is_view = False
    is_linear = False
    lossless = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(W, u, v)`` to ``(kernel, u, sigma)``."""
        original, left, right = tensors
        return *self.kernel.forward((original,)), left[None], sigma(original, left, right, self.dim)

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """``(kernel, u, sigma)`` to ``(W, u, v)``: the previous v if nothing changed, else one iteration from u."""
        if was is not None and all(map(same_bits, self.forward(was), tensors)):
            return tuple(was)
        kernel, left, _ = tensors
        (original,) = self.kernel.inverse((kernel,))
        right = torch.mv(_matrix(original, self.dim).t(), left[0])
        return original, left[0], right / right.norm().clamp_min(1e-12)

    def __str__(self) -> str:
        return f"W by {self.kernel}, u, and sigma = u' W v for v (lossy)"


def sigma(original: Tensor, left: Tensor, right: Tensor, dim: int) -> Tensor:
    """``u' W v`` with the axis ``dim`` of ``W`` against all its others, as torch computes it."""
    return torch.dot(left, torch.mv(_matrix(original, dim), right))


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).flatten(1)


def _length(direction: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The norm of ``v``, in the shape of ``g``."""
    if not shape:
        return direction.norm()
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return torch.linalg.vector_norm(direction, dim=axes, keepdim=True) if axes else direction.abs()
