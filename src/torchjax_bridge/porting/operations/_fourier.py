"""Fourier transforms and complex numbers, wherever the transformed axes stand."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, torch_order
from ._operands import axes_of, operands
from ._table import Translation, last_name, operation

__all__: list[str] = []

_ONE = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
_TWO = ("fft2", "ifft2", "rfft2", "irfft2")
_ALL = ("fftn", "ifftn", "rfftn", "irfftn")


@operation(*(f"fft.{name}" for name in _ONE))
def transform(
    at: Lowering, node: Node, input: Value, n: Any = None, dim: Any = -1, norm: str | None = None
) -> Placed:
    placed = at.in_torch_map_order(input)
    length = "" if n is None else f", {at.number(n)}"
    return placed.with_text(
        f"jnp.fft.{last_name(node)}({placed.text}{length}, axis={placed.place(dim)}{_scale(norm)})"
    )


def _scale(norm: str | None) -> str:
    return "" if norm in (None, "backward") else f", norm={norm!r}"


def _transform_of_axes(default: Any) -> Translation:
    def translate(
        at: Lowering, node: Node, input: Value, s: Any = None, dim: Any = default, norm: str | None = None
    ) -> Placed:
        placed, rank = at.in_torch_map_order(input), len(input.shape)
        if dim is None:
            dim = range(rank) if s is None else range(rank - len(s), rank)
        dims = dim if isinstance(dim, tuple | list | range) else (dim,)
        places = tuple(placed.place(int(axis)) for axis in dims)
        sizes = "" if s is None else f", {at.number(tuple(s))}"
        name = last_name(node).replace("2", "n") if len(places) != 2 else last_name(node).replace("n", "2")
        return placed.with_text(f"jnp.fft.{name}({placed.text}{sizes}, axes={places}{_scale(norm)})")

    return translate


for _names, _default in ((_TWO, (-2, -1)), (_ALL, None)):
    operation(*(f"fft.{name}" for name in _names))(_transform_of_axes(_default))


@operation("fft.fftshift", "fft.ifftshift")
def shifted(at: Lowering, node: Node, input: Value, dim: Any = None) -> Placed:
    placed = at.in_torch_map_order(input)
    places = tuple(placed.place(axis) for axis in axes_of(input, dim))
    return placed.with_text(f"jnp.fft.{last_name(node)}({placed.text}, axes={places})")


@operation("fft.fftfreq", "fft.rfftfreq")
def frequencies(at: Lowering, node: Node, n: Any, d: Any = 1.0, **kwargs: Any) -> Placed:
    return Placed(f"jnp.fft.{last_name(node)}({at.number(n)}, {at.number(d)})", (0,))


@operation("torch.complex")
def complex_(at: Lowering, node: Node, real: Value, imag: Value) -> Placed:
    (x, y), placed = operands(at, [real, imag])
    return placed.with_text(f"({x} + 1j * {y})")


@operation("polar")
def polar(at: Lowering, node: Node, abs: Value, angle: Value) -> Placed:
    (x, y), placed = operands(at, [abs, angle])
    return placed.with_text(f"({x} * jnp.exp(1j * {y}))")


@operation("view_as_complex")
def view_as_complex(at: Lowering, node: Node, input: Value) -> Placed:
    x = at.in_torch_order(input)
    return Placed(f"jax.lax.complex({x}[..., 0], {x}[..., 1])", torch_order(len(input.shape) - 1))


@operation("view_as_real")
def view_as_real(at: Lowering, node: Node, input: Value) -> Placed:
    placed = at.in_torch_map_order(input)
    text = f"jnp.stack([{placed.text}.real, {placed.text}.imag], axis=-1)"
    return Placed(text, (*placed.order, placed.rank))


@operation("imag")
def imag(at: Lowering, node: Node, input: Value) -> Placed:
    placed = at.at(input)
    return placed.with_text(f"{placed.text}.imag")


@operation("conj", "conj_physical")
def conjugate(at: Lowering, node: Node, input: Value) -> Placed:
    placed = at.at(input)
    if input.dtype is None or not input.dtype.is_complex:
        return placed
    return placed.with_text(f"jnp.conj({placed.text})")
