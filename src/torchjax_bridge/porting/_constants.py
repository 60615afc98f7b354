"""Tensors that code makes and no ``state_dict`` holds, as code that makes them again.

Knows constants, ranges, triangles, bands, what repeats itself along an axis, and tables of positions, sinusoids
among them. Refuses larger tensors of other values.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ._placed import RefusedError
from ._tables import table_text

__all__ = ["constant_name", "constant_text", "dtype_text", "number_text", "numbers_of", "saving_code"]

_WRITTEN_OUT = 64  # elements; a longer list is no source that a person would own
_TABLE = 16  # elements; of fewer, the values say more than the name of a table
_OF_TABLES = torch.int32, torch.int64, torch.float32
_NAMES = {torch.bool: "bool", torch.int64: "jnp.int32", torch.float64: "jnp.float32"}


def dtype_text(dtype: torch.dtype) -> str:
    """The expression of a dtype; 64 bits become 32, as in JAX by default."""
    return _NAMES.get(dtype, str(dtype).replace("torch.", "jnp."))


def constant_name(tensor: torch.Tensor, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """What the author calls a tensor that is no parameter and no buffer, and the code that makes it a buffer.

    The name is as ``"self.stats['std'] of 'norm'"``. There is no code for a part of an attribute.
    """
    for path, module in modules.items():
        for name, value in vars(module).items():
            found = None if name.startswith("_") else _place(value, tensor)
            if found is not None:
                holder = f"'{path}'" if path else "the model itself"
                code = "" if found else saving_code(path, name, f"vars(part).pop({name!r})")
                return f"self.{name}{found} of {holder}", code
    return "a constant of the module", ""


def saving_code(path: str, name: str, value: str) -> str:
    """The code that makes a tensor of the module ``part`` a buffer that ``state_dict`` holds."""
    part = f"module.get_submodule({path!r})" if path else "module"
    return f"part = {part}; part.register_buffer({name!r}, {value})"


def _place(tree: Any, tensor: torch.Tensor) -> str | None:
    if tree is tensor:
        return ""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, tuple | list):
        items = enumerate(tree)
    for key, item in items:
        found = _place(item, tensor)
        if found is not None:
            return f"[{key!r}]{found}"
    return None


def constant_text(tensor: torch.Tensor, name: str, saving: str = "", written_out: int = _WRITTEN_OUT) -> str:
    """An expression that makes the tensor, in torch's order of axes.

    Args:
        tensor: What is to be made.
        name: What it is called.
        saving: The code that makes it a buffer that is saved, if there is any.
        written_out: How many elements without any rule may be written one by one.

    Raises:
        RefusedError: No expression of a reasonable length makes it.
    """
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        raise RefusedError(f"{name} is on the meta device, and no state_dict holds its values")
    shape, dtype, values = tuple(tensor.shape), dtype_text(tensor.dtype), tensor.reshape(-1)
    if tensor.is_complex():
        raise RefusedError(f"{name} is complex; keep its real and imaginary part as two buffers")
    if tensor.numel() > 1 and bool((values == values[0]).all()):
        return f"jnp.full({shape}, {number_text(numbers_of(values[0]))}, dtype={dtype})"
    least = _TABLE if tensor.is_floating_point() else 2
    counts = tensor.dtype != torch.bool and tensor.numel() >= least
    if counts and bool((values == torch.arange(len(values))).all()):
        made = f"jnp.arange({len(values)}, dtype={dtype})"
        return made if len(shape) == 1 else f"{made}.reshape({shape})"
    if len(shape) >= 2 and shape[-1] == shape[-2] and len(values) == shape[-1] ** 2:
        for function in (torch.tril, torch.triu):
            if torch.equal(tensor, function(torch.ones(shape, dtype=tensor.dtype))):
                return f"jnp.{function.__name__}(jnp.ones({shape}, dtype={dtype}))"
        width = int(tensor.reshape(shape[-2:])[:, 0].bool().sum())  # of a band below the diagonal
        if torch.equal(tensor, torch.ones(shape, dtype=tensor.dtype).tril().triu(1 - width)):
            return f"jnp.triu(jnp.tril(jnp.ones({shape}, dtype={dtype})), {1 - width})"
    side = math.isqrt(tensor.numel())
    if (
        side > 1
        and side**2 == tensor.numel()
        and torch.equal(values, torch.eye(side, dtype=tensor.dtype).view(-1))
    ):
        made = f"jnp.eye({side}, dtype={dtype})"
        return made if shape == (side, side) else f"{made}.reshape({shape})"
    if tensor.numel() >= _TABLE and (table := table_text(tensor)) is not None:
        return table if tensor.dtype in _OF_TABLES else f"{table}.astype({dtype})"
    if tensor.numel() >= _TABLE and (once := _without_repetition(tensor)).numel() < tensor.numel():
        with contextlib.suppress(RefusedError):
            return f"jnp.broadcast_to({constant_text(once, name, saving, written_out)}, {shape})"
    if tensor.numel() <= written_out and tensor.dim() > 2 and max(shape) == tensor.numel() > 0:
        return f"jnp.asarray({number_text(numbers_of(values))}, dtype={dtype}).reshape({shape})"
    if tensor.numel() <= written_out:
        return f"jnp.asarray({number_text(numbers_of(tensor))}, dtype={dtype})"
    raise RefusedError(
        f"{name} {shape} is held by no state_dict, and its values are no constant, no range and no triangle; "
        + (f"before the port, make it a buffer that is saved: {saving}" if saving else "make it a buffer")
    )


def numbers_of(tensor: torch.Tensor) -> Any:
    """The numbers of a tensor, of float32 with no more digits than tell them apart."""
    numbers = tensor.tolist()
    if tensor.dtype != torch.float32:
        return numbers
    short = _each(numbers, lambda number: float(str(np.float32(number))))
    same = torch.equal(torch.tensor(short, dtype=torch.float32), tensor.cpu())
    return short if same else numbers


def _each(tree: Any, function: Callable[[float], float]) -> Any:
    return [_each(item, function) for item in tree] if isinstance(tree, list) else function(tree)


def _without_repetition(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one element along each axis along which it repeats itself, as a blur of all channels does."""
    for axis in range(tensor.dim()):
        first = tensor.narrow(axis, 0, 1)
        if bool((tensor == first).all()):
            tensor = first
    return tensor


def number_text(tree: Any) -> str:
    """Numbers, or lists of them, of which Python writes no infinity."""
    if isinstance(tree, list):
        return f"[{', '.join(map(number_text, tree))}]"
    if isinstance(tree, float) and not math.isfinite(tree):
        return "jnp.nan" if math.isnan(tree) else "-jnp.inf" if tree < 0 else "jnp.inf"
    return repr(tree)
