"""The plan: understand first, as a frozen value that can be printed, asked and run either way.

`plan` reads both sides, applies the caller's hints, matches, and gathers every fault; it moves no value
and does not raise for what does not fit. Refuses only what is neither a torch source nor a Flax template.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from torchjax_bridge.errors import DtypeError, PlanError
from torchjax_bridge.exchange import Path, jax_dtype, join_path, x64

from ._nearest import did_you_mean
from ._report import Fault, Report
from .flatten import COMPUTED, ask_about_maps, can_be_flattened, knows_one_order
from .pairing import (
    RAW,
    Matcher,
    Move,
    ask_once,
    filled,
    gathered,
    keep_in_torch,
    matched_by_real_paths,
    names_that_are_not_there,
    separate_leaves,
    settle_ties,
    take_filled,
    within_their_series,
)
from .rules import RULES, Fill, Flatten, Fused, Keep, LayerType, Rename, Rule
from .trees import FlaxLeaf, FlaxTree, TorchNode, TorchTree, read_flax, read_torch

__all__ = ["PairingWarning", "PartialWarning", "Plan", "UserRule", "plan"]

UserRule = Rule | Rename | LayerType | Flatten | Fused | Keep | Fill


@dataclass(frozen=True)
class Plan:
    """What crosses, how, and what does not.

    The same plan serves `to_flax` (torch to Flax) and `to_state_dict` (back). Print it to read it.

    Attributes:
        moves: Groups of tensors that cross, in the order of the torch side.
        torch_only: Keys that have no image in Flax and stay on the torch side (``num_batches_tracked``, what a
            `Keep` names).
        flax_only: Paths that have no image in torch and stay as the template has them (random streams, plain
            arrays of an nnx module).
        ties: For a key that has no place of its own because its tensor is another key's: that other key.
        notes: What a reader should know: wrappers looked through, dtypes that differ, what is lossy.
        report: Every fault.
        flavour: ``"nnx"`` or ``"linen"``.
        layers: The modules that belong together, containers included: the path on the torch side (without
            wrappers) and the path in Flax (without the collection).
        assumed: What was concluded from less than names, classes and shapes; a conversion warns of it.
    """

    moves: tuple[Move, ...]
    torch_only: tuple[str, ...]
    flax_only: tuple[Path, ...]
    ties: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    report: Report
    flavour: str
    layers: tuple[tuple[Path, Path], ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing stands against the conversion."""
        return not self.report

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Every fault, as data."""
        return self.report.faults

    @property
    def left_out(self) -> tuple[Fault, ...]:
        """What ``strict=False`` leaves out: torch tensors without place, and Flax leaves without source."""
        return self.report.lenient

    def __str__(self) -> str:
        rows = [
            (" + ".join(m.torch_keys) or "(nothing)", _paths(m), f"{m.layout}", m.layer) for m in self.moves
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        count = sum(len(move.torch_keys) for move in self.moves)
        lines = [f"plan: {count} torch tensors <-> {sum(len(m.flax_paths) for m in self.moves)} Flax leaves"]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append(f"  {cells[0]}  {cells[1]}  {cells[2]}  {row[3]}".rstrip())
        lines += [f"  stays in torch: {key}" for key in self.torch_only]
        lines += [f"  tied: {key} is {other}" for key, other in self.ties]
        lines += [f"  stays in Flax: {join_path(path)}" for path in self.flax_only]
        lines += [f"  assumed: {text}" for text in self.assumed]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  {line}" for line in self.report.lines()]
        return "\n".join(lines)

    def warn_of_assumptions(self, stacklevel: int = 1) -> None:
        """Warn once, with a `PairingWarning`, of everything that was assumed."""
        if self.assumed:
            lines = "\n".join(f"  {text}" for text in self.assumed)
            warnings.warn(
                f"the names, classes and shapes do not settle this conversion, so it was assumed:\n{lines}\n"
                "Say which is which with rules=[Rename(<torch name>, <Flax name>), ...] or "
                "[LayerType(<torch name>, <class>)], "
                "or pass the nn.Module if this was its state_dict; parity(torch_module, flax_model, x) shows "
                "whether it holds.",
                PairingWarning,
                stacklevel=stacklevel + 1,
            )

    def warn_of_what_is_left(self, lost: Sequence[str] = (), stacklevel: int = 1) -> None:
        """Warn once, with a `PartialWarning`, of everything that ``strict=False`` let pass."""
        if lines := [*self.report.lenient_lines(), *lost]:
            listed = "\n".join(f"  {line}" for line in lines)
            warnings.warn(
                f"strict=False left this out; what was to be filled keeps the template's values:\n{listed}\n"
                'Say what is meant to be left with rules=[Keep("pooler"), Fill("key.bias", 0.0), ...], and leave '
                "strict=False away.",
                PartialWarning,
                stacklevel=stacklevel + 1,
            )


class PartialWarning(UserWarning):
    """A conversion with ``strict=False`` left something out, which `Plan.left_out` lists."""


class PairingWarning(UserWarning):
    """A conversion rests on an assumption, which `Plan.assumed` lists."""


def plan(source: Any, template: Any, *, rules: Iterable[UserRule] = ()) -> Plan:
    """How the weights of one side lie in the other, without moving them.

    Args:
        source: One side: an ``nn.Module`` or ``state_dict``; or an ``nnx.Module``, ``nnx.State`` or linen
            variables.
        template: The other side. Which of the two is torch and which Flax does not matter to the plan.
        rules: `Rule` for layer types of your own, `Rename` for names that differ, `LayerType` for layers of
            a bare ``state_dict``, `Flatten` for a layer behind flattened features, `Fused` for layers that one
            side keeps as one, `Keep` and `Fill` for what one side has alone.

    Returns:
        A frozen `Plan`; its ``report`` lists every fault. `to_flax` and `to_state_dict` run it.

    Raises:
        PlanError: The two are not one torch side and one Flax side, or a rule is no rule.

    >>> from torch import nn
    >>> from flax import nnx
    >>> print(plan(nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    plan: 2 torch tensors <-> 2 Flax leaves
      weight  kernel  permute(1, 0)  Linear
      bias    bias    as it is       Linear
    """
    if is_torch_side(source):
        return make_plan(*read_sides(source, template, rules))
    return make_plan(*read_sides(template, source, rules))


def is_torch_side(thing: Any) -> bool:
    """Whether this is an ``nn.Module`` or looks like a ``state_dict``."""
    if isinstance(thing, nn.Module):
        return True
    if not isinstance(thing, Mapping):
        return False
    inside = [value for value in thing.values() if isinstance(value, Mapping)]
    return any(isinstance(value, torch.Tensor) for tree in (thing, *inside) for value in tree.values())


def read_sides(
    torch_side: Any, flax_side: Any, rules: Iterable[UserRule]
) -> tuple[TorchTree, FlaxTree, tuple[UserRule, ...]]:
    """Read both sides, with the caller's renames applied."""
    given = tuple(rules) if isinstance(rules, Iterable) else (rules,)
    for rule in given:
        if not isinstance(rule, UserRule):
            raise PlanError(
                f"{rule!r} is no rule: pass a list of Rule, Rename, LayerType, Flatten, Fused, Keep and Fill "
                "objects of torchjax_bridge.weights, or leave rules out."
            )
    renames = tuple(rule for rule in given if isinstance(rule, Rename))
    return read_torch(torch_side, renames), read_flax(flax_side), given


def make_plan(
    torch_tree: TorchTree,
    flax_tree: FlaxTree,
    rules: Sequence[UserRule],
    cast: torch.dtype | None = None,
) -> Plan:
    """Match two sides that were read; ``cast`` is what floating-point values are cast to on their way."""
    faults = [*torch_tree.faults, *_apply_hints(torch_tree, rules)]
    own = [rule for rule in rules if isinstance(rule, Rule)]
    kept, unkept = keep_in_torch(torch_tree, rules)
    flax_root, taken_out, unfilled = take_filled(flax_tree.root, rules)
    faults += [*unkept, *unfilled]
    match, meant = matched_by_real_paths(
        torch_tree, flax_root, lambda: Matcher([*own, *RULES]).match(torch_tree.root, flax_root)
    )
    match = match._replace(
        moves=(*match.moves, *filled(taken_out, match.moves, torch_tree)), keeps=(*kept, *match.keeps)
    )
    faults += names_that_are_not_there(torch_tree, flax_tree.root, match, meant)
    order = {key: place for place, key in enumerate(torch_tree.state)}
    moves = sorted(match.moves, key=lambda move: order[move.torch_keys[0]] if move.torch_keys else len(order))
    leaves = {leaf.path: leaf for leaf in flax_tree.root.flat().values()}
    ties, left = settle_ties(torch_tree, match)
    faults += ask_once(within_their_series(left, torch_tree.root), torch_tree, moves)
    faults += _twice(moves)
    unsaid, taken = ask_about_maps(torch_tree, moves, rules)
    faults += unsaid
    faults += _dtypes(torch_tree, moves)
    return Plan(
        tuple(moves),
        (*(key for key in match.keeps if key not in ties), *torch_tree.others),
        (*(leaf.path for leaf in flax_tree.kept), *_unfilled(leaves, moves)),
        tuple(ties.items()),
        tuple(dict.fromkeys([*torch_tree.notes, *match.notes, *_notes(torch_tree, moves, leaves, cast)])),
        Report(tuple(gathered(dict.fromkeys(faults), torch_tree.root))),
        flax_tree.flavour,
        tuple(dict.fromkeys(match.layers)),
        tuple(by_words(dict.fromkeys([*match.assumed, *taken]))),
    )


# --- the caller's hints ------------------------------------------------------------------------------


def _apply_hints(tree: TorchTree, rules: Sequence[UserRule]) -> list[Fault]:
    """Write what the caller said about layers into the tree; report what says nothing."""
    faults = []
    layers = [node for node in tree.root.walk() if _holds_tensors(node)]
    for rule in rules:
        if isinstance(rule, Fused):
            holders = [node for node in tree.root.walk() if rule.names(node.origin) and not node.empty]
            if not holders:
                faults.append(Fault("rules", f"{rule} names no module of the torch side", rule.module))
            for node in holders:
                node.fused += (rule,)
        if not isinstance(rule, LayerType | Flatten):
            continue
        named = [node for node in layers if rule.names(node.origin)]
        if not named:
            near = did_you_mean(rule.torch, [join_path(node.origin) for node in layers])
            faults.append(Fault("rules", f"{rule} names no layer of the torch side{near}", rule.torch))
        for node in named:
            if isinstance(rule, LayerType):
                node.kind, node.said = rule.kind, True
            elif not can_be_flattened(node, rule):
                other = "" if rule.output else ", and none over flattened features"
                what = (
                    "takes features in torch's order only (None)"
                    if knows_one_order(node)
                    else f"is no Linear layer{other}"
                )
                message = f"{rule} names {node.where}, which {what}"
                faults.append(Fault("rules", message, rule.torch))
            elif rule.output:
                node.output, node.told = rule.features, node.told | {"output"}
            else:
                node.features, node.told = rule.features, node.told | {"features"}
    return faults


def _holds_tensors(node: TorchNode) -> bool:
    """Whether it has tensors of its own, those that were renamed on their own included, or computes them."""
    return bool(node.leaves) or COMPUTED in node.children or any("." not in name for name in node.moved)


# --- checks that need the whole plan -----------------------------------------------------------------


def _twice(moves: Sequence[Move]) -> list[Fault]:
    """Two torch tensors for one Flax leaf."""
    faults: list[Fault] = []
    taken: dict[Path, tuple[str, ...]] = {}
    for move in moves:
        for path in move.flax_paths:
            if path in taken:
                message = f"{move.torch_keys} and {taken[path]} would both fill it"
                faults.append(Fault("ambiguous", message, join_path(path)))
            taken[path] = move.torch_keys
    return faults


def _unfilled(leaves: Mapping[Path, FlaxLeaf], moves: Sequence[Move]) -> Iterable[Path]:
    """Plain arrays of nnx modules that torch has not."""
    filled = {path for move in moves for path in move.flax_paths}
    return (path for path, leaf in leaves.items() if leaf.optional and path not in filled)


def _dtypes(tree: TorchTree, moves: Sequence[Move]) -> Iterable[Fault]:
    """Dtypes that JAX cannot hold as it is set up."""
    wide = x64()
    for move in moves:
        for key in move.torch_keys:
            tensor = tree.state[key]
            if tensor.layout is not torch.strided:
                yield Fault("dtype", "it is a sparse tensor; call .to_dense() first", key, key)
            elif words := _cannot_cross(tensor.dtype, wide):
                yield Fault("dtype", words, key, key)


@lru_cache(maxsize=64)
def _cannot_cross(dtype: torch.dtype, wide: bool) -> str:
    """Why JAX cannot hold a dtype, with x64 as it is; empty if it can."""
    try:
        wanted = jax_dtype(dtype)
    except DtypeError as err:
        return str(err)
    # 64-bit integers may cross as 32-bit ones, which their values decide.
    if not wide and wanted in (np.float64, np.complex128):
        return (
            f"{dtype} needs x64, which is off; call module.float() first, or "
            'jax.config.update("jax_enable_x64", True)'
        )
    return ""


def by_words(found: Iterable[tuple[str, str]]) -> Iterable[str]:
    """One line for all the layers about which the same was assumed."""
    layers: dict[str, list[str]] = {}
    for layer, words in found:
        layers.setdefault(words, []).append(layer)
    for words, named in layers.items():
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        yield f"{', '.join(named[:_MOST_NAMED])}{more}: {words}"


_MOST_NAMED = 4


def _notes(
    tree: TorchTree, moves: Sequence[Move], leaves: dict[Path, FlaxLeaf], cast: torch.dtype | None
) -> Iterable[str]:
    """What is no fault and still worth saying."""
    differ: list[tuple[str, str]] = []
    for move in moves:
        name = " + ".join(move.torch_keys) or _paths(move)
        if move.note:
            yield f"{name}: {move.note}"
        if not move.layout.lossless:
            yield f"{name}: {move.layout}; the way back needs the torch module as its template to be exact"
        if move.rule == RAW:
            yield from _other_role(tree, move, leaves)
        dtypes = {tree.state[key].dtype for key in move.torch_keys}
        for path in move.flax_paths:
            theirs = leaves[path].dtype
            if any(not _same_dtype(dtype, theirs) for dtype in dtypes):
                ours = ", ".join(sorted(map(str, dtypes)))
                given = cast is not None and all(dtype.is_floating_point for dtype in dtypes)
                become = f"are cast to {cast}" if given else "cross with the dtype they have"
                differ.append((name, f"{ours} in torch, {theirs} in Flax; values {become}"))
    yield from by_words(differ)
    for path in _unfilled(leaves, moves):
        if isinstance(leaves[path].value, jax.ShapeDtypeStruct):
            yield (
                f"{join_path(path)}: a plain array that torch has not, and an abstract template has no value of "
                "it; fill a concrete template"
            )
    yield from separate_leaves(tree, moves)


def _other_role(tree: TorchTree, move: Move, leaves: dict[Path, FlaxLeaf]) -> Iterable[str]:
    """A buffer that is trained in Flax, or a parameter that is not."""
    for key in move.torch_keys:
        buffer = tree.is_buffer(key)
        if buffer is False and any(leaves[path].optional for path in move.flax_paths):
            yield f"{key}: a parameter in torch and a plain array in Flax, which no optimizer trains"
        for collection in {leaves[path].collection for path in move.flax_paths}:
            if buffer and collection == "params":
                yield f"{key}: a buffer in torch and a parameter in Flax, where optimizers train it"
            elif buffer is False and collection not in ("params", ""):
                yield f"{key}: a parameter in torch and in '{collection}' in Flax, where no optimizer trains it"


@lru_cache(maxsize=256)
def _same_dtype(ours: torch.dtype, theirs: Any) -> bool:
    return str(ours).removeprefix("torch.") == str(theirs)


def _paths(move: Move) -> str:
    return " + ".join(join_path(path) for path in move.flax_paths) or "(nothing)"
