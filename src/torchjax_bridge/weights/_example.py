"""Example inputs of a torch model: ``inputs=`` and ``kwargs=``, in the manner of ``torch.export``."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from torch import nn

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.recording import tensors_of

__all__ = ["Example", "read_example", "require_tensors"]


class Example(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def read_example(torch_side: Any, inputs: Any, kwargs: Mapping[str, Any] | None) -> Example | None:
    """The call that a caller describes; None if there are no inputs.

    Args:
        torch_side: The model that would run.
        inputs: One tensor, or a tuple of positional arguments; None for none.
        kwargs: Keyword arguments; None for none.

    Raises:
        ArgumentError: The torch side is a ``state_dict``; or ``inputs`` is a dict or a list, which may be one
            argument or several; or they hold arrays that are no tensors; or the model takes other arguments.
    """
    if inputs is None and kwargs is None:
        return None
    if not isinstance(torch_side, nn.Module):
        raise ArgumentError(
            "inputs= runs the torch model, and a state_dict cannot run: pass the nn.Module that it belongs to."
        )
    if isinstance(inputs, Mapping):
        raise ArgumentError(
            "inputs= is a mapping: pass kwargs={...} if these are keyword arguments, or inputs=({...},) if the "
            "model takes it as one argument."
        )
    if isinstance(inputs, list):
        raise ArgumentError(
            "inputs= is a list: pass the positional arguments as a tuple, or inputs=([...],)."
        )
    args = inputs if isinstance(inputs, tuple) else () if inputs is None else (inputs,)
    example = Example(args, dict(kwargs or {}))
    require_tensors(example.args)
    signature = inspect.signature(torch_side.forward)
    try:
        signature.bind(*example.args, **example.kwargs)
    except TypeError as err:
        raise ArgumentError(
            f"the torch model takes {signature} and cannot be called with these inputs: {err}. Pass positional "
            "arguments as a tuple, inputs=(...), and keyword arguments as kwargs={...}."
        ) from err
    return example


def require_tensors(inputs: Any) -> None:
    """Make sure that inputs of a torch model, which stand for its tensors, hold no arrays of NumPy or JAX.

    Raises:
        ArgumentError: They do.
    """
    for leaf in tensors_of(inputs, (np.ndarray, jax.Array)):
        raise ArgumentError(
            f"the inputs hold {what_kind(leaf)}, and the torch model takes tensors: pass torch.from_numpy(array), "
            "images with channels first."
        )
