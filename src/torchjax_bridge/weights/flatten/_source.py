"""The words in the source of a ``forward``: what flattens, what keeps channels, and where the source is.

Reads syntax trees and follows nothing: that is for ``_interpreter``.
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
    "is_a_module_of_functions",
    "is_one",
    "number",
    "reduces_positions",
    "source_of",
    "turns",
]

# What changes neither the channels nor their order; in place, with an underscore at the end.
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

# What leaves the features of what is no map on the last axis, in their order.
KEEPS_FEATURES = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "chunk", "split", "tensor_split", "unbind", "squeeze",
    "softmax", "log_softmax", "normalize", "layer_norm", "rms_norm", "masked_fill",
))  # fmt: skip
JOINS = frozenset(("cat", "concat", "concatenate", "stack", "hstack"))


def source_of(function: Any) -> ast.FunctionDef | None:
    """The definition of a function of the caller's; None where there is no source."""
    if not callable(function):
        return None
    try:
        plain = inspect.unwrap(function)
    except ValueError:  # one that wraps itself
        return None
    if not isinstance(plain, FunctionType) or str(plain.__module__).startswith("torch."):
        return None
    return _parsed(plain.__code__)


@lru_cache(maxsize=512)
def _parsed(code: CodeType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError, TokenError, RecursionError):
        return None  # there is none, or the file was changed since
    found = next((one for one in tree.body if isinstance(one, ast.FunctionDef)), None)
    return found if found is not None and found.name == code.co_name else None


def flattens(name: str, arguments: Sequence[ast.expr], words: Sequence[ast.keyword], *, of_map: bool) -> bool:
    """Whether a call leaves two axes, the batch and all the rest, as any two are of what is known for a map."""
    if name == "flatten":
        said = {word.arg: word.value for word in words}
        places = [value for value in arguments if value not in said.values()]
        start = said.get("start_dim", places[0] if places else None)
        end = said.get("end_dim", places[1] if len(places) > 1 else None)
        return start is not None and number(start) == 1 and (end is None or number(end) == -1)
    if name not in ("view", "reshape"):
        return False
    sizes = list(arguments)
    if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple | ast.List):
        sizes = list(sizes[0].elts)
    if any(isinstance(size, ast.Starred) for size in sizes):
        return False
    return len(sizes) == 2 and (of_map or [number(size) for size in sizes].count(-1) == 1)


def turns(name: str, arguments: Sequence[ast.expr], kind: str) -> bool:
    """Whether a call moves the channels of a map to the end, where Flax has them; of its columns likewise."""
    axes = tuple(map(number, arguments))
    if len(arguments) == 1 and isinstance(arguments[0], ast.Tuple | ast.List):
        axes = tuple(map(number, arguments[0].elts))
    if kind == "map":
        return name == "permute" and axes in ((0, 2, 3, 1), (0, 2, 1), (0, 2, 3, 4, 1))
    if name in ("transpose", "swapaxes", "swapdims"):
        return axes in ((1, 2), (2, 1), (-1, -2), (-2, -1))
    return name == "permute" and axes in ((0, 2, 1), (2, 0, 1))


def reduces_positions(name: str, arguments: Sequence[ast.expr], words: Sequence[ast.keyword]) -> bool:
    """Whether a call takes the mean, or the like, over both axes of space of a map, which leaves its channels."""
    said = {word.arg: word.value for word in words}
    axes = said.get("dim", said.get("axis", arguments[0] if arguments else None))
    if name not in ("mean", "sum", "amax", "amin") or axes is None or "keepdim" in said:
        return False
    found = number(axes)
    return isinstance(found, tuple | list) and sorted(found) in ([2, 3], [-2, -1], [2, 3, 4])


def number(value: ast.expr) -> Any:
    """The number that is written there; None where it is something else."""
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError):
        return None


def is_one(size: ast.expr) -> bool:
    """Whether the size of a pooled map is a single position."""
    return number(size) in (1, (1,), (1, 1), (1, 1, 1), [1], [1, 1], [1, 1, 1])


def is_a_module_of_functions(value: ast.expr) -> bool:
    """``torch``, ``F`` or ``nn.functional``, of which a function is called; not a tensor with its method."""
    while isinstance(value, ast.Attribute):
        if value.attr == "functional":
            return True
        value = value.value
    return isinstance(value, ast.Name) and value.id in ("torch", "F", "functional")
