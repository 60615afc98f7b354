"""Reads single calls in the source of a ``forward``: which flatten, permute or pool, and which keep channels.

Reads syntax trees; ``_interpreter`` follows the values.
"""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from tokenize import TokenError
from types import CodeType, FunctionType
from typing import Any

__all__ = [
    "JOINS",
    "KEEPS",
    "KEEPS_FEATURES",
    "flattens",
    "is_function_namespace",
    "is_one",
    "literal",
    "moves_channels_last",
    "reduces_positions",
    "source_of",
]

# Functions and methods that keep the channels and their order. In-place ones end in an underscore.
KEEPS = frozenset((
    "relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "prelu", "rrelu", "mish",
    "sigmoid", "logsigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign",
    "tanhshrink", "hardshrink", "softshrink", "threshold", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_alpha_dropout", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "interpolate", "upsample", "batch_norm", "instance_norm", "group_norm", "local_response_norm",
    "contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "to", "type_as", "add", "sub",
    "mul", "div", "clamp", "clip", "abs", "exp", "sqrt", "square", "rsqrt",
))  # fmt: skip

# Functions and methods that keep plain features on the last axis, in their order.
KEEPS_FEATURES = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "chunk", "split", "tensor_split", "unbind", "squeeze",
    "softmax", "log_softmax", "normalize", "layer_norm", "rms_norm", "masked_fill",
))  # fmt: skip
JOINS = frozenset(("cat", "concat", "concatenate", "stack", "hstack"))


def source_of(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function that the caller wrote; None where there is no source."""
    if not callable(function):
        return None
    try:
        plain = inspect.unwrap(function)
    except ValueError:  # it wraps itself
        return None
    if not isinstance(plain, FunctionType) or str(plain.__module__).startswith("torch."):
        return None
    return _parsed(plain.__code__)


@lru_cache(maxsize=512)
def _parsed(code: CodeType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError, TokenError, RecursionError):
        return None  # there is no source, or the file has changed
    found = next((one for one in tree.body if isinstance(one, ast.FunctionDef)), None)
    return found if found is not None and found.name == code.co_name else None


def flattens(name: str, arguments: Sequence[ast.expr], words: Sequence[ast.keyword], *, of_map: bool) -> bool:
    """Whether a call keeps the batch and flattens the rest. Of a known map, any two axes are these."""
    if name == "flatten":
        keywords = {word.arg: word.value for word in words}
        places = [value for value in arguments if value not in keywords.values()]
        start = keywords.get("start_dim", places[0] if places else None)
        end = keywords.get("end_dim", places[1] if len(places) > 1 else None)
        return start is not None and literal(start) == 1 and (end is None or literal(end) == -1)
    if name not in ("view", "reshape"):
        return False
    sizes = list(arguments)
    if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple | ast.List):
        sizes = list(sizes[0].elts)
    if any(isinstance(size, ast.Starred) for size in sizes):
        return False
    return len(sizes) == 2 and (of_map or [literal(size) for size in sizes].count(-1) == 1)


def moves_channels_last(name: str, arguments: Sequence[ast.expr], kind: str) -> bool:
    """Whether a call moves the channels of a map, or of its columns, to the end, as in Flax."""
    axes = tuple(map(literal, arguments))
    if len(arguments) == 1 and isinstance(arguments[0], ast.Tuple | ast.List):
        axes = tuple(map(literal, arguments[0].elts))
    if kind == "map":
        return name == "permute" and axes in ((0, 2, 3, 1), (0, 2, 1), (0, 2, 3, 4, 1))
    if name in ("transpose", "swapaxes", "swapdims"):
        return axes in ((1, 2), (2, 1), (-1, -2), (-2, -1))
    return name == "permute" and axes in ((0, 2, 1), (2, 0, 1))


def reduces_positions(name: str, arguments: Sequence[ast.expr], words: Sequence[ast.keyword]) -> bool:
    """Whether a call reduces a map to its channels, by a mean or the like over the axes of space."""
    keywords = {word.arg: word.value for word in words}
    axes = keywords.get("dim", keywords.get("axis", arguments[0] if arguments else None))
    if name not in ("mean", "sum", "amax", "amin") or axes is None or "keepdim" in keywords:
        return False
    found = literal(axes)
    return isinstance(found, tuple | list) and sorted(found) in ([2, 3], [-2, -1], [2, 3, 4])


def literal(value: ast.expr) -> Any:
    """The literal that an expression is; None for any other expression."""
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError):
        return None


def is_one(size: ast.expr) -> bool:
    """Whether the size of a pooled map is a single position."""
    return literal(size) in (1, (1,), (1, 1), (1, 1, 1), [1], [1, 1], [1, 1, 1])


def is_function_namespace(value: ast.expr) -> bool:
    """Whether a call on this calls a function: it is ``torch``, ``F`` or ``nn.functional``, and no tensor."""
    while isinstance(value, ast.Attribute):
        if value.attr == "functional":
            return True
        value = value.value
    return isinstance(value, ast.Name) and value.id in ("torch", "F", "functional")
