"""Which parameters torch leaves where they are, and whether optax would move them.

torch says so itself: by ``requires_grad``, by what the optimizer holds, by what was ever given a gradient. An
optax transformation is a pair of functions, and its state does not show what they do to a leaf. So it is tried:
a few steps over leaves of one number each. Without the transformation only the state is read, and a warning
lists what it does not show. Moves no moment.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.exchange import Path, from_jax_keypath, join_path

from ..pairing import Move

__all__ = [
    "FREEZE",
    "FrozenWarning",
    "UnmovedLeaf",
    "check_unmoved",
    "try_transformation",
    "unmoved_leaves",
    "untrained_faults",
    "warn_of_late_gradients",
]

FREEZE = (
    'optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels), where labels gives "train" or "freeze" '
    "for every leaf; or an nnx.Optimizer with a filter as wrt, and gradients by nnx.DiffState(0, the same filter). "
    "optax.masked freezes nothing: it passes the raw gradient on as the update"
)

_STEPS = 40  # a MultiSteps, or a schedule that starts at zero, may hold the first updates back
_NEVER = "was never given a gradient by torch, which then does not decay it either"


class FrozenWarning(UserWarning):
    """torch leaves parameters where they are, and an optax state does not show whether optax does."""


@dataclass(frozen=True)
class UnmovedLeaf:
    """One leaf that torch leaves where it is.

    Attributes:
        why: The reason, as the rest of a sentence.
        frozen: Whether the caller froze it; False if no gradient ever came.
        decays: Whether torch would decay it if a gradient came.
    """

    why: str
    frozen: bool
    decays: bool


def unmoved_leaves(
    optimizer: torch.optim.Optimizer, module: nn.Module, moves: Iterable[Move]
) -> dict[Path, UnmovedLeaf]:
    """The leaves that torch leaves wholly as they are."""
    decays = {
        id(p): group.get("weight_decay", 0) != 0 for group in optimizer.param_groups for p in group["params"]
    }
    given = {id(p) for p in _stepped(optimizer)}
    # Where nothing is trainable, the whole model was put into evaluation: that freezes no single part.
    thawed = not any(p.requires_grad for p in module.parameters())
    names: dict[str, UnmovedLeaf] = {}
    for name, parameter in module.named_parameters():
        if id(parameter) not in decays:
            names[name] = UnmovedLeaf("is trained by optax and not by the torch optimizer", True, False)
        elif not (parameter.requires_grad or thawed):
            why = "is trained by optax and frozen in torch (requires_grad=False)"
            names[name] = UnmovedLeaf(why, True, decays[id(parameter)])
        elif given and id(parameter) not in given:
            names[name] = UnmovedLeaf(f"is moved by optax and {_NEVER}", False, decays[id(parameter)])
    return {
        path: names[move.torch_keys[0]]
        for move in moves
        if move.torch_keys and all(key in names for key in move.torch_keys)
        for path in move.flax_paths
    }


def _stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters with a trace of a step in the state; if there is none, those with a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    reached = [
        p
        for p in parameters
        if (entry := optimizer.state.get(p))
        and (int(entry["step"]) > 0 if "step" in entry else any(v is not None for v in entry.values()))
    ]
    return reached or [p for p in parameters if p.grad is not None]


# --- trying a transformation ----------------------------------------------------------------------------


def try_transformation(
    opt_state: Any, template: Any, tx: Any, unmoved: Mapping[Path, UnmovedLeaf], known: Iterable[Path]
) -> dict[Path, bool] | None:
    """Try which leaves a transformation moves; None if it cannot be tried.

    Args:
        opt_state: The optax state; or an ``nnx.Optimizer``, which holds its transformation.
        template: The side it was made for.
        tx: The transformation of a bare state, if the caller has it.
        unmoved: What torch does not move. What never had a gradient in torch is given none here.
        known: The plan's leaves; linen's state may lack the collection in front.
    """
    paths = {short: path for path in known for short in (path, path[1:] if path[:1] == ("params",) else path)}
    quiet = {path for path, leaf in unmoved.items() if not leaf.frozen}
    waits = {path for path in paths.values() if path not in unmoved}
    for optimizer, model in _stand_ins(opt_state, template, tx):

        def gradient(keypath: Any, leaf: Any) -> Any:
            held = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
            path = from_jax_keypath(keypath)
            value = jnp.full_like(held, 0 if paths.get(path) in quiet else 0.375)
            return leaf.copy(value) if isinstance(leaf, nnx.Variable) else value

        gradients = jax.tree_util.tree_map_with_path(
            gradient, model, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
        moved: dict[Path, bool] = {}
        for step in range(_STEPS):
            try:
                updates = optimizer(gradients)
            except TypeError:  # it needs an argument that only a training loop has
                return None
            for keypath, update in jax.tree_util.tree_leaves_with_path(updates):
                path = paths.get(from_jax_keypath(keypath))
                if path is not None:
                    moved[path] = moved.get(path, False) or bool((update != 0).any())
            if step and all(moved.get(path) for path in waits):
                break
        return moved
    return None


def _stand_ins(opt_state: Any, template: Any, tx: Any) -> Iterator[tuple[Any, Any]]:
    """A function from gradients to updates, and its small parameters, for each tree with the same state."""
    if isinstance(opt_state, nnx.Optimizer):
        small = _one_number_each(nnx.state(template, opt_state.wrt))
        own = nnx.Optimizer(small, optax.with_extra_args_support(opt_state.tx), wrt=opt_state.wrt)
        if _structure(own.opt_state) == _structure(opt_state.opt_state):
            yield lambda gradients: own.update(small, gradients, value=jnp.float32(1)), small
        return
    if tx is None:
        return
    update = optax.with_extra_args_support(tx).update
    for tree in _candidates(template):
        small = _one_number_each(tree)
        held = [tx.init(small)]
        if _structure(held[0]) != _structure(opt_state):
            continue

        def run(gradients: Any, small: Any = small, held: list[Any] = held) -> Any:
            updates, held[0] = update(gradients, held[0], small, value=jnp.float32(1))
            return updates

        yield run, small


def _candidates(template: Any) -> Iterator[Any]:
    """The trees that a bare state may have been made for."""
    if isinstance(template, Mapping):
        if isinstance(template.get("params"), Mapping):
            yield template["params"]
        yield template
        return
    state = nnx.state(template, nnx.Param)
    yield state
    yield nnx.as_pure(state)
    yield nnx.to_pure_dict(state)


def _one_number_each(tree: Any) -> Any:
    """The tree with one number in each leaf. Dtype, rank and names stay: masks look at them."""
    small = jax.tree.map(lambda leaf: jnp.ones((1,) * len(leaf.shape), leaf.dtype), tree)
    for leaf in jax.tree.leaves(small, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        if isinstance(leaf, nnx.Variable) and leaf.get_metadata().get("out_sharding"):
            leaf.set_metadata("out_sharding", None)  # one number cannot be sharded
    return small


def _structure(state: Any) -> Any:
    return jax.tree.structure(nnx.as_pure(state))


# --- the judgement --------------------------------------------------------------------------------------


def check_unmoved(
    unmoved: Mapping[Path, UnmovedLeaf],
    tried: Mapping[Path, bool] | None,
    places: Mapping[Path, bool] | None,
    state: Any,
    faults: list[str],
) -> frozenset[Path]:
    """The leaves that neither side moves, as far as is known; a fault or a warning for the others.

    Args:
        unmoved: What torch does not move.
        tried: What `try_transformation` found.
        places: Whether a leaf has a moment in the optax state (True) or is masked (False); None where the optimizer
            has no moments.
        state: The optax state.
        faults: Faults are added to it.
    """
    doubt: list[Path] = []
    if tried is not None:
        moved = [path for path in unmoved if tried.get(path)]
    else:
        moved = [path for path, leaf in unmoved.items() if leaf.frozen and places and places.get(path)]
        unseen = [path for path in unmoved if path not in moved and (places is None or path in places)]
        if not _has_set_to_zero(state):
            doubt = [path for path in unseen if unmoved[path].frozen or unmoved[path].decays]
    if moved:
        faults += [f"'{join_path(path)}' {unmoved[path].why}" for path in moved]
        faults.append(f"freeze in optax what torch does not train, by {FREEZE}")
    if doubt:
        listed = _listed(doubt)
        warnings.warn(
            f"torch does not train {listed}, and the optax state does not show whether optax does. Pass tx=, the "
            "transformation of the state, to have it tried. Freeze in optax what torch does not train, by "
            f"{FREEZE}.",
            FrozenWarning,
            stacklevel=4,
        )
    return frozenset(unmoved) - frozenset(moved)


def warn_of_late_gradients(unused: Collection[Path]) -> None:
    """Warn of leaves with a moment in optax that never had a gradient in torch, which counts steps for each."""
    if unused:
        warnings.warn(
            f"torch never gave a gradient to {_listed(sorted(unused, key=join_path))}. Should one come later, "
            "torch counts the steps of a parameter from its first gradient, and optax from the first of all.",
            FrozenWarning,
            stacklevel=4,
        )


def _listed(paths: Collection[Path]) -> str:
    names = [f"'{join_path(path)}'" for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def untrained_faults(tried: Mapping[Path, bool] | None, trained: Collection[Path]) -> list[str]:
    """The faults of leaves that torch trains, and that optax leaves although it moves others."""
    if tried is None or not any(tried.values()):
        return []
    return [
        f"'{join_path(path)}' is trained by the torch optimizer and not by optax"
        for path in sorted(trained, key=join_path)
        if not tried.get(path)
    ]


def _has_set_to_zero(state: Any) -> bool:
    """Whether a partition has a label for ``optax.set_to_zero``, which has an empty state."""
    return any(
        isinstance(held, optax.MaskedState) and isinstance(held.inner_state, optax.EmptyState)
        for node in jax.tree.leaves(state, is_leaf=_is_partition)
        if _is_partition(node)
        for held in node.inner_states.values()
    )


def _is_partition(node: Any) -> bool:
    return isinstance(node, optax.PartitionState)
