"""Runs a torch model and its Flax twin on the same inputs and says where they part, and why: the way in.

Reads the arguments of `parity`. ``_models`` runs and compares, ``_rounding`` decides what is rounding.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from torchjax_bridge.errors import ArgumentError

from .._example import Example
from .._plan import UserRule
from ._compare import Bounds
from ._models import Arguments, compare_models
from ._result import Parity
from ._rounding import decide_in_float64, may_be_rounding
from ._twins import Twins, read_twins

__all__ = ["parity"]


def parity(
    torch_module: nn.Module,
    flax_model: Any,
    *inputs: Any,
    rules: Iterable[UserRule] = (),
    atol: float | None = None,
    rtol: float | None = None,
    channels_last: bool | Sequence[bool] | None = None,
    ignore: str | Iterable[str] = (),
    torch_kwargs: Mapping[str, Any] | None = None,
    flax_kwargs: Mapping[str, Any] | None = None,
) -> Parity:
    """Run a torch model and its Flax twin on the same inputs, and compare them layer by layer.

    Both run in the mode they are in (call ``eval()`` on both for a comparison without dropout), without gradients,
    and with exact float32 matrix products. Every call of every layer that the two have in common is compared with
    torch's, in torch's order of execution. For the first call that differs, `parity` looks for the likely cause and
    proves it where it can: it runs the layer again with the other side's settings, looks for its weights in other
    layers, and compares the layer's input with what activations, flattenings, residual connections and dropouts
    would give.

    A layer may differ though both models are right: torch's may hold an activation or a scale that Flax has
    behind it. If the layers that read it are given the same in both models, the difference is a note and no
    failure.

    Args:
        torch_module: The torch model.
        flax_model: An ``nnx.Module``, or ``(linen module, variables)``, with the converted weights.
        inputs: The arguments of the torch model: tensors, trees of tensors, and whatever else it takes.
        rules: As for `to_flax`.
        atol: The largest absolute difference that passes for rounding.
        rtol: The same, relative to the largest absolute value of torch's output. By default it depends on the
            dtype: 1e-5 for float32.
        channels_last: Whether tensors ``(N, C, *space)`` are given to Flax as ``(N, *space, C)``; one answer, or
            one for each input. By default both are tried for inputs with as many axes as torch's convolutions take,
            and the one stays with which the first convolution is given the same in both. Other inputs go in as they
            are and, if the models then differ, with their channels last, too.
        ignore: The torch paths of layers that need not agree, or patterns of them (``"layer1.*.act"``); the outputs
            of the models are always compared.
        torch_kwargs: Keyword arguments for the torch model.
        flax_kwargs: Keyword arguments for the Flax model, such as ``{"train": False}``.

    Returns:
        A `Parity`; print it.

    Raises:
        PlanError: The two have no layer in common.
        SettingsError: One of them is not a live model.
        ArgumentError: The models do not take these inputs; or ``ignore`` names no layer.

    Memory:
        Holds a copy of the inputs and outputs of every layer, of both models, and while torch's runs a copy of its
        parameters and buffers. Both models are given copies of the inputs, so a forward may write to its own.
        Parameters, buffers, attributes, modes and random states are afterwards what they were, and so are inputs.

    >>> import torch
    >>> from flax import nnx
    >>> from torchjax_bridge import to_flax
    >>> module = torch.nn.Linear(2, 3)
    >>> twin = to_flax(module, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> parity(module, twin, torch.ones(1, 2)).ok
    True
    """
    left_out = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    kwargs = dict(torch_kwargs or {}), dict(flax_kwargs or {})
    given = Arguments(tuple(rules), inputs, channels_last, left_out, *kwargs)
    twins = read_twins(torch_module, flax_model, given.rules)
    with suppress(ArgumentError):  # the comparison itself will say it better
        recorded = read_twins(torch_module, flax_model, given.rules, Example(inputs, kwargs[0]))
        found = _compare(torch_module, recorded, given, atol, rtol)
        if found.ok or not recorded.plan.flattened:
            return found
        # The Flax model may flatten with its channels in front, which no run of torch's shows.
        other = _compare(torch_module, twins, given, atol, rtol)
        return other if other.ok or _agreeing(other) >= _agreeing(found) else found
    return _compare(torch_module, twins, given, atol, rtol)


def _agreeing(found: Parity) -> int:
    """How many outputs agree before the first that does not."""
    return next((place for place, row in enumerate(found.rows) if row.ok is False), len(found.rows))


def _compare(
    torch_module: nn.Module, twins: Twins, given: Arguments, atol: float | None, rtol: float | None
) -> Parity:
    bounds = Bounds(atol, rtol)
    found, bad, steps = compare_models(twins, given, bounds, bounds)
    declared = atol is not None or rtol is not None  # then the caller decides what is rounding
    return (
        found
        if declared or not may_be_rounding(found, bad)
        else decide_in_float64(found, torch_module, twins, given, steps)
    )
