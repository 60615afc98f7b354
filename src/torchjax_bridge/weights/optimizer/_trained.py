"""What a torch optimizer trains: the names of its parameters, and their leaves on the other side.

The other side is a Flax model, matched by the plan of its weights, or the variables of ``as_jax_module``. The
leaves of those have torch's own names and layouts. Moves no moment.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import OptimizerStateError
from torchjax_bridge.exchange import Path, join_path

from .._plan import UserRule, plan
from ..layouts import Identity
from ..pairing import RAW, Move

__all__ = ["lost_ties", "moves_of", "names_of"]


def moves_of(
    module: nn.Module,
    template: Any,
    rules: Iterable[UserRule],
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Move, ...]:
    """The moves of parameters, each under the first of its names, as torch's optimizers know it."""
    if (named := _by_torch_names(module, template)) is not None:
        return named
    made = plan(module, template, rules=rules, inputs=inputs, kwargs=kwargs)
    made.report.raise_unless_ok("match the optimizer's parameters", strict=True)
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    return tuple(
        replace(move, torch_keys=tuple(trained.get(key, key) for key in move.torch_keys))
        for move in made.moves
        if trained.keys() & set(move.torch_keys)
    )


def _by_torch_names(module: nn.Module, template: Any) -> tuple[Move, ...] | None:
    """The moves if the template has a leaf of the same name and shape for every parameter, else None."""
    leaves = template.get("params") if isinstance(template, Mapping) else None
    if not isinstance(leaves, Mapping):
        return None
    named = dict(module.named_parameters())
    if named.keys() != leaves.keys() or any(leaves[k].shape != tuple(p.shape) for k, p in named.items()):
        return None
    return tuple(Move((name,), (("params", name),), Identity(), RAW, RAW) for name in named)


def lost_ties(moves: Iterable[Move], names: Mapping[int, str]) -> list[str]:
    """The faults of parameters that are tied in torch and several leaves in Flax: training would part them."""
    leaves: dict[str, list[Path]] = {}
    for move in moves:
        for key in move.torch_keys:
            leaves.setdefault(key, []).append(move.flax_paths[0])
    return [
        f"'{name}' is one tied parameter in torch and separate leaves in Flax "
        f"({', '.join(map(join_path, leaves[name]))}), which each follow their own gradients; share it in Flax"
        for name in names.values()
        if len(leaves.get(name, ())) > 1
    ]


def names_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[int, str]:
    """The name of every optimized parameter by its identity, in the order of torch's indices."""
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    names = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise OptimizerStateError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is none of the "
                    "module's: pass the module that it was built from."
                )
            names[id(parameter)] = known[id(parameter)]
    return names
