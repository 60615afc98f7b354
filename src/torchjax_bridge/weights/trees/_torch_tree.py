"""The torch side as a value: a tree of layers with their classes, tensors, ties and original keys.

Only holds what ``_read_torch`` has read.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from torchjax_bridge.exchange import Path

from .._report import Fault
from ..rules import Fused, Rename
from ._node import Node

__all__ = ["TorchLeaf", "TorchNode", "TorchTree"]


class TorchLeaf(NamedTuple):
    """One tensor of the torch side."""

    key: str
    """The key in the caller's own ``state_dict``."""
    tensor: torch.Tensor
    meta: torch.Tensor
    """The same shape and dtype without memory, to run a layout on."""
    owners: "tuple[tuple[TorchNode, str], ...]" = ()
    """Of a tensor renamed apart from its layer: the modules around it, outermost first, and its name in each."""


@dataclass(eq=False)
class TorchNode(Node):
    """One module of the torch side.

    Attributes:
        path: Its path for the matching: without wrappers, and renamed if the caller says so.
        origin: Its path in the model, without wrappers.
        kind: Its class; None in a bare ``state_dict``, unless the caller declared it.
        module: The live module, or None.
        leaves: Its own tensors by name.
        children: Its submodules by name; the names in a ``Sequential`` or ``ModuleList`` are integers.
        moved: Its tensors that were renamed apart from it, by their old dotted names; leaves of other nodes.
        features: The ``(C, H, W)`` of the flattened map that it reads, if the caller declared one.
        output: The ``(C, H, W)`` as which its output is viewed, if the caller declared one.
        declared: Whether the caller declared its class, so that it computes what that class computes.
        told: Which of ``features`` and ``output`` the caller declared, even as None.
        fused: The `Fused` rules for layers in it.
        called: Its place in the order of first calls, if a run of the model shows it.
    """

    path: Path
    origin: Path = ()
    kind: type | None = None
    module: nn.Module | None = None
    leaves: dict[str, TorchLeaf] = field(default_factory=dict)
    children: dict[str | int, "TorchNode"] = field(default_factory=dict)
    moved: dict[str, TorchLeaf] = field(default_factory=dict)
    features: tuple[int, ...] | None = None
    output: tuple[int, ...] | None = None
    declared: bool = False
    told: frozenset[str] = frozenset()
    fused: tuple[Fused, ...] = ()
    called: int | None = None

    def flat(self, prefix: str = "") -> dict[str, TorchLeaf]:
        """Every tensor at or below this node, by its dotted name relative to it."""
        found = {prefix + name: leaf for name, leaf in self.leaves.items()}
        for name, child in self.children.items():
            found |= child.flat(f"{prefix}{name}.")
        return found

    def names(self) -> frozenset[str]:
        """The dotted names of all tensors at or below this node, including those in ``moved``."""
        return frozenset(self.flat()).union(self.moved)

    @property
    def where(self) -> str:
        """The dotted path, and the class where it is known."""
        return self._where(self.origin, self.kind.__name__ if self.kind else None)


@dataclass(eq=False)
class TorchTree:
    """The whole torch side.

    Attributes:
        root: The tree of modules.
        state: The caller's ``state_dict``, in its own order, with its own keys.
        ties: Maps a key to an earlier key with the same memory.
        others: Keys without a tensor (a module's extra state); they never cross.
        notes: The wrappers that were looked through.
        faults: Renames that send two tensors to one place, or match nothing.
        module: The live module, or None.
        targets: The new paths that renames name, and the first rename that names each.
    """

    root: TorchNode
    state: dict[str, Any]
    ties: dict[str, str]
    others: tuple[str, ...]
    notes: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    module: nn.Module | None = None
    targets: dict[Path, Rename] = field(default_factory=dict)

    def is_buffer(self, key: str) -> bool | None:
        """Whether a key is a buffer's, not a parameter's; None without a live module."""
        return None if self.module is None else key in self._buffers

    @cached_property
    def _buffers(self) -> frozenset[str]:
        named = self.module.named_buffers(remove_duplicate=False) if self.module is not None else ()
        return frozenset(name for name, _ in named)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        tensors = (value for value in self.state.values() if isinstance(value, torch.Tensor))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))
