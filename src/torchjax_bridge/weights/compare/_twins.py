"""A torch model and its Flax twin: read, paired by the plan, and ready to run.

Hides from the comparison what differs between nnx and linen. Runs a model only when asked.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from torch import nn

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import PlanError, SettingsError
from torchjax_bridge.exchange import Path

from .._audit import compare_settings
from .._audit_report import Audit
from .._example import Example
from .._plan import Plan, UserRule, make_plan, read_sides
from ..flatten import output_order
from ..pairing import Move
from ..settings import FlaxLayer
from ..trees import FlaxTree, LinenModel, TorchTree, as_linen, live_nnx, read_flax
from ._record import Record
from ._record_flax import record_linen, record_nnx
from ._rerun import Rerun, rerun_linen, rerun_nnx
from ._steps import FeatureOrders
from ._values import values_in

__all__ = ["Twins", "read_twins"]


@dataclass(frozen=True)
class Twins:
    """Both models and the plan between them.

    Attributes:
        torch_tree: The torch side, as read.
        flax_tree: The Flax side, as read.
        plan: Which layers and tensors belong together.
        model: The nnx model; or the linen module.
        variables: The variables of a linen module, else None.
    """

    torch_tree: TorchTree
    flax_tree: FlaxTree
    plan: Plan
    model: Any
    variables: Mapping[str, Any] | None

    @cached_property
    def modules(self) -> dict[Path, nn.Module]:
        """The torch modules by path, wrappers looked through."""
        return {node.origin: node.module for node in self.torch_tree.root.walk() if node.module is not None}

    @cached_property
    def orders(self) -> FeatureOrders:
        """The orders of flattened features that the caller gave with `Flatten`."""
        nodes = list(self.torch_tree.root.walk())
        takes = {node.origin: node.features for node in nodes if node.features is not None}
        gives = {node.origin: shape for node in nodes if (shape := output_order(node)) is not None}
        return FeatureOrders(takes, gives)

    @property
    def root(self) -> nn.Module:
        """The torch model, without its wrappers."""
        return self.modules[()]

    @cached_property
    def names(self) -> dict[Path, Path]:
        """For each path of an nnx module: the first of its paths, under which it is recorded."""
        first: dict[int, Path] = {}
        parts = [node for node in self.flax_tree.root.walk() if node.module is not None]
        return {node.path: first.setdefault(id(node.module), node.path) for node in parts}

    @property
    def arrays(self) -> Any:
        """The arrays of the Flax model."""
        return [leaf.value for leaf in self.flax_tree.root.flat().values()]

    @property
    def flavour(self) -> str:
        """``"nnx"`` or ``"linen"``."""
        return self.flax_tree.flavour

    # --- running -------------------------------------------------------------------------------------

    @property
    def flax_call(self) -> Callable[..., Any]:
        """The method that runs when the Flax model is called."""
        return self.model.__call__

    @cached_property
    def layer_pairs(self) -> list[tuple[Path, Path]]:
        """The pairs of the plan, without containers whose layers are not those of their counterpart."""
        filled = {self._layer(key) for move in self.plan.moves for key in move.torch_keys}
        layers = [(ours, theirs) for ours, theirs in self.plan.layers if ours in filled]

        def belong(ours: Path, theirs: Path) -> bool:
            reached = {flax for path, flax in layers if path[: len(ours)] == ours}
            return reached == {flax for _, flax in layers if flax[: len(theirs)] == theirs}

        return [pair for pair in self.plan.layers if pair == ((), ()) or belong(*pair)]

    def run_flax(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Record:
        """Run the Flax model and record every layer that has a twin."""
        watched = frozenset(self.names.get(path, path) for _, path in self.plan.layers)
        if self.variables is None:
            return record_nnx(self.model, watched, args, kwargs)
        record = record_linen(self.model, self.variables, watched, args, kwargs, training=self.root.training)
        if record.error is None and self._silent(record):
            # A part under linen's jit that was compiled before runs without calling its modules again.
            with jax.disable_jit():
                again = record_linen(
                    self.model, self.variables, watched, args, kwargs, training=self.root.training
                )
            if len(self._silent(again)) < len(self._silent(record)):
                return again
        return record

    def _silent(self, record: Record) -> set[Path]:
        """The Flax layers with weights that were never called."""
        called = {call.path for call in record.calls}
        return {flax for ours, flax in self.plan.layers if ours in self.moves and flax not in called}

    def rerun(self, weights: Mapping[Path, np.ndarray] | None = None) -> Rerun:
        """Make a `Rerun` of the Flax layers, with these weights in place of their own."""
        tree = self.flax_tree
        made = {path: jnp.asarray(array) for path, array in (weights or {}).items()}
        if self.variables is not None:
            return rerun_linen(tree.fill(made) if made else self.variables, training=self.root.training)
        tree = read_flax(tree.fill(made)) if made else tree
        return rerun_nnx({node.path: node.module for node in tree.root.walk() if node.module is not None})

    def rerun_refilled(self) -> Rerun:
        """Make a `Rerun` of the Flax layers, filled with torch's weights."""
        return self.rerun({path: want for path, want, have in self.pairs() if want.shape == have.shape})

    def layers(self, record: Record) -> Mapping[Path, FlaxLayer]:
        """The settings of the Flax layers; linen's come from the run."""
        return record.layers if self.variables is not None else live_nnx(self.flax_tree)

    def settings(self, layers: Mapping[Path, FlaxLayer]) -> Audit:
        """The settings that differ."""
        return compare_settings(self.torch_tree, layers, self.plan)

    # --- weights -------------------------------------------------------------------------------------

    @cached_property
    def moves(self) -> dict[Path, list[Move]]:
        """The moves of the plan, by torch layer."""
        found: dict[Path, list[Move]] = {}
        for move in self.plan.moves:
            path = self._layer(move.torch_keys[0]) if move.torch_keys else ()
            found.setdefault(path, []).append(move)
        return found

    @cached_property
    def _owners(self) -> dict[str, Path]:
        return {
            leaf.key: (leaf.owners[-1][0] if leaf.owners else node).origin
            for node in self.torch_tree.root.walk()
            for leaf in node.leaves.values()
        }

    def _layer(self, key: str) -> Path:
        """The layer of the plan that owns a tensor."""
        path = self._owners[key]
        while path not in self._layers and path:
            path = path[:-1]
        return path

    @cached_property
    def _layers(self) -> set[Path]:
        return {path for path, _ in self.plan.layers}

    def values(self, move: Move) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The arrays of a move: torch's in Flax's layout, and Flax's own."""
        tensors = [self.torch_tree.state[key].detach() for key in move.torch_keys]
        ours = values_in(move.layout.forward(tensors))
        theirs = values_in([self._leaves[path] for path in move.flax_paths])
        return [value.array for value in ours], [value.array for value in theirs]

    def pairs(self) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
        """For every Flax leaf that the plan fills: its path, torch's values, and its own."""
        for moves in self.moves.values():
            for move in moves:
                yield from zip(move.flax_paths, *self.values(move), strict=True)

    def leaves_of(self, torch_path: Path) -> set[Path]:
        """The Flax leaves that a torch layer fills."""
        return {path for move in self.moves.get(torch_path, ()) for path in move.flax_paths}

    @cached_property
    def _leaves(self) -> dict[Path, Any]:
        return {leaf.path: leaf.value for leaf in self.flax_tree.root.flat().values()}


def read_twins(
    torch_module: Any, flax_model: Any, rules: Iterable[UserRule], example: Example | None = None
) -> Twins:
    """Read both models and make the plan between them, with what a run on ``example`` shows of flattened maps.

    Raises:
        ArgumentError: The torch model fails on the example.
        SettingsError: One of them is not a live model.
        PlanError: They have no layer in common.
    """
    if not isinstance(torch_module, nn.Module):
        raise SettingsError(f"{what_kind(torch_module)} cannot run: pass the live nn.Module.")
    linen: LinenModel | None = as_linen(flax_model)
    model, variables = linen if linen is not None else (flax_model, None)
    if linen is not None and variables is None:
        raise SettingsError("a linen module without its variables cannot run: pass (module, variables).")
    template = model if variables is None else variables
    torch_tree, flax_tree, given = read_sides(torch_module, template, rules)
    plan = make_plan(torch_tree, flax_tree, given, example=example)
    if not plan.moves:
        plan.report.raise_unless_ok("compare two models that have no layer in common", strict=True)
        raise PlanError("the two models have no layer in common.")
    hollow = [leaf for leaf in flax_tree.root.flat().values() if isinstance(leaf.value, jax.ShapeDtypeStruct)]
    if hollow:
        raise SettingsError("an abstract Flax model cannot run: fill it first, with to_flax.")
    if not callable(model):
        raise SettingsError(f"{what_kind(model)} cannot run: it has no __call__.")
    return Twins(torch_tree, flax_tree, plan, model, variables)
