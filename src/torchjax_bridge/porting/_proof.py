"""The proof of a port: torch and Flax give the same, also with other weights and another batch size.

Weights are perturbed because a zero head or a layer scale of 1e-6 makes any port look right.
"""

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from flax.errors import ScopeParamShapeError
from torch import nn

from torchjax_bridge.errors import BridgeError, PortError
from torchjax_bridge.exchange import to_torch
from torchjax_bridge.recording import copy_module, without_fast_path
from torchjax_bridge.weights import Parity, parity

from ._argument_trees import takes
from ._built import as_constructed, filled, result_of
from ._gradients import functions_with_backward, gradient_gap
from ._inputs import Example, arguments_of
from ._model import Model
from ._outputs import output_arrays
from ._parts import Replacement
from ._placed import Axes
from ._reserved import argument_name
from ._rules import UserRule

__all__ = ["Proof", "holds_for", "prove"]

_TOLERANCE = 1e-5  # of the largest output, for float32
_MOST_ROUNDING = 1e-2  # a larger difference is none of float32's, whatever the comparison of layers says
_OTHER_SIZES = 1e-3  # a size that is baked in makes another result, and larger sums round more


@dataclass(frozen=True)
class Check:
    """One comparison of outputs.

    Attributes:
        what: With which weights and batch size.
        difference: The largest difference, relative to the largest output of torch; not a number where torch gives
            no finite one, so that nothing could be compared.
    """

    what: str
    difference: float


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        parity: Layer by layer, on the example.
        checks: The outputs, on the example and with perturbed weights and another batch size.
        gradients: The largest difference of a gradient of a projection of the outputs with respect to a parameter
            or an input, relative to the length of torch's, with perturbed weights; or why there is none.
    """

    parity: Parity | None
    checks: tuple[Check, ...]
    gradients: float | str

    def __str__(self) -> str:
        rows = [
            f"{check.what}: "
            + ("torch gives no finite number" if math.isnan(gap) else f"{gap:.1e} of the largest output")
            for check in self.checks
            for gap in [check.difference]
        ]
        known = isinstance(self.gradients, float)
        rows.append(f"gradients: {f'{self.gradients:.1e} of their length' if known else self.gradients}")
        return "\n".join(rows)


def prove(
    module: nn.Module,
    model: Model,
    twin: Any,
    rules: Sequence[UserRule],
    example: Example,
    other: Example | None,
) -> Proof:
    """Compare a port with its torch module, in evaluation.

    Args:
        module: The torch module.
        model: Its translation, which knows how inputs and outputs are laid out.
        twin: The port, with the weights.
        rules: What pairs the two.
        example: The example inputs.
        other: The same with another batch size, or None.

    Raises:
        PortError: They differ; the message names the first layer.
    """
    module = _evaluating(module)
    found = [Check("the example", _difference(module, model, twin, example))]
    if math.isnan(found[0].difference):
        raise PortError(
            f"{type(module).__name__} gives no finite number for the example, so there is nothing to compare. Pass "
            "weights and inputs for which it does; verify=False returns the port all the same."
        )
    _require(found[-1], module, twin, rules, model, example)
    perturbed = _perturbed(module)
    other_twin = filled(perturbed, as_constructed(twin), rules)
    used = other or example
    size = f" and a batch of {used.batch}" if other is not None else ""
    found.append(Check(f"perturbed weights{size}", _difference(perturbed, model, other_twin, used)))
    _require(found[-1], perturbed, other_twin, rules, model, used)
    if math.isnan(found[-1].difference):  # of a logarithm of a weight, say
        perturbed, other_twin = copy_module(module), twin
    return Proof(None, tuple(found), _require_gradients(perturbed, model, other_twin, rules, used))


def holds_for(module: nn.Module, model: Model, twin: Any, example: Example) -> bool:
    """Whether a port gives what torch gives, in evaluation, for inputs that need not fit it."""
    try:
        return not _difference(_evaluating(module), model, twin, example) > _OTHER_SIZES
    except (TypeError, ValueError, ScopeParamShapeError):  # shapes that do not fit
        return False


def _evaluating(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares the parameters: ``forward`` may leave something in its module."""
    return copy_module(module, share=True).train().eval()


def _require(
    check: Check,
    module: nn.Module,
    twin: Any,
    rules: Sequence[UserRule],
    model: Model,
    example: Example,
) -> None:
    if check.difference <= _TOLERANCE or math.isnan(check.difference):
        return
    report: Parity | None = None
    with contextlib.suppress(BridgeError):  # then only the outputs are known to differ
        report = layer_by_layer(module, twin, rules, model, example)
    if report is not None and report.ok and check.difference <= _MOST_ROUNDING:
        return  # decided in float64: rounding
    first = report.first if report is not None else None
    where = (
        f" The first layer that differs is '{first.torch_path}' ({first.layer})." if first is not None else ""
    )
    raise PortError(
        f"The port of {type(module).__name__} differs from torch by {check.difference:.1e} of the largest output, "
        f"with {check.what}.{where} {_blame(model)}"
    )


def _blame(model: Model) -> str:
    replaced = any(isinstance(part, Replacement) for part in model.parts.values())
    own = [name for name, given in (("ops=", model.functions), ("modules=", replaced)) if given]
    of = " or ".join(["the port", *(f"what {name} gives" for name in own)])
    return f"This is a mistake of {of}; verify=False returns it all the same."


def _require_gradients(
    module: nn.Module, model: Model, twin: Any, rules: Sequence[UserRule], example: Example
) -> float | str:
    module.train().eval()  # what was kept in evaluation, without gradients, is dropped
    try:
        gap = gradient_gap(module, model, twin, rules, example)
    except RuntimeError as err:
        return f"torch has none ({str(err).partition(chr(10))[0]})"
    except (NotImplementedError, TypeError, ValueError) as err:
        return f"JAX has none ({str(err).partition(chr(10))[0]})"
    if gap is None:
        return "torch has none"
    if math.isnan(gap.difference):
        return "torch has none that is finite"
    if gap.ok:
        return gap.difference
    reason = _blame(model)
    if own := functions_with_backward(module, example):
        reason = (
            f"forward calls {', '.join(own)}, whose backward is written by hand, and the port has the derivative "
            "of its forward. Write it with detach(), as in x + (f(x) - x).detach(), or keep the module in torch "
            "with keep=; verify=False returns the port all the same."
        )
    raise PortError(
        f"The port of {type(module).__name__} has another gradient than torch, with respect to {gap.of}: it "
        f"differs by {gap.difference:.1e} of its length. {reason}"
    )


def layer_by_layer(
    module: nn.Module, twin: Any, rules: Sequence[UserRule], model: Model, example: Example
) -> Parity:
    """The comparison of every layer."""
    top = model.recording.top
    names = [name for name, tree in top.inputs if takes(tree)]
    given = dict(zip(names, arguments_of(model.recording, model.input_orders, example), strict=True))
    positional = [name for name in names if name not in example.kwargs]
    by_name = {argument_name(name): array for name, array in given.items() if name not in positional}
    return parity(
        module, twin, *example.args, rules=rules, torch_kwargs=dict(example.kwargs), flax_kwargs=by_name
    )


def _difference(module: nn.Module, model: Model, twin: Any, example: Example) -> float:
    """The largest difference of all outputs, relative to the largest element of each.

    Not a number where none of torch's is finite.
    """
    arguments = arguments_of(model.recording, model.input_orders, example)
    args, kwargs = copy.deepcopy((example.args, dict(example.kwargs)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_fast_path():
        expected = module(*args, **kwargs)
    recorded = model.recording.top.result
    with jax.default_matmul_precision("highest"):
        got = result_of(twin, arguments, lambda result: output_arrays(recorded, result))
    wanted = output_arrays(recorded, expected)
    places = model.bodies[""].result_places
    differences = [
        _relative(want, have, place.order) for want, have, place in zip(wanted, got, places, strict=True)
    ]
    floats = [want for want in wanted if want.is_floating_point() and want.numel()]
    if floats and not any(want.isfinite().any() for want in floats) and math.isfinite(max(differences)):
        return math.nan
    return max(differences, default=0.0)


def _relative(want: torch.Tensor, have: jax.Array, order: Axes) -> float:
    wide = torch.complex128 if want.is_complex() else torch.float64
    expected = want.detach().permute(order).to(wide).numpy()
    got = np.asarray(to_torch(have, copy=True).to(wide))
    if expected.shape != got.shape:
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True) or np.any(
        ~np.isfinite(got[finite])
    ):
        return float("inf")
    largest = float(np.max(np.abs(expected[finite]), initial=0.0))
    return float(np.max(np.abs(expected[finite] - got[finite]), initial=0.0)) / (largest or 1.0)


def _perturbed(module: nn.Module) -> nn.Module:
    """A copy whose weights are none of them negligible, and whose statistics differ from channel to channel."""
    clone = copy_module(module)
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    with torch.no_grad():
        for parameter in clone.parameters():
            if parameter.is_floating_point():
                spread = float(parameter.std(correction=0)) if parameter.numel() else 0.0
                least = 0.02 if parameter.dim() > 1 else 0.1
                parameter.add_(noise(parameter) * (0.1 * spread if spread > 1e-3 else least))
        for name, buffer in clone.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * noise(buffer)
            elif name.endswith("running_var"):
                buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
    return clone.train().train(module.training)  # what was computed from weights for evaluation is dropped
