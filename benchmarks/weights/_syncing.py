"""What it costs to move the weights again and again: by `to_flax` or by a link, against bare transpositions."""

import operator
import resource
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from torchjax_bridge import link, to_flax

from .._case import Candidate, Findings, WrongResultError, ask
from .._record import Promise
from .._setting import Setting
from ._models import Description, nnx_template, torch_module

__all__ = ["put", "small_leaves", "syncing"]

PUTS = "device_put(v.numpy().T) on threads that live on"
PUSH = "link.push"
PULL = "link.pull"
AGAIN = "to_flax"


def syncing(name: str, description: Description, setting: Setting) -> Findings:
    """A repeated conversion and a push, with warm memory, against two calls of ``device_put`` at a time."""
    if setting.device != "cpu":
        return Findings()
    module, template = torch_module(description), nnx_template(description)
    twin = to_flax(module, template)
    both = link(module, twin)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:

        def puts(source: torch.nn.Module) -> list[jax.Array]:
            return list(pool.map(put, source.state_dict().values()))

        case, rounds = ask(
            f"weights/{name}/again",
            f"What does it cost to move the weights of a {name} model once more, as after each step of training?",
            [
                Candidate(PUTS, puts, module, lambda _: None),
                Candidate(AGAIN, lambda source: to_flax(source, template), module, _check(module), ours=True),
                Candidate(PUSH, lambda _: both.push(), module, _check(module), ours=True),
            ],
            setting,
            effort=4,
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        both.push()
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
    pages = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(twin))) / resource.getpagesize()
    words = f"a repeated {{}} of a {name} model / device_put on {threads} threads"
    return Findings(
        [case],
        [
            Promise(words.format(AGAIN), "at most", 1.15, "x", rounds.ratio(AGAIN, PUTS)),
            Promise(words.format("push"), "at most", 1.0, "x", rounds.ratio(PUSH, PUTS)),
        ],
        [
            f"A push of a {name} model takes {faults:,.0f} page faults for {pages:,.0f} pages of new arrays. The "
            "C library hands the memory of dropped arrays out again, but gives blocks of more than 32 MB back."
        ],
    )


def small_leaves(setting: Setting) -> Findings:
    """A link between models of 1,000 small leaves: a cost per leaf."""
    layers = 25 if setting.quick else 500
    description = {f"layer{k}": ("linear", 8, 8) for k in range(layers)}
    module = torch_module(description).to(setting.torch_device)
    twin, other = (to_flax(module, nnx_template(description)) for _ in range(2))
    both, cautious = link(module, twin), link(module, other, changed_only=True)
    cautious.push()
    clone, unchanged = "clone of the state_dict", "link.push, changed_only=True, nothing changed"
    look = "the version and the address of each tensor and the array of each Variable, of four such pairs"
    # Of models that nothing else reads: a push that finds nothing changed also meets a cache that others filled.
    sources = [torch_module(description) for _ in range(4)]
    tensors = [one for source in sources for one in source.state_dict(keep_vars=True).values()]
    twins = [to_flax(source, nnx_template(description)) for source in sources]
    variables = [one for twin in twins for _, one in nnx.to_flat_state(nnx.state(twin, nnx.Param))]
    leaves = 2 * layers
    case, rounds = ask(
        "weights/leaves/again",
        f"What does it cost to move {leaves:,} small weights once more?",
        [
            Candidate(
                clone,
                lambda source: [v.clone() for v in source.state_dict().values()],
                module,
                lambda _: None,
            ),
            Candidate(PUSH, lambda _: both.push(), module, _check(module), ours=True),
            Candidate(unchanged, lambda _: cautious.push(), module, _check(module), ours=True),
            Candidate(look, _look, (tensors, variables), lambda _: None, limit=True),
        ],
        setting,
        effort=4,
    )
    # Apart from the pushes, since a pull writes to every tensor.
    back, back_rounds = ask(
        "weights/leaves/back",
        f"What does it cost to take {leaves:,} small weights back?",
        [
            Candidate(
                clone,
                lambda source: [v.clone() for v in source.state_dict().values()],
                module,
                lambda _: None,
            ),
            Candidate(PULL, lambda _: both.pull(), module, lambda _: None, ours=True),
        ],
        setting,
        effort=4,
    )
    promises = []
    for name, call, limit, found in (
        ("push", PUSH, 15.0, rounds),
        ("push that finds nothing changed", unchanged, 1.0, rounds),
        ("pull", PULL, 15.0, back_rounds),
    ):
        spread = found.combine(lambda seconds, call=call: 1e6 * seconds[call] / leaves)  # type: ignore[misc]
        promises.append(
            Promise(f"{name} of {leaves:,} small leaves, per leaf", "at most", limit, "us", spread)
        )
    bare = rounds.combine(lambda seconds: 1e6 * seconds[look] / len(tensors))
    words = "a bare look at the versions and addresses of {:,} small tensors and at their Variables, per leaf"
    promises.append(Promise(words.format(leaves), "reported", None, "us", bare))
    return Findings([case, back], promises)


def _clone(module: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def _look(pairs: tuple[list[torch.Tensor], list[nnx.Variable[Any]]]) -> tuple[list[Any], ...]:
    tensors, variables = pairs
    return (
        list(map(operator.attrgetter("_version"), tensors)),
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(nnx.Variable.get_raw_value, variables)),
    )


def put(tensor: torch.Tensor) -> jax.Array:
    """A transposed copy in new memory of XLA's."""
    host = jax.devices("cpu")[0]
    return jax.device_put(tensor.detach().numpy().T, host, may_alias=False)


def _check(module: torch.nn.Module) -> Any:
    def check(twin: nnx.Module) -> None:
        found = nnx.to_flat_state(nnx.state(twin))
        arrays = {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in found}
        for key, value in module.state_dict().items():
            name = key.removesuffix("weight") + "kernel" if key.endswith("weight") else key
            if not np.array_equal(arrays[name], value.cpu().numpy().T):
                raise WrongResultError(f"{key} differs")

    return check
