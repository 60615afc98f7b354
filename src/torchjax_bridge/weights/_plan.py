"""The plan of a conversion: a frozen value that can be printed, inspected and run in both directions.

`plan` reads both sides, applies the caller's hints, matches, and collects every fault. It moves no values,
and does not raise for models that do not fit. Refuses only what is neither a torch source nor a Flax
template.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import Path, join_path

from ._example import Example, read_example
from ._plan_checks import dtype_faults, group_by_text, notes_on_moves, paths_of, twice_filled, unfilled_arrays
from ._plan_hints import UserRule, apply_hints
from ._report import Fault, Report
from .flatten import ask_about_maps, record_orders, tell_orders
from .pairing import (
    Matcher,
    Move,
    fill_moves,
    keep_in_torch,
    match_with_full_paths,
    merge_by_class,
    merge_class_faults,
    rename_target_faults,
    restrict_series,
    settle_ties,
    take_out_filled,
)
from .rules import RULES, Flatten, Rename, Rule
from .trees import FlaxTree, TorchTree, read_flax, read_torch

__all__ = ["PairingWarning", "PartialWarning", "Plan", "UserRule", "plan"]


@dataclass(frozen=True)
class Plan:
    """What crosses and how, and what does not.

    The same plan serves `to_flax` (torch to Flax) and `to_state_dict` (back). Print it to read it.

    Attributes:
        moves: Groups of tensors that cross, in the order of the torch side.
        torch_only: Keys without a counterpart in Flax, which stay on the torch side (``num_batches_tracked``, and
            what a `Keep` names).
        flax_only: Paths without a counterpart in torch, which keep the template's values (random streams, plain
            arrays of an nnx module).
        ties: Pairs of a key without a place of its own and the key whose tensor it shares.
        notes: Remarks: wrappers that were looked through, dtypes that differ, layouts that are lossy.
        report: Every fault.
        flavour: ``"nnx"`` or ``"linen"``.
        layers: The modules that belong together, containers included: the path on the torch side (without
            wrappers) and the path in Flax (without the collection).
        assumed: Conclusions that names, classes and shapes do not prove; a conversion warns of them.
        flattened: What a run of the torch model on ``inputs`` shows of flattened maps. Pass them as ``rules`` where
            the same models meet without inputs.
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
    flattened: tuple[Flatten, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the conversion has no faults."""
        return not self.report

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Every fault, as data."""
        return self.report.faults

    @property
    def left_out(self) -> tuple[Fault, ...]:
        """What ``strict=False`` leaves out: torch tensors without a place, and Flax leaves without a source."""
        return self.report.lenient

    def __str__(self) -> str:
        rows = [
            (" + ".join(m.torch_keys) or "(nothing)", paths_of(m), f"{m.layout}", m.layer) for m in self.moves
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
        lines += [f"  recorded: {rule}" for rule in self.flattened]
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
        """Warn once, with a `PartialWarning`, of everything that ``strict=False`` left out."""
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


def plan(
    source: Any,
    template: Any,
    *,
    rules: Iterable[UserRule] = (),
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan how the weights of one side go to the other, without moving them.

    Args:
        source: One side: an ``nn.Module`` or ``state_dict``; or an ``nnx.Module``, ``nnx.State`` or linen
            variables.
        template: The other side. Either of the two may be the torch side.
        rules: `Rule` for layer types of your own, `Rename` for names that differ, `LayerType` for layers of
            a bare ``state_dict``, `Flatten` for a layer that reads a flattened map, `Fused` for layers that one
            side keeps as one, `Keep` and `Fill` for what only one side has.
        inputs: What the torch model takes: a tensor, or a tuple of positional arguments. With them a copy of the
            model runs, on the meta device if it needs no values, and shows which layers read a flattened map
            and in which order, which Linear's output is viewed as a map, and in which order layers are called
            (linen's automatic names). The Flax model is taken to keep its maps with the channels last and to
            flatten those, which ``flattened`` lists. Say ``Flatten(path, None)`` where it moves the channels to
            the front first, which no run of the torch model can show; `parity` proves which is true.
        kwargs: Keyword arguments that the torch model takes.

    Returns:
        A frozen `Plan`; its ``report`` lists every fault. `to_flax` and `to_state_dict` run it.

    Raises:
        PlanError: The two are not one torch side and one Flax side, or a rule is no rule.
        ArgumentError: The torch side cannot run, or fails on these inputs.

    Memory:
        Moves nothing. A run on inputs holds the intermediate tensors of the model if it needs values.

    >>> from torch import nn
    >>> from flax import nnx
    >>> print(plan(nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    plan: 2 torch tensors <-> 2 Flax leaves
      weight  kernel  permute(1, 0)  Linear
      bias    bias    as it is       Linear
    """
    if not is_torch_side(source):
        source, template = template, source
    example = read_example(source, inputs, kwargs)
    return make_plan(*read_sides(source, template, rules), example=example)


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
    example: Example | None = None,
) -> Plan:
    """Match two sides that were read.

    Args:
        torch_tree: The torch side.
        flax_tree: The Flax side.
        rules: The caller's.
        cast: The dtype that floating-point values are cast to.
        example: What the torch model takes, to run it.
    """
    faults = [*torch_tree.faults, *apply_hints(torch_tree, rules)]
    recorded, flattened = None, list[Flatten]()
    if example is not None and torch_tree.root.module is not None:
        recorded = record_orders(torch_tree.root.module, *example)
        flattened, contradicted = tell_orders(torch_tree, recorded)
        faults += contradicted
    own = [rule for rule in rules if isinstance(rule, Rule)]
    kept, keep_faults = keep_in_torch(torch_tree, rules)
    flax_root, taken_out, fill_faults = take_out_filled(flax_tree.root, rules)
    faults += [*keep_faults, *fill_faults]
    match, intended = match_with_full_paths(
        torch_tree, flax_root, lambda: Matcher([*own, *RULES]).match(torch_tree.root, flax_root)
    )
    match = match._replace(
        moves=(*match.moves, *fill_moves(taken_out, match.moves, torch_tree)), keeps=(*kept, *match.keeps)
    )
    faults += rename_target_faults(torch_tree, flax_tree.root, match, intended)
    order = {key: place for place, key in enumerate(torch_tree.state)}
    moves = sorted(match.moves, key=lambda move: order[move.torch_keys[0]] if move.torch_keys else len(order))
    leaves = {leaf.path: leaf for leaf in flax_tree.root.flat().values()}
    ties, left = settle_ties(torch_tree, match)
    faults += merge_class_faults(restrict_series(left, torch_tree.root), torch_tree, moves)
    faults += twice_filled(moves)
    map_faults, map_assumptions = ask_about_maps(torch_tree, moves, recorded)
    faults += map_faults
    faults += dtype_faults(torch_tree, moves, cast)
    return Plan(
        tuple(moves),
        (*(key for key in match.keeps if key not in ties), *torch_tree.others),
        (*(leaf.path for leaf in flax_tree.kept), *unfilled_arrays(leaves, moves)),
        tuple(ties.items()),
        tuple(
            dict.fromkeys(
                [
                    *torch_tree.notes,
                    *match.notes,
                    *notes_on_moves(torch_tree, moves, leaves, cast),
                    *([_RECORDED] if flattened else []),
                ]
            )
        ),
        Report(tuple(merge_by_class(dict.fromkeys(faults), torch_tree.root))),
        flax_tree.flavour,
        tuple(dict.fromkeys(match.layers)),
        tuple(group_by_text(dict.fromkeys([*match.assumed, *map_assumptions]))),
        tuple(flattened),
    )


_RECORDED = (
    "what was recorded holds for a Flax model that flattens its own channels-last maps; say Flatten(<layer>, None) "
    "where it moves the channels to the front first"
)
