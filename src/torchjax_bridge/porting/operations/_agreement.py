"""Whether the code of a call gives the shape and the dtype that torch gave: JAX says both without computing.

A dtype that differs is mended by a cast: JAX promotes a bfloat16 and a float32 without axes to float32, torch to
bfloat16. A shape that differs is refused.
"""

import math
import re
from functools import lru_cache
from typing import Any

import torch

from torchjax_bridge.recording import Node, Value, tensors_of

from .._constants import dtype_text
from .._helpers import HELPERS
from .._lowering import Lowering
from .._placed import Placed, RefusedError, Several
from .._reserved import argument_name

__all__ = ["agreed"]

_VARIABLE = re.compile(r"_v\d+_")
_SETTING = re.compile(r"self\.(\w+)(?:\[(\d+)\])?(?![\w(.\[])")

Shapes = tuple[tuple[tuple[int, ...], str], ...]


def agreed(
    at: Lowering, node: Node, made: Placed | Several | list[Placed]
) -> Placed | Several | list[Placed]:
    """The code of a call, with casts where JAX promotes in another way.

    Raises:
        RefusedError: The code gives another shape than torch, or JAX refuses it.
    """
    values = list(tensors_of(node.result))
    if isinstance(made, Several):
        found = _outcome(at, node, made.text)
        if found is not None:
            if len(found) == 1 and len(found[0][0]) > len(made.orders[0]):  # one array that is taken apart
                shape, dtype, weak = found[0]
                found = ((shape[1:], dtype, weak),) * shape[0]
            for value, order, (shape, dtype, _) in zip(values, made.orders, found, strict=True):
                _check_shape(node, value, order, shape)
                if dtype != _dtype(value.dtype):
                    raise RefusedError(f"{node.function} gives {value.dtype}, and its translation {dtype}")
        return made
    single = isinstance(made, Placed)
    checked = [
        _agreed(at, node, value, placed)
        for value, placed in zip(values, [made] if isinstance(made, Placed) else made, strict=False)
    ]
    return checked[0] if single else checked


def _agreed(at: Lowering, node: Node, value: Value, placed: Placed) -> Placed:
    known = at.known.get(placed.text)
    if known is not None and known[0].dtype == value.dtype:
        found = [(tuple(known[0].shape[axis] for axis in known[1].order), _dtype(value.dtype), False)]
    else:
        outcome = _outcome(at, node, placed.text)
        if outcome is None:
            return placed
        found = list(outcome)
    shape, dtype, weak = found[0]
    _check_shape(node, value, placed.order, shape)
    if value.dtype is None or (dtype == _dtype(value.dtype) and not weak):
        return placed
    return placed.with_text(f"{placed.text}.astype({dtype_text(value.dtype)})")


def _check_shape(node: Node, value: Value, order: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if sorted(order) != list(range(len(value.shape))) or shape != tuple(value.shape[axis] for axis in order):
        raise RefusedError(
            f"{node.function} gives {value.shape} here, and its translation {shape} in the order {order}; please "
            "report this, and write the line with other functions"
        )


def _dtype(dtype: torch.dtype | None) -> str:
    text = "None" if dtype is None else dtype_text(dtype)
    return text.removeprefix("jnp.")


def _outcome(at: Lowering, node: Node, text: str) -> tuple[tuple[tuple[int, ...], str, bool], ...] | None:
    """Shape, dtype and weak type of what code gives; None if it depends on more than arrays and settings."""
    shapes: list[tuple[tuple[int, ...], str]] = []
    names: dict[str, str] = {}
    unknown = False

    def stand_in(known: str) -> str:
        nonlocal unknown
        if known not in names:
            value, placed = at.known.get(known, (None, None))
            if value is None or placed is None or value.dtype is None:
                unknown = True
                return known
            names[known] = f"a{len(names)}_"
            shapes.append((tuple(value.shape[axis] for axis in placed.order), _dtype(value.dtype)))
        return names[known]

    for value in tensors_of((node.args, node.kwargs)):
        own = at.at(value).text
        if not _VARIABLE.fullmatch(own) and own in text:
            text = text.replace(own, stand_in(own))
    text = _VARIABLE.sub(lambda match: stand_in(match.group()), text)
    text = _SETTING.sub(lambda match: _setting(at, match), text)
    if unknown or "self." in text or "super()" in text or _reads_argument(at, text):
        return None
    try:
        return _evaluated(text, tuple(shapes))
    except (TypeError, ValueError, IndexError, OverflowError, NotImplementedError) as err:
        reason = str(err).strip().partition("\n")[0]
        raise RefusedError(
            f"{node.function}: JAX refuses its translation for these arguments ({reason}); cast or reshape them "
            "first"
        ) from err


def _reads_argument(at: Lowering, text: str) -> bool:
    """Whether code reads an argument that is a number or a list, which may be called as a builtin of Python is."""
    names = "|".join(argument_name(name) for name, _ in at.frame.inputs if name.isidentifier())
    return bool(names) and re.search(rf"(?<![\w.'\"])({names})(?![\w'\"]|\s*=[^=])", text) is not None


def _setting(at: Lowering, match: re.Match[str]) -> str:
    name, index = match.groups()
    if name not in at.body.attributes:
        return match.group()
    value = at.body.attributes[name]
    return at.number(value if index is None else value[int(index)])


@lru_cache(maxsize=4096)
def _evaluated(text: str, shapes: Shapes) -> tuple[tuple[tuple[int, ...], str, bool], ...]:
    import jax

    code = compile(text, "<translation>", "eval")
    space = _namespace()

    def run(*arrays: Any) -> Any:
        return eval(code, {**space, **{f"a{place}_": array for place, array in enumerate(arrays)}})

    with jax.enable_x64(False):
        given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        leaves = jax.tree.leaves(jax.eval_shape(run, *given))
    return tuple((tuple(leaf.shape), str(leaf.dtype), bool(leaf.weak_type)) for leaf in leaves)


@lru_cache(maxsize=1)
def _namespace() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    space: dict[str, Any] = {"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "math": math, "Any": Any}
    for source in HELPERS.values():
        exec(source, space)
    return space
