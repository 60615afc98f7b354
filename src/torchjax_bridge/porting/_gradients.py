"""The proof of derivatives: the gradient of a random projection of the outputs, in torch and in Flax.

Outputs that agree say nothing of a lost ``detach()``. Gradients of float32 are rounded where many numbers cancel,
and jump where a ReLU is near its corner, so float64 decides where float32 cannot tell.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn

from torchjax_bridge.exchange import to_jax, to_torch
from torchjax_bridge.recording import copy_module, tensors_of
from torchjax_bridge.weights import plan

from ._argument_trees import takes
from ._built import OPTIMIZED, QUICK, as_function, weights_of, with_arrays
from ._inputs import Example, arguments_of
from ._model import Model
from ._outputs import output_pairs
from ._rules import UserRule
from ._slopes import cuts_patches, slope_along

__all__ = ["Gap", "functions_with_backward", "gradient_gap"]

_ROUNDING = 1e-3  # of the length of a gradient
_UNDECIDED = 1e-2  # where the models do not run in float64
_NEGLIGIBLE = 1e-3  # of the longest gradient: shorter ones may be zero but for rounding


@dataclass(frozen=True)
class Gap:
    """The largest difference of two gradients.

    Attributes:
        of: With respect to what.
        difference: Relative to the length of torch's; not a number where none of these is finite.
        undecided: Whether it may be rounding, of models that do not run in float64.
    """

    of: str
    difference: float
    undecided: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is rounding."""
        return self.undecided or not self.difference > _ROUNDING


def gradient_gap(
    module: nn.Module, model: Model, twin: Any, rules: Sequence[UserRule], example: Example
) -> Gap | None:
    """How far gradients with respect to the parameters and inputs are apart, in evaluation.

    Args:
        module: The torch module, in evaluation mode. Its parameters are made to require gradients.
        model: Its translation.
        twin: The port, with its weights.
        rules: What pairs the two.
        example: The inputs.

    Returns:
        The largest difference, or None where torch has no gradients.

    Raises:
        NotImplementedError: JAX has no derivative of something in the port; `ValueError` and `TypeError` likewise.

    Memory:
        Holds the intermediate tensors of one forward of either model.
    """
    found = _gap(module, model, twin, rules, example, QUICK)
    if found is not None and not found.ok:
        # Without optimization, a maximum and what it is compared with are computed differently.
        found = _gap(module, model, twin, rules, example)
    if found is None or found.ok:
        return found
    try:
        with _in_float64():
            wide = example.mapped(_widened)
            sure = _gap(copy_module(module).double(), model, _wide_twin(twin), rules, wide)
            if sure is not None and not sure.ok:
                sure = _gap(copy_module(module).double(), model, _wide_twin(twin), rules, _shaken(wide))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return replace(found, undecided=found.difference <= _UNDECIDED)
    return sure


def _shaken(example: Example) -> Example:
    """Inputs a little aside: where many are equal, each framework takes another of the largest."""
    draw = torch.Generator().manual_seed(1)

    def shake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor + 1e-3 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)

    return example.mapped(shake)


@contextmanager
def _in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        torch.set_default_dtype(before)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _wide_twin(twin: Any) -> Any:
    """The port with its floating arrays in float64."""

    def widen(leaf: Any) -> Any:
        return jnp.asarray(leaf, jnp.float64) if _is_float(leaf) else leaf

    if isinstance(twin, tuple):
        return twin[0], jax.tree.map(widen, twin[1])
    return jax.tree.map(widen, twin)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _gap(
    module: nn.Module,
    model: Model,
    twin: Any,
    rules: Sequence[UserRule],
    example: Example,
    options: dict[str, Any] = OPTIMIZED,
) -> Gap | None:
    arguments = arguments_of(model.recording, model.input_orders, example)
    draw = torch.Generator().manual_seed(0)
    weights, inputs, projections = _torch_gradients(module, model, example, draw)
    if not any(gradient is not None for gradient in (*weights.values(), *inputs)):
        return None
    moves = [  # buffers have no gradients
        move
        for move in plan(module, weights_of(twin), rules=rules).moves
        if move.layout.is_linear and all(key in weights for key in move.torch_keys)
    ]
    trained = {path for move in moves for path in move.flax_paths}
    by_path, of_inputs, slope = _flax_gradients(model, twin, arguments, projections, trained, options)
    rows: list[tuple[str, float, float]] = []  # of what, the difference, the length of torch's
    for move in moves:
        if not all(path in by_path for path in move.flax_paths):
            continue
        own = [_or_zeros(weights[key], module.get_parameter(key)) for key in move.torch_keys]
        along = [torch.randn(one.shape, generator=draw, dtype=one.dtype) for one in own]
        for key, one in zip(move.torch_keys, along, strict=True):
            padding = getattr(module.get_submodule(key.rpartition(".")[0]), "padding_idx", None)
            if padding is not None:  # which torch does not train, and a port says so
                one[padding] = 0
        want = sum(float((a * b).sum()) for a, b in zip(own, along, strict=True))
        moved = zip(move.flax_paths, move.layout.forward(along), strict=True)
        got = sum(float((by_path[path] * one).sum()) for path, one in moved)
        rows.append(
            (f"'{move.torch_keys[0]}'", abs(want - got), math.hypot(*(float(one.norm()) for one in own)))
        )
    orders = [order for value, order in model.input_orders.items() if _floats(value.dtype)]
    wanted = [
        torch.zeros_like(other) if given is None else given.permute(order)
        for given, other, order in zip(inputs, of_inputs, orders, strict=True)
    ]
    lengths = [float(one.norm()) for one in wanted]
    if slope is None:
        gaps = [float((one - other).norm()) for one, other in zip(wanted, of_inputs, strict=True)]
        rows += (("an input", gap, length) for gap, length in zip(gaps, lengths, strict=True))
    else:
        want = sum(float((one * other).sum()) for one, other in zip(wanted, of_inputs, strict=True))
        rows.append(("an input", abs(want - slope), math.hypot(*lengths)))
    least = _NEGLIGIBLE * max((length for _, _, length in rows if math.isfinite(length)), default=0.0) or 1.0
    relative = [
        (math.inf if math.isnan(difference) else difference / max(length, least), name)
        for name, difference, length in rows
        if math.isfinite(length)
    ]
    worst, name = max(relative, default=(math.nan if rows else 0.0, ""))
    return Gap(name, worst)


def _floats(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.is_floating_point


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like).detach() if gradient is None else gradient


def _torch_gradients(
    module: nn.Module, model: Model, example: Example, draw: torch.Generator
) -> tuple[dict[str, torch.Tensor | None], list[torch.Tensor | None], list[torch.Tensor]]:
    """Gradients of the parameters by name and of the inputs in order, and what projects each floating output."""
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    leaves = example.mapped(lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()))
    output = _traced(module, leaves)
    outputs = [
        tensor
        for tensor, _ in output_pairs(model.recording.top.result, output, output)
        if tensor.is_floating_point()
    ]
    projections = [torch.randn(one.shape, generator=draw, dtype=one.dtype) for one in outputs]
    traced = [(one, by) for one, by in zip(outputs, projections, strict=True) if one.requires_grad]
    named = model.recording.arguments(leaves.args, leaves.kwargs)
    used = [named[name] for name, _ in model.recording.top.inputs]
    inputs = [tensor for tensor in tensors_of(used, torch.Tensor) if tensor.is_floating_point()]
    wanted = [*parameters.values(), *inputs]
    if not traced or not wanted:
        return dict.fromkeys(parameters), [None] * len(inputs), projections
    given = torch.autograd.grad(
        [one for one, _ in traced], wanted, [by for _, by in traced], allow_unused=True
    )
    return dict(zip(parameters, given, strict=False)), list(given[len(parameters) :]), projections


def _traced(module: nn.Module, example: Example) -> Any:
    """The output with its graph. The module gets copies, since ``forward`` may write to what it is given."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        given = example.mapped(torch.Tensor.clone)
        return module(*given.args, **given.kwargs)


def _flax_gradients(
    model: Model,
    twin: Any,
    arguments: Sequence[Any],
    projections: Sequence[torch.Tensor],
    trained: Collection[tuple[Any, ...]],
    options: dict[str, Any],
) -> tuple[dict[tuple[Any, ...], torch.Tensor], list[torch.Tensor], float | None]:
    """Gradients of the trained variables by path, and of the floating inputs in order.

    Where those of the inputs cost too much: a direction of each, and the derivative along all of these.
    """
    run, variables, arrays = as_function(twin, arguments)
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    paths = [tuple(key.key for key in path if hasattr(key, "key")) for path, _ in leaves]
    places = [place for place, (_, leaf) in enumerate(leaves) if _is_float(leaf) and paths[place] in trained]
    floats = [place for place, array in enumerate(arrays) if _is_float(array)]
    orders = [place.order for place in model.bodies[""].result_places]

    def total(weights: list[Any], inputs: list[Any]) -> Any:
        every = [leaf for _, leaf in leaves]
        for place, weight in zip(places, weights, strict=True):
            every[place] = weight
        given = list(arrays)
        for place, array in zip(floats, inputs, strict=True):
            given[place] = array
        result = run(jax.tree.unflatten(structure, every), given)
        recorded = model.recording.top.result
        outputs = [
            (array, order)
            for (_, array), order in zip(output_pairs(recorded, recorded, result), orders, strict=True)
            if _is_float(array)
        ]
        return sum(
            jnp.sum(array * to_jax(by.permute(order).contiguous()).astype(array.dtype))
            for (array, order), by in zip(outputs, projections, strict=True)
        )

    given = [leaves[place][1] for place in places], [arrays[place] for place in floats]
    is_costly = bool(floats) and cuts_patches(model)
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(jax.grad(total, argnums=(0,) if is_costly else (0, 1))).lower(*given)
    weights, inputs = (*lowered.compile(compiler_options=options)(*given), [])[:2]
    slope, inputs = slope_along(total, *given, options) if is_costly else (None, inputs)
    by_path = {
        paths[place]: to_torch(gradient, copy=True) for place, gradient in zip(places, weights, strict=True)
    }
    placed = [*arrays]
    for place, gradient in zip(floats, inputs, strict=True):
        placed[place] = gradient
    recorded_inputs = [tree for _, tree in model.recording.top.inputs if takes(tree)]
    pairs = output_pairs(recorded_inputs, recorded_inputs, with_arrays(arguments, placed))
    return by_path, [to_torch(array, copy=True) for value, array in pairs if _floats(value.dtype)], slope


def functions_with_backward(module: nn.Module, example: Example) -> list[str]:
    """The names of the author's own ``autograd.Function``s that a call runs."""
    output = _traced(module, example)
    waiting = [tensor.grad_fn for tensor in tensors_of(output, torch.Tensor) if tensor.grad_fn is not None]
    found, seen = dict[str, None](), set[Any]()
    while waiting:
        made = waiting.pop()
        if made in seen:
            continue
        seen.add(made)
        kind = getattr(type(made), "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith("torch."):
            found[kind.__name__] = None
        waiting += [before for before, _ in made.next_functions if before is not None]
    return list(found)
