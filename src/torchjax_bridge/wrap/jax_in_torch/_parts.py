"""A tree of torch modules that holds the variables of a Flax module, and how they are read from it.

Each call reads every variable anew, at its place, because torch may have put something else there: another
tensor, a parametrization, a part of another module. Does not know what a variable means.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import split_path

__all__ = ["Place", "build_parts", "read_variables"]


class Place(NamedTuple):
    """One module of the tree. In the list of all places, parents come first."""

    name: str
    """Its path, joined with dots."""
    parent: int
    """The position of its parent in the list; for the root, its own."""
    key: str
    variables: list[tuple[str, str]]
    """Full name and own name of each variable that lies directly in it."""


class _Part(nn.Module):
    """A module that only holds variables; it computes nothing."""


def build_parts(root: nn.Module, variables: Mapping[str, torch.Tensor]) -> list[Place]:
    """Put each variable where its name says, and return the places, parents first."""
    positions: dict[tuple[str, ...], int] = {(): 0}
    places, nodes = [Place("", 0, "", [])], [root]
    for name, value in variables.items():
        *parts, last = (str(part) for part in split_path(name))
        at = 0
        for depth, key in enumerate(parts, start=1):
            path = tuple(parts[:depth])
            if path not in positions:
                positions[path] = len(places)
                places.append(Place(".".join(path), at, key, []))
                # Not through add_module and its like, which refuse names that nn.Module has ("type", "half", ...).
                node = nodes[at]._modules[key] = _Part()
                nodes.append(node)
            at = positions[path]
        if isinstance(value, nn.Parameter):
            nodes[at]._parameters[last] = value
        else:
            nodes[at]._buffers[last] = value
        places[at].variables.append((name, last))
    return places


def read_variables(root: nn.Module, places: Iterable[Place]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The variables as they are now, and the names of the parts in another mode than the root.

    Raises:
        ArgumentError: A variable is gone.
    """
    training = root.training
    nodes: list[Any] = []
    values: dict[str, torch.Tensor] = {}
    apart: list[str] = []
    for name, parent, key, variables in places:
        node = nodes[parent]._modules.get(key) if key else root
        nodes.append(node)
        if node is None:
            raise ArgumentError(f"the module has no part '{name}' any more, which holds variables of Flax's.")
        if node.training is not training:
            apart.append(name)
        for full, last in variables:
            value = node._parameters.get(last)
            if value is None:
                value = node._buffers.get(last)
            values[full] = _computed(node, full, last) if value is None else value
    return values, apart


def _computed(node: nn.Module, full: str, name: str) -> torch.Tensor:
    """A variable that is neither parameter nor buffer, because a parametrization or a hook computes it."""
    if name in node.__dict__:
        # Hooks of torch.nn.utils.prune and the older weight_norm and spectral_norm set it before a forward pass.
        hooks: Sequence[Any] = list(node._forward_pre_hooks.values())
        for hook in hooks:
            hook(node, ())
    value: Any = getattr(node, name, None)
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(
            f"the module has no variable '{full}' any more, with which Flax computes. Put a parameter or a tensor "
            "there, of the shape it had."
        )
    return value
