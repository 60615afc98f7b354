"""`link`: checks and plans two models once, and gives the `Link` that runs the plan."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import PlanError
from torchjax_bridge.exchange import (
    join_path,
    refuse_in_fork,
    torch_dtype,
)

from .._apply import refuse_holes
from .._audit import compare_settings
from .._example import read_example
from .._plan import Plan, UserRule, make_plan, read_sides
from .._report import what_it_is
from ..trees import FlaxTree, live_nnx, sharding_of
from ._flax_side import NnxModule, Tree
from ._frozen import frozen_keys
from ._link import Link, Options
from ._stale import raise_if_stale
from ._steps import Step
from ._torch_side import TorchSide

__all__ = ["link"]


def link(
    module: nn.Module,
    model: Any,
    *,
    rules: Iterable[UserRule] = (),
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtype: Any = None,
    frozen: str | Iterable[str] | Callable[[str, torch.Tensor], bool] = (),
    share: bool = False,
    changed_only: bool = False,
) -> Link:
    """A `Link` between two models whose weights cross again and again, as in RL, distillation or evaluation.

    Plans once, as `to_flax` does. After that, `Link.push` and `Link.pull` only copy.

    Args:
        module: The torch module.
        model: An ``nnx.Module``, which pushes change in place; or an ``nnx.State`` or linen variables (arrays, or
            the structs of ``jax.eval_shape``), from which a push makes a new tree.
        rules: As for `to_flax`.
        inputs: What the torch module takes, as for `to_flax`.
        kwargs: Keyword arguments that it takes.
        dtype: A floating-point dtype of JAX, such as ``jnp.bfloat16``, to which a push casts every floating-point
            tensor while it is laid out. A pull casts back to the dtypes of the module. None keeps every dtype.
        frozen: What no push and no pull touches: keys of the ``state_dict``, paths of modules, patterns of either
            (``"blocks.*.norm"``), or a function of the key and the module's own tensor. It is asked once.
        share: Whether leaves with the same layout on both sides share torch's memory if they can, instead of being
            copied. Such arrays change when torch writes to its tensors; see ``docs/sharing-memory.md``.
        changed_only: Whether a push leaves out a parameter whose version (``Tensor._version``), memory and strides
            are those of the last push, if Flax still holds the array of that push. Some writes raise no version:
            those to ``parameter.data``, those of ``torch.optim`` with ``fused=True``, and those through NumPy,
            DLPack or another process. They are missed, so this is off unless it is asked for. Buffers are always
            pushed, since torch writes the statistics of a BatchNorm without raising a version.

    Returns:
        The link. It has moved nothing yet.

    Raises:
        PlanError: The models do not fit; ``frozen`` names nothing, everything, or a part of a fused leaf or of a
            tied tensor; or a leaf of an abstract model would stay without a value. The message lists every fault.
        ArgumentError: ``inputs`` are given and the module fails on them.
        TypeError: ``module`` is no ``nn.Module``, or ``dtype`` is no floating-point dtype.

    Warns:
        PairingWarning: As for `to_flax`.
        SettingsWarning: As for `to_flax`.

    Memory:
        The link holds both models, and the memory that each small tensor had at the last push; with
        ``changed_only`` that of every tensor.

    >>> import torch
    >>> from flax import nnx
    >>> module = torch.nn.Linear(2, 3)
    >>> twin = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> both = link(module, twin)
    >>> both.push() is twin
    True
    >>> with torch.no_grad():
    ...     _ = module.weight.mul_(2)
    >>> both.push().kernel[...].T.tolist() == module.weight.tolist()
    True
    """
    refuse_in_fork("link two models")
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"link() takes a live nn.Module, not {what_it_is(module)}: its tensors are read again at each push. "
            "For a state_dict use to_flax."
        )
    cast, rules = _floating(dtype), tuple(rules)
    example = read_example(module, inputs, kwargs)
    torch_tree, flax_tree, given = read_sides(module, model, rules)
    plan = make_plan(torch_tree, flax_tree, given, cast, example)
    plan.report.raise_unless_ok(f"link {what_it_is(module)} and {what_it_is(model)}", strict=True)
    live = {**torch_tree.state, **module.state_dict(keep_vars=True)}  # with requires_grad
    left = frozen_keys(frozen, plan, live, torch_tree.ties)
    plan = replace(
        plan,
        moves=tuple(move for move in plan.moves if left.keys().isdisjoint(move.torch_keys)),
        torch_only=(*plan.torch_only, *left),
    )
    refuse_holes(plan, flax_tree)
    _refuse_abstract_streams(flax_tree, model)
    plan.warn_of_assumptions(stacklevel=2)
    if layers := live_nnx(flax_tree):
        compare_settings(torch_tree, layers, plan).warn_unless_ok(stacklevel=2)
    keys = [key for move in plan.moves for key in move.torch_keys]
    ties = [(key, twin) for key, twin in plan.ties if twin in keys]
    torch_side = TorchSide(module, [*keys, *(key for key, _ in ties)], ties)
    paths = [path for move in plan.moves for path in move.flax_paths]
    flax_side = (
        NnxModule(
            model, flax_tree, paths, lambda: _plan_again(plan, module, model, rules, cast, inputs, kwargs)
        )
        if isinstance(model, nnx.Module)
        else Tree(model, flax_tree, paths)
    )
    steps: list[Step] = []
    first = 0
    for move in plan.moves:
        shardings = [sharding_of(flax_side.leaves[path]) for path in move.flax_paths]
        steps.append(Step(move, torch_side, first, shardings, torch_tree.device))
        first += len(move.flax_paths)
    return Link(plan, torch_side, flax_side, steps, Options(cast, share, changed_only))


def _plan_again(
    plan: Plan,
    module: nn.Module,
    model: nnx.Module,
    rules: tuple[UserRule, ...],
    cast: torch.dtype | None,
    inputs: Any,
    kwargs: Mapping[str, Any] | None,
) -> None:
    """Raise a `PlanError` unless the plan would be the same for the models as they are now."""
    torch_tree, flax_tree, given = read_sides(module, model, rules)
    now = make_plan(torch_tree, flax_tree, given, cast, read_example(module, inputs, kwargs))
    now.report.raise_unless_ok("go on with this link, since its models have changed", strict=True)
    layouts = {move.flax_paths: (move.torch_keys, repr(move.layout)) for move in now.moves}
    raise_if_stale(
        f"'{join_path(move.flax_paths[0])}' is laid out otherwise now: its layer or a setting has changed"
        for move in plan.moves
        if layouts.get(move.flax_paths) != (move.torch_keys, repr(move.layout))
    )


def _floating(dtype: Any) -> torch.dtype | None:
    if dtype is None:
        return None
    cast = torch_dtype(dtype)
    if not cast.is_floating_point:
        raise TypeError(
            f"dtype={dtype!r} is no floating-point dtype: pass one such as jnp.bfloat16, or None."
        )
    return cast


def _refuse_abstract_streams(tree: FlaxTree, model: Any) -> None:
    """Refuse random streams without a value in a module that is filled in place."""
    for leaf in tree.kept if isinstance(model, nnx.Module) else ():
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            raise PlanError(
                f"'{join_path(leaf.path)}' is a random stream without a value, and a push changes only weights: "
                "link a concrete module, such as to_flax(module, model) gives."
            )
