"""What functions of torch's do to the axes of tensors: keep, merge, split, move, drop or make them.

`apply` asks torch where it can: a view tells by its strides, an elementwise function by its tag, a reduction by
what it does to distinct sizes. It knows the others by name. What an unknown function gives is unknown.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch

from torchjax_bridge.recording import Node, Value, replaced, tensors_of

from ._axes import Atom, Axes, Axis, derived, hold, mark, regroup, size_of, spoil, unify, unknown

__all__ = ["apply", "broadcast", "contract", "convolve", "mark_map"]

# Without those that torch tags, and without underscores: in-place functions have one, Python's operators four.
_ELEMENTWISE = frozenset((
    "alpha_dropout", "and", "bernoulli", "bfloat16", "contiguous", "copy", "cpu", "cuda", "detach", "divide",
    "double", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout", "fill", "float",
    "floordiv", "half", "hardswish", "iadd", "imul", "int", "invert", "isub", "itruediv", "layer_norm",
    "log_softmax", "logsigmoid", "long", "mod", "multiply", "negative", "normal", "normalize", "or", "radd", "rdiv",
    "rms_norm", "rmul", "rpow", "rtruediv", "softmax", "softmin", "softsign", "subtract", "tanhshrink", "to",
    "truediv", "type", "type_as", "uniform", "xor", "zero",
))  # fmt: skip
_REDUCES = frozenset((
    "all", "amax", "amin", "any", "argmax", "argmin", "logsumexp", "max", "mean", "min", "nanmean", "norm",
    "prod", "std", "sum", "var", "count_nonzero",
))  # fmt: skip
_REORDERS = ("roll", "flip", "cumsum", "sort", "msort")
_RESAMPLES = ("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
_SHUFFLES = ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
_NORMS_OF_MAPS = ("batch_norm", "group_norm", "instance_norm", "prelu", "local_response_norm")
_PRODUCTS = {
    "linear": "...i,oi->...o",
    "bilinear": "...i,...j,oij->...o",
    "scaled_dot_product_attention": "...qi,...ki,...kv->...qv",
}


def apply(node: Node, take: Callable[[Value], Axes]) -> list[Axes]:
    """The axes of each tensor that a function returns, by those of each that it takes.

    Raises:
        KeyError: The function is not known; other errors of Python's say the same of its arguments.
    """
    parts = node.function.split(".")
    name = parts[-2 if parts[-1] == "__get__" else -1].strip("_")
    results: list[Value] = list(tensors_of(node.result))
    values: list[Value] = list(tensors_of((node.args, node.kwargs)))
    given = [take(value) for value in values]
    shapes = [value.shape for value in results]
    if not results or any(0 in value.shape for value in (*values, *results)):
        return [unknown(shape) for shape in shapes]
    if not given or name.startswith("new_"):
        return [tuple((Atom(size),) for size in shape) for shape in shapes]
    x, shape = given[0], shapes[0]
    if name in _REDUCES and len(given) == 1:
        return [_kept(node, name, x)] * len(shapes)
    if _is_elementwise(name):
        return [broadcast(given, shape)]
    if name in ("glu", "pad", "repeat", "tile"):
        return [_resized(x, shape)]
    if name in ("cat", "concat", "stack"):
        return [_joined(node, given, shape, stacked=name == "stack")]
    if name in _REORDERS or (name == "getitem" and _picks(node.args[1])):
        return [tuple(derived(n, [a]) for n, a in zip(shape, x, strict=True)) for _ in shapes]
    if name in ("matmul", "bmm", "mm", "rmatmul"):
        return [_product(given[name == "rmatmul"], given[name != "rmatmul"], shape)]
    if name == "einsum":
        return [contract(str(node.args[0]), given, shape)]
    if name in _PRODUCTS:
        equation = _PRODUCTS[name]
        return [contract(equation, given[: equation.count(",") + 1], shape)]
    if name.startswith("conv") and name[-1] == "d":
        spoil([*given[1]])
        return [convolve(x, shape, int(name[-2]))]
    if name == "unfold" and "functional" in node.function:
        return [_patches(node, x, shape)]
    if name in _SHUFFLES or name in _RESAMPLES:
        return [convolve(x, shape, len(shape) - 2, same=name in _RESAMPLES)]
    if "pool" in name and name[-1] == "d":
        return [convolve(x, shape, int(name[-2]), same=True) for shape in shapes]
    if name in _NORMS_OF_MAPS:
        mark_map(x)
        for weight in (axes for axes in given[1:] if len(axes) == 1 and size_of(axes[0]) == size_of(x[1])):
            unify(x[1], weight[0])
        return [x]
    if name == "setitem" and len(values) <= 2:
        for written in given[1:]:
            _write(node, x, written, values[:1])
        return [x]
    return _views(node, given, values)


# --- what torch tells ------------------------------------------------------------------------------------------


@cache
def _is_elementwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    tagged = any(torch.Tag.pointwise in overload.tags for overload in overloads)
    return tagged or name in _ELEMENTWISE or name.endswith("_like")


_DISTINCT = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def _kept(node: Node, name: str, x: Axes) -> Axes:
    """The axes that a reduction keeps."""
    probe = torch.empty(_DISTINCT[: len(x)], device="meta")
    found = getattr(probe, name)(
        *node.args[1:], **{k: v for k, v in node.kwargs.items() if not isinstance(v, Value)}
    )
    sizes = (found if isinstance(found, torch.Tensor) else found[0]).shape
    return tuple(x[_DISTINCT.index(size)] if size > 1 else () for size in sizes)


def _views(node: Node, given: Sequence[Axes], values: Sequence[Value]) -> list[Axes]:
    """The axes of views of what a function takes, as it makes them of tensors without values."""
    function: Any = torch
    for name in node.function.split(".")[1:]:
        function = getattr(function, name)
    probes = [torch.empty(value.shape, dtype=value.dtype, device="meta") for value in values]
    args, kwargs = replaced((node.args, node.kwargs), dict(zip(map(id, values), probes, strict=True)))
    made = function(*args, **kwargs)
    known = {id(probe): axes for probe, axes in zip(probes, given, strict=True) if not node.inplace}
    return [
        _view(known[id(one if id(one) in known else one._base)], one)
        for one in ([made] if isinstance(made, torch.Tensor) else made)
        if one.dtype == probes[0].dtype
    ]


def _write(node: Node, x: Axes, written: Axes, values: Sequence[Value]) -> None:
    """What becomes of the axes of a tensor a part of which is written to."""
    [part] = _views(
        replace(node, args=node.args[:2], function="torch.Tensor.__getitem__", inplace=False), [x], values
    )
    for axis, given in zip(reversed(part), reversed(written), strict=False):
        if size_of(axis) != size_of(given):
            continue
        if len(axis) == 1 and axis not in x and axis[0].sources:
            hold(axis[0].sources[0], given)
        else:
            unify(axis, given)


def _view(x: Axes, view: torch.Tensor) -> Axes:
    """The axes of a view of a contiguous tensor: all entries in other axes, or a part of each axis."""
    order = sorted(range(view.dim()), key=view.stride, reverse=True)
    if view.numel() == prod(map(size_of, x)) and view.permute(order).is_contiguous():
        axes = regroup(x, [view.shape[at] for at in order])
        return tuple(axes[order.index(at)] for at in range(view.dim()))
    return tuple(_part(x, size, step) for size, step in zip(view.shape, view.stride(), strict=True))


def _part(x: Axes, size: int, step: int) -> Axis:
    """The axis of so many entries of a contiguous tensor, each a step behind the last."""
    if step == 0 or size == 1:
        return (Atom(size),)
    inner = 1
    for axis in reversed(x):
        outer = inner * size_of(axis)
        if (inner, outer) == (step, step * size):
            return axis
        if step < outer and step % inner == 0 and step * (size - 1) < outer:
            return derived(size, [axis])
        inner = outer
    raise ValueError(step)


# --- axes that stay -------------------------------------------------------------------------------------------


def broadcast(given: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """The axes of an elementwise function: those that several operands have are the same."""
    found: list[Axis] = []
    for place in range(-len(shape), 0):
        there = [
            axes[place] for axes in given if len(axes) >= -place and size_of(axes[place]) == shape[place]
        ]
        for other in there[1:]:
            unify(there[0], other)
        found.append(
            there[0] if there else derived(shape[place], [a[place] for a in given if len(a) >= -place])
        )
    return tuple(found)


# --- parts and concatenations ---------------------------------------------------------------------------------


def _resized(x: Axes, shape: Sequence[int]) -> Axes:
    """The axes of a part of a tensor, or of all of it with something around."""
    padded = (*[()] * (len(shape) - len(x)), *x)
    return tuple(a if size_of(a) == n else derived(n, [a]) for a, n in zip(padded, shape, strict=True))


def _picks(index: Any) -> bool:
    """Whether an index picks entries of one axis by a tensor, and otherwise takes parts."""
    index = index if isinstance(index, tuple) else (index,)
    picked = [one for one in index if isinstance(one, Value)]
    others = all(isinstance(one, slice | Value) or one is Ellipsis for one in index)
    return others and len(picked) == 1 and len(picked[0].shape) == 1


def _joined(node: Node, given: Sequence[Axes], shape: Sequence[int], *, stacked: bool) -> Axes:
    words = node.kwargs
    at = int(node.args[1] if len(node.args) > 1 else words.get("dim", words.get("axis", 0))) % len(shape)
    # torch ignores empty ones
    given = [axes for axes in given if len(axes) == len(shape) - stacked]
    there = [() if stacked else axes[at] for axes in given]
    others = [(*axes[:at], *axes[at + (not stacked) :]) for axes in given]
    rest = broadcast(others, (*shape[:at], *shape[at + 1 :]))
    return (*rest[:at], there[0] if len(there) == 1 else derived(shape[at], there), *rest[at:])


def _patches(node: Node, x: Axes, shape: Sequence[int]) -> Axes:
    """The axes of ``F.unfold``, which makes channels of patches."""
    mark_map(x, 2)
    kernel = node.args[1] if len(node.args) > 1 else node.kwargs["kernel_size"]
    rows, columns = kernel if isinstance(kernel, tuple | list) else (kernel, kernel)
    channels = (*x[-3], *_new(int(rows), "space"), *_new(int(columns), "space"))
    return (*x[:-3], channels, _new(shape[-1], "space"))


# --- products -------------------------------------------------------------------------------------------------


def _product(x: Axes, y: Axes, shape: Sequence[int]) -> Axes:
    """A product of matrices or vectors."""
    left, right = ("i" if len(x) == 1 else "...qi"), ("i" if len(y) == 1 else "...ik")
    return contract(f"{left},{right}->...{'q' * (len(x) > 1)}{'k' * (len(y) > 1)}", [x, y], shape)


def contract(equation: str, given: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """A sum of products: axes of the same letter are the same, as are those for which dots stand in front.

    Raises:
        ValueError: The equation has no arrow, or dots elsewhere.
    """
    operands, arrow, result = equation.replace(" ", "").replace("...", ".").partition("->")
    axes: dict[str, Axis] = {}
    others: list[Axes] = []
    for letters, there in zip(operands.split(","), given, strict=True):
        named = letters.removeprefix(".")
        others.append(there[: len(there) - len(named)])
        if not arrow or (others[-1] and named == letters):
            raise ValueError(equation)
        for letter, axis in zip(named, there[len(others[-1]) :], strict=True):
            if size_of(axes.setdefault(letter, axis)) == size_of(axis):
                unify(axes[letter], axis)
    found = result.removeprefix(".")
    return (*broadcast(others, shape[: len(shape) - len(found)]), *(axes[letter] for letter in found))


# --- maps -----------------------------------------------------------------------------------------------------


def mark_map(x: Axes, rank: int | None = None) -> None:
    """The axes are those of a map ``(N, C, *space)``; ``rank`` is the number of axes of space."""
    at = 1 if rank is None else len(x) - rank - 1
    if len(x) > at + 1:
        mark(x[at], "channel")
        for axis in x[at + 1 :]:
            mark(axis, "space")


def convolve(x: Axes, shape: Sequence[int], rank: int, *, same: bool = False) -> Axes:
    """The axes of what a convolution makes of a map; with ``same``, of what keeps its channels."""
    mark_map(x, rank)
    at = len(shape) - rank - 1
    channels = x[at] if same else _new(shape[at], "channel")
    return (*x[:at], channels, *(_new(size, "space") for size in shape[at + 1 :]))


def _new(size: int, role: Any) -> Axis:
    return (Atom(size, {role}),) if size > 1 else ()
