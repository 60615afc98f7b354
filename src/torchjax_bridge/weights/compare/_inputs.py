"""The inputs of a comparison: the same for both models, with the channels where each has them."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import Path, join_path, to_jax

from .._example import require_tensors
from ._compare import Bounds
from ._copies import map_arrays, tensors_in
from ._record import Record
from ._steps import Step
from ._values import channels_in_front

Moves = Mapping[str, frozenset[int]]

# The axes of what convolutions over one, two and three axes of space take.
_IMAGES = frozenset({3, 4, 5})

__all__ = ["Moves", "check_call", "choose_layout", "to_flax_inputs", "try_other_layout", "unmoved_images"]


def check_call(name: str, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise one clear error if a model cannot be called with these arguments.

    Raises:
        ArgumentError: It cannot; or an input is an array of numpy's or JAX's.
    """
    if name == "torch":
        require_tensors(args)
    try:
        signature = inspect.signature(call)
    except ValueError:  # written in C: the call itself will raise
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as err:
        count = "1 input" if len(args) == 1 else f"{len(args)} inputs"
        raise ArgumentError(
            f"the {name} model takes {signature} and was given {count}"
            f"{' and ' + ', '.join(kwargs) if kwargs else ''}: {err}. Pass keyword arguments as "
            "torch_kwargs={...} and flax_kwargs={...}."
        ) from err


def to_flax_inputs(values: Mapping[str, Any], last: Moves, like: Any) -> dict[str, Any]:
    """Inputs by name as JAX arrays; those in ``last`` with their channels last.

    Args:
        values: Trees of tensors, and whatever else a model takes, which is passed on as it is.
        last: For each input, the ranks of the tensors that go from ``(N, C, *space)`` to ``(N, *space, C)``.
        like: A tree of arrays, on whose device the inputs are put.
    """
    tensors: dict[str, torch.Tensor] = {}  # in order; JAX would sort the keys

    def take(path: Path, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            name = join_path(path)
            while name in tensors:  # of keys such as 1 and "1"
                name += "'"
            tensors[name] = _moved(leaf.detach(), last.get(str(path[0]), frozenset()))
        return leaf

    map_arrays(dict(values), take)
    arrays = to_jax(tensors, copy=True, device=_device(like))
    names = iter(tensors)

    def give(_: Path, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return arrays[next(names)]
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    given: dict[str, Any] = map_arrays(dict(values), give)
    return given


def _moved(tensor: torch.Tensor, ranks: frozenset[int]) -> torch.Tensor:
    return tensor.movedim(1, -1) if tensor.ndim in ranks else tensor


def _device(like: Any) -> jax.Device | None:
    for leaf in jax.tree.leaves(like):
        if isinstance(leaf, jax.Array) and len(leaf.devices()) == 1:
            return next(iter(leaf.devices()))
    return None


def choose_layout(
    inputs: Mapping[str, Any],
    declared: bool | Sequence[bool] | None,
    ours: Record,
    run: Callable[[Moves], Record],
    align_steps: Callable[[Record], Sequence[Step]],
) -> tuple[Record, Moves]:
    """Find the layout of the inputs that the Flax model takes, and run it.

    torch's convolutions show which inputs are images. Other inputs go in as they are and, if the models then
    differ, with their channels last, too. The layout with which more calls agree is chosen.

    Args:
        inputs: The torch inputs by name.
        declared: What the caller said; None to find out.
        ours: The run in torch.
        run: Runs the Flax model with the channels of some inputs last.
        align_steps: Puts a run beside torch's.

    Returns:
        The run, and for each input the ranks that went in with their channels last.

    Raises:
        ArgumentError: The caller passed another number of answers than inputs.
    """
    if declared is not None:
        each = [declared] * len(inputs) if isinstance(declared, bool) else list(declared)
        if len(each) != len(inputs):
            raise ArgumentError(f"channels_last says {len(each)} things about {len(inputs)} inputs.")
        last = {name: _IMAGES if yes else frozenset[int]() for name, yes in zip(inputs, each, strict=True)}
        return run(last), last
    ranks = _IMAGES & {
        call.inputs[0].array.ndim
        for call in ours.calls
        if isinstance(call.module, nn.Module) and channels_in_front(call.module) and call.inputs
    }
    images = {name: ranks & {tensor.ndim for tensor in tensors_in(value)} for name, value in inputs.items()}
    chosen, last = run(images), images
    if any(images.values()) and (nearest := _input_gap(align_steps(chosen), chosen)) > 1e-6:
        plain = dict.fromkeys(inputs, frozenset[int]())
        other = run(plain)
        if _input_gap(align_steps(other), other) < nearest:
            chosen, last = other, plain
    steps = align_steps(chosen)
    best = _count_agreeing(steps, chosen)
    for more in _possible_images(inputs, ranks, steps) if best < len(steps) else ():
        moves = {name: last[name] | more.get(name, frozenset()) for name in inputs}
        other = run(moves)
        if (agreeing := _count_agreeing(align_steps(other), other)) > best:
            chosen, last, best = other, moves, agreeing
    return chosen, last


def _image_ranks(value: Any) -> frozenset[int]:
    """The ranks of the tensors that may be images."""
    return frozenset(t.ndim for t in tensors_in(value) if t.ndim in _IMAGES and t.shape[1] > 1)


def _possible_images(
    inputs: Mapping[str, Any], ranks: frozenset[int], steps: Sequence[Step]
) -> Iterator[Moves]:
    """The inputs that may be images though no layer shows it: all together, then each alone.

    An input of three axes is more often tokens; it is no image if some layer was given the same in both models.
    """
    known = any(
        step.torch.path
        and (inside := step.inputs(Bounds())) is not None
        and inside.ok
        and inside.theirs.dtype.kind == "f"
        for step in steps
    )
    kinds = _IMAGES - ranks - (frozenset({3}) if known else frozenset())
    found = {name: there for name, value in inputs.items() if (there := _image_ranks(value) & kinds)}
    if found:
        yield found
    if len(found) > 1:
        yield from ({name: there} for name, there in found.items())


def _count_agreeing(steps: Sequence[Step], record: Record) -> int:
    """How many calls agree before the first that does not."""
    for place, step in enumerate(steps):
        if not step.output.ok if step.output is not None else record.error is not None:
            return place
    return len(steps)


def unmoved_images(
    inputs: Mapping[str, Any], modules: Iterable[nn.Module], last: Moves, *, agree: bool
) -> Iterator[str]:
    """Notes on inputs that may be images, for a model in which no layer shows it."""
    if any(map(channels_in_front, modules)):
        return
    for name, value in inputs.items():
        for leaf in tensors_in(value):
            if leaf.ndim == 4 and leaf.shape[1] > 1 and leaf.ndim not in last[name]:
                went = f"{name} {tuple(leaf.shape)} went into Flax as it is"
                if agree:
                    yield f"{went}: pass channels_last=True if the Flax model takes images with their channels last"
                else:
                    yield f"{went}; with its channels last (channels_last=True) no more calls agree"


def try_other_layout(
    inputs: Mapping[str, Any],
    last: Moves,
    found: tuple[Record, Sequence[Step]],
    run: Callable[[Moves], Record],
    align_steps: Callable[[Record], Sequence[Step]],
) -> tuple[str, bool, bool] | None:
    """Run with the channels where the caller did not say, to see whether more calls agree.

    Returns:
        How the inputs went in, as text; what ``channels_last`` should be; whether every call agrees then. None
        if no more calls agree.
    """
    images = {name: ranks for name, value in inputs.items() if (ranks := _image_ranks(value))}
    if not images:
        return None
    moved = any(last[name] & ranks for name, ranks in images.items())
    again = run({name: frozenset[int]() if moved else images.get(name, frozenset()) for name in inputs})
    steps = align_steps(again)
    agreeing = _count_agreeing(steps, again)
    if agreeing <= _count_agreeing(found[1], found[0]):
        return None
    went = f"{', '.join(images)} went into Flax {'with channels last' if moved else 'as torch has it'}"
    return went, not moved, agreeing == len(steps)


def _input_gap(steps: Sequence[Step], record: Record) -> float:
    """How far the input of the first layer with channels is from torch's."""
    for step in steps:
        if channels_in_front(step.module) and step.flax is not None:
            inputs = step.inputs(Bounds())
            if inputs is not None and len(inputs.shapes[0]) > 2:
                return inputs.gap.relative
    return float("inf") if record.error is not None else 0.0
