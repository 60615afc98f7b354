"""Ports one model and measures what came out; `Outcome` says what is measured.

Everything that is refused, or fails, ends in ``why_not`` with what was known until then. Only the end of the
process itself is left to whoever started it.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import BridgeError

from .._setting import Setting
from .._timing import Timed, measure
from ._dropouts import dropouts_without_chance
from ._forward import as_flax, difference, in_float64, is_float64, leaves
from ._outcome import LIMIT, Outcome
from ._source import classes, lines, torch_lines, transpositions
from .zoo import Entry

__all__ = ["measure_port"]

_BATCH, _OTHER_BATCH, _TRAIN_BATCH = 2, 3, 4


def measure_port(entry: Entry, port: Callable[..., Any], setting: Setting) -> Outcome:
    """Every figure of one model, in the order in which each needs the one before."""
    module = entry.build()
    row = Outcome(entry.set, entry.name, torch_lines=torch_lines(module))
    start = time.perf_counter()
    try:
        ported = port(module, *entry.inputs(_BATCH))
    except BridgeError as err:
        return replace(row, why_not=_first_line(err))
    except Exception as err:  # whatever else it raises is a fault of ours, to be told apart from a refusal
        return replace(row, why_not=f"{type(err).__name__}: {_first_line(err)}")
    row = replace(
        row,
        port_seconds=time.perf_counter() - start,
        lines=lines(ported.source),
        classes=classes(ported.source),
        transpositions=transpositions(ported.source),
    )
    try:
        ported.model.eval()
        row = replace(row, difference=_difference(module, ported.model, entry.inputs(_BATCH)))
        row = replace(row, other_batch=_difference(module, ported.model, entry.inputs(_OTHER_BATCH)))
        if row.wrong:
            row = replace(
                row, in_float64=_difference(*in_float64(module, ported.model, entry.inputs(_BATCH)))
            )
        row = replace(row, train=_train(module, ported.model, entry.inputs(_TRAIN_BATCH)))
        return replace(row, batch=entry.speed_batch, **_speed(entry, module, ported.model, setting))
    except Exception as err:
        return replace(row, why_not=f"ported, but {type(err).__name__}: {_first_line(err)}")


def _first_line(err: Exception) -> str:
    """The first line of a message, and the first point of the list that it may announce."""
    head, *rest = str(err).strip().splitlines() or [type(err).__name__]
    points = "\n".join(["", *rest]).split("\n- ")[1:]
    if not points:
        return head
    return " ".join([head, *points[0].split()]) + (f" (and {len(points) - 1} more)" if points[1:] else "")


@torch.no_grad()
def _difference(module: nn.Module, model: nnx.Module, inputs: tuple[Any, ...]) -> float:
    with jax.enable_x64(any(is_float64(one) for one in inputs)):
        inside = as_flax(inputs)  # first: a forward may write to its inputs
        return difference(module(*inputs), _forward(model, *inside))


@nnx.jit
def _forward(model: Any, *inputs: Any) -> Any:
    return model(*inputs)


@torch.no_grad()
def _train(module: nn.Module, model: nnx.Module, inputs: tuple[Any, ...]) -> str:
    """Compare in training mode: whether both draw, and what they give with dropouts without chance."""
    try:
        drawn = [_torch_trained(module, inputs, seed) for seed in (1, 2)]
        twin = nnx.clone(model)
        twin.train()
        inside = as_flax(inputs)
        found = [_forward(twin, *inside) for _ in range(2)]
        if _same(*drawn) and not _same(*found):
            return "the port draws, torch does not"
        if _same(*found) and not _same(*drawn):
            return "torch draws, the port does not"
        with dropouts_without_chance():
            fixed = [_torch_trained(module, inputs, seed) for seed in (1, 2)]
            if not _same(*fixed):  # stochastic depth and the like
                return "random" if difference(drawn[0], found[0]) < float("inf") else "not finite"
            worst = difference(fixed[0], twin(*inside))
            if worst > LIMIT:
                module, twin, inputs = in_float64(module, twin, inputs)
                with jax.enable_x64(True):
                    found = twin(*as_flax(inputs))
                    worst = difference(_torch_trained(module, inputs, 1), found)
    except Exception as err:
        return f"{type(err).__name__}: {_first_line(err)}"
    return "agrees" if worst <= LIMIT else f"differs by {worst:.1e}"


def _torch_trained(module: nn.Module, inputs: tuple[Any, ...], seed: int) -> Any:
    torch.manual_seed(seed)
    return copy.deepcopy(module).train()(*copy.deepcopy(inputs))


def _same(first: Any, second: Any) -> bool:
    pairs = zip(leaves(first), leaves(second), strict=True)
    return all(np.allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6) for a, b in pairs)


def _speed(entry: Entry, module: nn.Module, model: nnx.Module, setting: Setting) -> dict[str, Any]:
    """Milliseconds of a forward pass in evaluation mode."""
    inputs = entry.inputs(entry.speed_batch)
    inside = as_flax(inputs)
    candidates = [
        Timed("torch_ms", torch.no_grad()(lambda given: module(*given)), inputs),
        Timed("port_ms", partial(_call, model), inside),
    ]
    if entry.twin is not None:
        twin = entry.twin(module)
        twin.eval()
        candidates.append(Timed("twin_ms", partial(_call, twin), inside))
    rounds = measure(candidates, setting.pace, jax.block_until_ready)
    return {one.name: rounds.microseconds(one.name).median / 1e3 for one in candidates}


def _call(model: nnx.Module, inputs: list[Any]) -> Any:
    return _forward(model, *inputs)
