"""The outputs of a torch module beside those of its port."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchjax_bridge.recording import Value, fields_of, tensors_of

__all__ = ["output_arrays", "output_pairs", "uncompiled_outputs"]


def output_pairs(recorded: Any, torch_tree: Any, flax_tree: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors of two outputs, in order; sizes among them are left out.

    Args:
        recorded: The output of the recording.
        torch_tree: What torch gave.
        flax_tree: What the port gave.
    """
    if isinstance(recorded, Value):
        if recorded.dtype is not None:
            yield torch_tree, flax_tree
    elif isinstance(recorded, Mapping):
        for key, item in recorded.items():
            yield from output_pairs(item, fields_of(torch_tree)[key], fields_of(flax_tree)[key])
    elif isinstance(recorded, tuple | list):
        for one, two, three in zip(recorded, torch_tree, flax_tree, strict=True):
            yield from output_pairs(one, two, three)


def output_arrays(recorded: Any, tree: Any) -> list[Any]:
    """The tensors or arrays of an output, in the order of the recorded one."""
    return [one for one, _ in output_pairs(recorded, tree, tree)]


def uncompiled_outputs(recorded: Any) -> list[str]:
    """What a user must know of an output that holds what ``jax.jit`` cannot return: strings, dtypes."""
    kinds = dict.fromkeys(
        "a string" if isinstance(item, str) else "a dtype"
        for item in tensors_of(recorded, (str, torch.dtype))
    )
    if not kinds:
        return []
    return [f"calls outside of jax.jit, which returns arrays alone: the output holds {' and '.join(kinds)}"]
