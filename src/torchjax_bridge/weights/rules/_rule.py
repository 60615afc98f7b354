"""What a rule is: for one kind of torch layer, which tensor is which Flax leaf, in which layout.

`pairing` applies rules. A rule is written once; both directions, the shapes and the documentation come from it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path, split_path

from ..layouts import Identity, Layout
from ._twin import Twin

__all__ = ["Entry", "Layer", "Rule"]


@dataclass(frozen=True)
class Entry:
    """One line of a rule: a group of torch tensors is a group of Flax leaves.

    Args:
        torch: The name of the tensor relative to the layer (``"weight"``, ``"out_proj.weight"``), or several.
        flax: The path of the leaf relative to the layer (``"kernel"``, ``"query.kernel"``), or several; a
            path with a dot inside a name is given as a tuple.
        layout: How they lie in each other.
        collection: Where linen keeps the leaf (``"params"``, ``"batch_stats"``); empty if the leaves are in
            several collections.
        optional: Both sides may lack it (a bias). One side alone is a fault all the same.
        note: What a reader of the plan must know, for example what is lost.
        assumed: An assumption of the rule, as words that follow the layer's name (``"taken for a
            convolution"``); the conversion warns of it.
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str | Path, ...]
    layout: Layout = field(default_factory=Identity)
    collection: str = "params"
    optional: bool = False
    note: str = ""
    assumed: str = ""

    def __post_init__(self) -> None:
        if type(self.torch) is type(self.flax) is str and isinstance(self.layout, Layout):
            return  # fast path: nearly every entry is like this, and some are made for every layer
        for side, given, kinds in (("torch", self.torch, str), ("flax", self.flax, str | tuple)):
            if not isinstance(given, str) and not (
                isinstance(given, tuple | list) and all(isinstance(name, kinds) for name in given)
            ):
                raise PlanError(f"Entry takes a dotted name or a tuple of them for {side}, not {given!r}.")
        if not isinstance(self.layout, Layout):
            raise PlanError(f"Entry takes a Layout such as Permute((1, 0)), not {self.layout!r}.")

    @cached_property
    def torch_names(self) -> tuple[str, ...]:
        """The names as a tuple."""
        return (self.torch,) if isinstance(self.torch, str) else self.torch

    @cached_property
    def flax_paths(self) -> tuple[Path, ...]:
        """The paths as a tuple of tuples."""
        if isinstance(self.flax, str):
            return (split_path(self.flax),)
        return tuple(split_path(path) if isinstance(path, str) else path for path in self.flax)

    def __str__(self) -> str:
        ours = " + ".join(self.torch_names) or "(nothing)"
        theirs = " + ".join(join_path(path) for path in self.flax_paths) or "(nothing)"
        return f"{ours} -> {theirs}: {self.layout}"


@dataclass(frozen=True)
class Layer:
    """What a rule can see: one torch layer and one Flax scope.

    Attributes:
        torch: Shapes of the layer's tensors, as meta tensors, by name relative to the layer.
        flax: Shapes of the scope's leaves by path relative to the scope.
        module: The live torch module, or None when only a ``state_dict`` is there.
        flax_kind: The name of the Flax class, where it is known.
        flax_module: The live nnx module, or None.
        features: The ``(C, H, W)`` map that is flattened to feed this layer, if the caller said so.
        kind: The torch class, if a module or the caller says it.
        output: The ``(C, H, W)`` map that is made of its output, if the caller said so.
        told: Which of ``features`` and ``output`` the caller gave, even as None.
    """

    torch: Mapping[str, torch.Tensor]
    flax: Mapping[Path, tuple[int, ...]]
    module: nn.Module | None = None
    flax_kind: str | None = None
    flax_module: Any = None
    features: tuple[int, ...] | None = None
    kind: type | None = None
    output: tuple[int, ...] | None = None
    told: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rule:
    """How the weights of one kind of torch layer lie in its Flax counterpart.

    Args:
        torch_types: The torch class, or classes; a subclass follows the rule of its nearest ancestor (with a
            warning if it has a ``forward`` of its own).
        entries: The entries, or a function from a `Layer` to them.
        flax_types: Names of the Flax classes that are its counterpart; empty for any.
        keeps: Tensors of the torch layer without a counterpart in Flax; they stay in torch.
        required: The names by which a layer of a bare ``state_dict`` is recognised; by default those of the entries
            that are not optional.
        applies: A further condition on the names of the layer's tensors, where the class is not enough (a
            parametrization).
        settings: The settings that the Flax layer needs for parity, for the documentation.
        label: A name for messages, by default that of the classes.
        twin: The Flax layer of a live torch layer; raises ``ValueError`` with the reason where there is none.

    Raises:
        PlanError: The arguments are not classes and entries.

    >>> from torch import nn
    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gain = nn.Parameter(torch.ones(3))
    >>> print(Rule(Scale, [Entry("gain", "scale")]))
    Scale: gain -> scale: as it is
    """

    torch_types: type | tuple[type, ...]
    entries: Sequence[Entry] | Callable[[Layer], Iterable[Entry]]
    flax_types: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    required: frozenset[str] | None = None
    applies: Callable[[frozenset[str]], bool] | None = None
    settings: str = ""
    label: str = ""
    twin: Callable[[Any], Twin] | None = None

    def __post_init__(self) -> None:
        for kind in self.types:
            if not isinstance(kind, type) or kind.__module__.startswith("flax."):
                raise PlanError(
                    f"Rule takes a torch class such as nn.Linear, or a tuple of them, not {kind!r}."
                )
        if not callable(self.entries) and not (
            isinstance(self.entries, Sequence) and all(isinstance(one, Entry) for one in self.entries)
        ):
            raise PlanError(
                f"Rule({self.name}, ...) takes a list of Entry objects, or a function from a Layer to them, not "
                f"{self.entries!r}."
            )
        for name in ("flax_types", "keeps"):
            if isinstance(getattr(self, name), str):
                raise PlanError(
                    f"Rule({self.name}, ...) takes {name} as a tuple of names, not as one string."
                )

    @cached_property
    def name(self) -> str:
        """The class it is for."""
        return self.label or " / ".join(kind.__name__ for kind in self.types)

    @property
    def types(self) -> tuple[type, ...]:
        """The torch classes as a tuple."""
        return self.torch_types if isinstance(self.torch_types, tuple) else (self.torch_types,)

    def entries_for(self, layer: Layer) -> tuple[Entry, ...]:
        """The entries for one layer."""
        if not callable(self.entries):
            return tuple(self.entries)
        found = self.entries(layer)
        if not isinstance(found, Iterable):
            raise PlanError(f"the function of Rule({self.name}, ...) gave {found!r}, and no Entry objects.")
        return tuple(found)

    def may_be(self, names: frozenset[str]) -> bool:
        """Whether a layer of unknown class with these tensors could follow this rule."""
        if self.applies is not None and not self.applies(names):
            return False
        if self.required is not None:
            return self.required <= names
        if callable(self.entries):
            return False
        return all(
            name in names for entry in self.entries if not entry.optional for name in entry.torch_names
        )

    def __str__(self) -> str:
        lines = "; ".join(map(str, self.entries)) if not callable(self.entries) else "by the layer's shapes"
        return f"{self.name}: {lines}"
