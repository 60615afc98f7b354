"""Whether later layers make up for the difference of a layer, so that it is no mistake.

One side may have an activation inside its norm, a scale inside its embedding, or a container that ends
elsewhere. And values that nothing reads (under a mask) may differ freely. To find out, torch runs once more
with noise as large as the difference added to the layer's output. If the noise changes something on which both
models agree, the difference was made up for. If it changes nothing (a last layer of zeros), agreement proves
nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ._compare import Bounds
from ._record import Change, Record
from ._steps import Step
from ._values import Value, gap

__all__ = ["compensation"]


def compensation(
    step: Step, steps: Sequence[Step], ours: Record, run: Callable[[Change], Record], bounds: Bounds
) -> tuple[bool, bool]:
    """Whether the readers of a differing layer agree, and whether its output reaches the models' agreeing outputs.

    Args:
        step: The call of the layer whose output differs.
        steps: All, in the order of torch's calls; the last is the model itself.
        ours: The run in torch.
        run: Runs torch again, with the output of a call changed.
        bounds: What passes for rounding.
    """
    later = steps[steps.index(step) + 1 :]
    if any(_reads(other, step) and _takes_the_same(other, bounds) for other in later):
        return True, False
    again = run(Change(ours.calls.index(step.torch), _noise(step)))
    if [call.path for call in again.calls] != [
        call.path for call in ours.calls
    ]:  # the model branches on values
        return False, False
    changed = {id(call): other for call, other in zip(ours.calls, again.calls, strict=True)}
    shown = steps[-1].output is not None and steps[-1].output.ok and _moved(ours.output, again.output, bounds)
    for other in later:
        if other.flax is not None and _moved(other.torch.inputs, changed[id(other.torch)].inputs, bounds):
            return _takes_the_same(other, bounds), shown
    return shown, shown


def _reads(other: Step, step: Step) -> bool:
    """Whether the input of a layer is the output of another."""
    return any(
        given.array.shape == gave.array.shape and np.ptp(gave.array) > 0 and np.array_equal(given.array, gave.array)
        for given in other.torch.inputs[:1]
        for gave in step.torch.outputs[:1]
        if gave.array.size and gave.array.dtype.kind == "f"
    )  # fmt: skip


def _takes_the_same(other: Step, bounds: Bounds) -> bool:
    inputs = other.inputs(bounds)
    return inputs is not None and inputs.ok


def _moved(before: Sequence[Value], after: Sequence[Value], bounds: Bounds) -> bool:
    """Whether floating arrays changed; integers chosen by them (a class) may stay the same by chance."""
    return any(
        one.array.shape != other.array.shape
        or not bounds.allow(gap(one.array, other.array), one.dtype, other.dtype)
        for one, other in zip(before, after, strict=False)
        if one.array.dtype.kind in "fc"
    )


def _noise(step: Step) -> Callable[[torch.Tensor], torch.Tensor]:
    """Noise as large as the difference, or as the output where the difference is unknown."""
    output, size = step.output, float("nan")
    if output is not None and output.ours is not None and output.ours.size:
        with np.errstate(invalid="ignore"):
            apart = np.abs(output.ours.astype(np.float64) - output.theirs.astype(np.float64))
        size = float(np.sqrt(np.mean(apart**2)))

    def add(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(tensor.shape, generator=draw).to(tensor)
        scale = size if np.isfinite(size) else float(tensor.float().square().mean().sqrt())
        return tensor + scale * noise

    return add
