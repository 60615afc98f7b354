"""What a tree costs: 500 small leaves against 500 single calls, and a 1,000-leaf ``state_dict``."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from .._case import Candidate, Findings, WrongResultError, ask
from .._peers import load_peer
from .._record import Promise
from .._setting import Setting
from ._routes import NUMPY, OURS, RAW, STOCK, Direction, check_result

__all__ = ["state_dict", "tree"]

_LEAVES = 500
_LEAF_SHAPE = (8, 8)
_SINGLES = "single calls of ours"

# Peer -> its function over trees, in each direction.
_PEER_TREES = {
    "to_jax": {"torch-jax-interop": "torch_to_jax", "wrap-torch2jax": "tree_t2j"},
    "to_torch": {"torch-jax-interop": "jax_to_torch", "wrap-torch2jax": "tree_j2t"},
}


def tree(direction: Direction, setting: Setting) -> Findings:
    """One call on a dict of 500 leaves, against 500 calls on single leaves."""
    count = _leaves(setting)
    operand = {f"block_{index}.weight": direction.make_operand(_LEAF_SHAPE) for index in range(count)}
    convert = direction.ours

    def singles(leaves: dict[str, Any]) -> dict[str, Any]:
        return {name: convert(leaf) for name, leaf in leaves.items()}

    calls: dict[str, Callable[[Any], Any]] = {_SINGLES: singles, OURS: convert}
    for name in (STOCK, RAW, NUMPY):
        if route := direction.routes.get(name):
            calls[f"jax.tree.map, {name}"] = _over_tree(route)
    if direction.name == "to_jax" and setting.device == "cpu":
        calls["jax.device_put of numpy views"] = lambda leaves: jax.device_put(
            {name: leaf.numpy() for name, leaf in leaves.items()}, setting.jax_device
        )
    if setting.peers:
        for name, function in _PEER_TREES[direction.name].items():
            if module := load_peer(name).module:
                calls[name] = getattr(module, function)
    case, rounds = ask(
        f"{direction.name}/tree",
        f"What does a dict of {count} float32 leaves of 8x8 cost to share, {direction.label}?",
        [
            Candidate(
                name,
                call,
                operand,
                _check_tree(operand, share=True if name in (OURS, _SINGLES) else None),
                ours=name == OURS,
                limit=RAW in name,
            )
            for name, call in calls.items()
        ],
        setting,
        effort=2,
    )
    promise = Promise(
        f"{direction.name} of {count} leaves / {count} single calls",
        "at most",
        1.3,
        "x",
        rounds.ratio(OURS, _SINGLES),
    )
    return Findings([case], [promise])


def state_dict(direction: Direction, setting: Setting) -> Findings:
    """The ``state_dict`` of 500 linear layers: 1,000 leaves, none copied."""
    count = _leaves(setting)
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(count))).to(setting.torch_device)
    operand: Any = dict(layers.state_dict())
    if direction.name == "to_torch":
        operand = {name: direction.make_operand(tuple(leaf.shape)) for name, leaf in operand.items()}
    baseline, floor = f"jax.tree.map, {STOCK}", f"jax.tree.map, {RAW}"
    case, rounds = ask(
        f"{direction.name}/state_dict",
        f"What does a state_dict of {2 * count} leaves cost to share, {direction.label}?",
        [
            Candidate(
                baseline, _over_tree(direction.routes[STOCK]), operand, _check_tree(operand, share=None)
            ),
            *(
                [
                    Candidate(
                        floor,
                        _over_tree(direction.routes[RAW]),
                        operand,
                        _check_tree(operand, share=None),
                        limit=True,
                    )
                ]
                if RAW in direction.routes
                else []
            ),
            Candidate(OURS, direction.ours, operand, _check_tree(operand, share=True), ours=True),
        ],
        setting,
        effort=2,
    )
    promise = Promise(
        f"{direction.name} of a state_dict of {2 * count} leaves, zero-copy",
        "at most",
        10.0 * count / _LEAVES,
        "ms",
        rounds.combine(lambda seconds: 1e3 * seconds[OURS]),
    )
    promises = [promise]
    if floor in rounds.seconds:
        # Milliseconds depend on the machine; the ratio to the raw capsules does not.
        text = f"{direction.name} of a state_dict of {2 * count} leaves / {RAW}"
        promises.append(Promise(text, "reported", None, "x", rounds.ratio(OURS, floor)))
    return Findings([case], promises)


def _leaves(setting: Setting) -> int:
    return _LEAVES // 10 if setting.quick else _LEAVES


def _over_tree(route: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda leaves: jax.tree.map(route, leaves)


def _check_tree(operand: dict[str, Any], *, share: bool | None) -> Callable[[Any], bool]:
    def check(result: Any) -> bool:
        if list(result) != sorted(operand) and list(result) != list(operand):
            raise WrongResultError("the keys differ")
        return bool(
            np.all([check_result(leaf, result[name], must_share=share) for name, leaf in operand.items()])
        )

    return check
