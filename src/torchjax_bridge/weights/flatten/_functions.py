"""What functions of torch's do to the axes of tensors: keep, merge, split, move, drop or make them.

`apply` knows a function by its name. Shapes say what a reshape does, and a call on a tensor of distinct sizes says
which axes a permutation or a reduction keeps. The axes that an unknown function gives are unknown.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchjax_bridge.recording import Node, Value, tensors_of

from ._axes import Atom, Axes, Axis, derived, mark, regroup, size_of, spoil, unify, unknown

__all__ = ["Take", "apply", "broadcast", "contract", "convolve", "mark_map", "pool"]

Take = Callable[[Value], Axes]
"""Gives the axes of a value."""

# In-place functions end in an underscore, and the operators of Python have two on both sides.
_ELEMENTWISE = frozenset((
    "abs", "add", "addcdiv", "addcmul", "alpha_dropout", "and", "bernoulli", "bfloat16", "ceil", "celu",
    "clamp", "clamp_max", "clamp_min", "clip", "clone", "contiguous", "copy", "cos", "cpu", "cuda", "detach",
    "div", "divide", "double", "dropout", "dropout1d", "dropout2d", "dropout3d", "elu", "empty_like", "eq",
    "erf", "exp", "expm1", "feature_alpha_dropout", "fill", "float", "floor", "floordiv", "fmod", "full_like",
    "ge", "gelu", "gt", "half", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "iadd", "imul", "int",
    "invert", "isfinite", "isnan", "isub", "itruediv", "layer_norm", "le", "leaky_relu", "lerp", "log", "log1p",
    "log2", "log_softmax", "logical_and", "logical_not", "logical_or", "logsigmoid", "long", "lt",
    "masked_fill", "maximum", "minimum", "mish", "mod", "mul", "multiply", "nan_to_num", "ne", "neg",
    "negative", "normal", "normalize", "ones_like", "or", "pow", "radd", "rand_like", "randn_like", "rdiv",
    "reciprocal", "relu", "relu6", "remainder", "rms_norm", "rmul", "round", "rpow", "rrelu", "rsqrt", "rsub",
    "rtruediv", "selu", "sigmoid", "sign", "silu", "sin", "softmax", "softmin", "softplus", "softshrink",
    "softsign", "sqrt", "square", "sub", "subtract", "tan", "tanh", "tanhshrink", "threshold", "to",
    "true_divide", "truediv", "type", "type_as", "uniform", "where", "xor", "zero", "zeros_like",
))  # fmt: skip
_RESHAPES = frozenset(
    ("flatten", "ravel", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view", "view_as")
)
_MOVES = frozenset(
    ("T", "mT", "moveaxis", "movedim", "permute", "swapaxes", "swapdims", "t", "transpose", "adjoint")
)
_REDUCES = frozenset((
    "all", "amax", "amin", "any", "argmax", "argmin", "logsumexp", "max", "mean", "min", "nanmean", "norm",
    "prod", "std", "sum", "var", "count_nonzero",
))  # fmt: skip
_POOLS = tuple(
    f"{kind}_pool{rank}d" for rank in (1, 2, 3) for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg")
)  # fmt: skip
_RESAMPLES = ("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
_SHUFFLES = ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
_NORMS_OF_MAPS = ("batch_norm", "group_norm", "instance_norm", "prelu", "local_response_norm")
_PRODUCTS = {
    "linear": "...i,oi->...o",
    "bilinear": "...i,...j,oij->...o",
    "scaled_dot_product_attention": "...qi,...ki,...kv->...qv",
}
_MAKES = frozenset(
    ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "randint", "tensor", "zeros")
)


def apply(node: Node, take: Take) -> list[Axes]:
    """The axes of each tensor that a function returns."""
    parts = node.function.split(".")
    name = parts[-2 if parts[-1] == "__get__" else -1].strip("_")
    results: list[Value] = list(tensors_of(node.result))
    values: list[Value] = list(tensors_of((node.args, node.kwargs)))
    given = [take(value) for value in values]
    shapes = [value.shape for value in results]
    if not results or any(0 in value.shape for value in (*values, *results)):
        return [unknown(shape) for shape in shapes]
    x, shape = given[0] if given else (), shapes[0]
    if name.startswith("new_") or (not given and name in _MAKES):
        return [tuple((Atom(size),) for size in shape)]
    if not given:
        return [unknown(shape) for shape in shapes]
    if name in _ELEMENTWISE or (name in ("max", "min") and len(values) > 1):
        return [broadcast(given, shape)]
    if name in _RESHAPES:
        return [regroup(x, shape)]
    if name in _MOVES or name in _REDUCES:
        return [_kept(node, name, x, shape) for shape in shapes]
    if name in ("expand", "expand_as", "broadcast_to", "repeat", "tile"):
        return [_stretched(x, shape)]
    if name in ("chunk", "split", "tensor_split", "narrow", "glu", "pad"):
        return [_parts(x, shape) for shape in shapes]
    if name in ("unbind", "iter", "select"):
        return [_without(x, _dim(node, len(x))) for _ in shapes]
    if name in ("cat", "concat", "stack"):
        return [_joined(node, given, shape, stacked=name == "stack")]
    if name in ("getitem", "setitem"):
        return [_indexed(node, given, shape, values)]
    if name == "unfold":
        return [_patches(node, x, shape)]
    if name in ("roll", "flip", "cumsum", "sort", "msort"):  # entries in another order
        return [tuple(derived(size_of(axis), [axis]) for axis in x) for _ in shapes]
    if name in ("matmul", "bmm", "mm", "spmm", "rmatmul"):
        return [_product(given[name == "rmatmul"], given[name != "rmatmul"], shape)]
    if name == "einsum":
        return [contract(str(node.args[0]), given, shape)]
    if name in _PRODUCTS:
        equation = _PRODUCTS[name]
        return [contract(equation, given[: equation.count(",") + 1], shape)]
    if name.startswith("conv") and name[-1] == "d":
        spoil([*given[1]])
        return [convolve(x, shape, int(name[-2]))]
    if name in _POOLS or name in _RESAMPLES or name in _SHUFFLES:
        rank = int(name[-2]) if name in _POOLS else len(shape) - 2
        return [pool(x, shape, rank, moved=name in _SHUFFLES) for shape in shapes]
    if name in _NORMS_OF_MAPS:
        mark_map(x)
        for weight in (axes for axes in given[1:] if len(axes) == 1 and size_of(axes[0]) == size_of(x[1])):
            unify(x[1], weight[0])
        return [x]
    spoil([axis for axes in given for axis in axes], leaked=True)
    return [unknown(shape) for shape in shapes]


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


def _stretched(x: Axes, shape: Sequence[int]) -> Axes:
    padded = (*[()] * (len(shape) - len(x)), *x)
    return tuple(
        axis if size_of(axis) == size else (Atom(size, broken=bool(axis) and size_of(axis) > 1),)
        for axis, size in zip(padded, shape, strict=True)
    )


_DISTINCT = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def _kept(node: Node, name: str, x: Axes, shape: Sequence[int]) -> Axes:
    """The axes that a permutation or a reduction keeps, by what it does to a tensor of distinct sizes."""
    probe = torch.empty(_DISTINCT[: len(x)], device="meta")
    found: Any = getattr(probe, name)
    if not isinstance(found, torch.Tensor):
        words = {word: value for word, value in node.kwargs.items() if not isinstance(value, Value)}
        found = found(*node.args[1:], **words)
    sizes = (found if isinstance(found, torch.Tensor) else found[0]).shape
    return tuple(x[_DISTINCT.index(size)] if size > 1 else () for size in sizes)


# --- parts and concatenations ---------------------------------------------------------------------------------


def _dim(node: Node, rank: int) -> int:
    found = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return int(found) % rank


def _parts(x: Axes, shape: Sequence[int]) -> Axes:
    """The axes of a part: one of another size is a part of that axis, or all of it with something around."""
    return tuple(a if size_of(a) == n else derived(n, [a]) for a, n in zip(x, shape, strict=True))


def _without(x: Axes, at: int) -> Axes:
    return (*x[:at], *x[at + 1 :])


def _joined(node: Node, given: Sequence[Axes], shape: Sequence[int], *, stacked: bool) -> Axes:
    at = _dim(node, len(shape))
    whole: Axis = (Atom(shape[at]),)
    if not stacked:
        given = [axes for axes in given if len(axes) == len(shape)]  # torch ignores empty ones
        whole = given[0][at] if len(given) == 1 else derived(shape[at], [axes[at] for axes in given])
        given = [_without(axes, at) for axes in given]
    rest = broadcast(given, [size for place, size in enumerate(shape) if place != at])
    return (*rest[:at], whole, *rest[at:])


def _indexed(node: Node, given: Sequence[Axes], shape: Sequence[int], values: Sequence[Value]) -> Axes:
    """A part of a tensor by an index of numbers and slices; where it is written to, the whole."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    writes = node.function.endswith("__setitem__")
    rest, found = list(given[0]), list[Axis]()
    chosen = [one for one in index if isinstance(one, Value) and one.dtype is not torch.bool]
    if any(isinstance(one, bool | list | Value) and one not in chosen for one in index) or len(chosen) > 1:
        spoil([axis for axes in given for axis in axes], leaked=not writes)
        return given[0] if writes else unknown(shape)
    sizes = list(values[0].shape)
    for place, one in enumerate(index):
        if one is None:
            found.append(())
        elif one is Ellipsis:
            many = len(rest) - sum(other is not None for other in index[place + 1 :])
            found += rest[:many]
            del rest[:many], sizes[:many]
        else:
            axis, size = rest.pop(0), sizes.pop(0)
            if isinstance(one, Value):
                found += [derived(count, [axis]) for count in one.shape]
            if isinstance(one, slice):
                ends = [None if end is None else int(end) for end in (one.start, one.stop, one.step)]
                count = len(range(size)[slice(*ends)])
                found.append(axis if count == size else derived(count, [axis]))
    part = (*found, *rest)
    if not writes:
        return part
    if len(given) > 1:
        broadcast([part, given[1]], [size_of(axis) for axis in part])
    return given[0]


def _patches(node: Node, x: Axes, shape: Sequence[int]) -> Axes:
    """The axes of ``Tensor.unfold``, which takes one apart, or of ``F.unfold``, which makes channels of patches."""
    if "functional" not in node.function:
        at, size = int(node.args[1]) % len(x), shape[-1]
        whole = shape[at] * size == size_of(x[at])
        outer, inner = (
            regroup((x[at],), (shape[at], size))
            if whole
            else (derived(n, [x[at]]) for n in (shape[at], size))
        )
        return (*x[:at], outer, *x[at + 1 :], inner)
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


def convolve(x: Axes, shape: Sequence[int], rank: int) -> Axes:
    """The axes of a convolution's output."""
    mark_map(x, rank)
    at = len(shape) - rank - 1
    return (*x[:at], _new(shape[at], "channel"), *(_new(size, "space") for size in shape[at + 1 :]))


def pool(x: Axes, shape: Sequence[int], rank: int, *, moved: bool = False) -> Axes:
    """The axes of a pooled or resampled map; with ``moved``, its channels are others."""
    made = convolve(x, shape, rank)
    at = len(shape) - rank - 1
    return made if moved else (*made[:at], x[at], *made[at + 1 :])


def _new(size: int, role: Any) -> Axis:
    return (Atom(size, {role}),) if size > 1 else ()
