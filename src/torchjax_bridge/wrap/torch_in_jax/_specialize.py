"""What a torch function does for one call signature: learned once, from a run on fake tensors.

Owns the choice between tracing and running as Python, and the wrappers that make of user code a pure function
of tensors and noise. ``_inspect`` finds out what the code does; ``_questions`` answers it where it asks for
values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch

from torchjax_bridge.errors import OutputError

from .._call import CallStructure
from ._ambient import Ambient, under_autocast
from ._code import without_grad
from ._encoding import Encoding
from ._graph import Spec
from ._inspect import Inspection, flatten_output, inspect_call
from ._ops import Apply
from ._output_shape import announced_outputs, check_announced, not_announced
from ._overrides import RuntimeOverrides
from ._program import TorchProgram
from ._questions import answer_questions
from ._random import Replay, forbid_draws
from ._samplers import Draw
from ._trace import NeedsValues

__all__ = ["Specialization", "Specializer"]


@dataclass(frozen=True)
class Specialization:
    """A torch function for one call signature."""

    apply: Apply
    out_treedef: Any
    draws: tuple[Draw, ...]
    """The noise that `apply` takes after the arguments."""


class Specializer:
    """Specializes one torch function to call signatures."""

    def __init__(self, fn: Callable[..., Any], output_shape: Any, save: bool) -> None:
        self.fn = fn
        self.output_shape = output_shape
        self.save = save
        self.ambient = Ambient(fn)

    def specialize(
        self, structure: CallStructure, specs: tuple[Spec, ...], device: torch.device, has_noise: bool
    ) -> Specialization:
        """Learn what the function does.

        Args:
            structure: How the arguments nest, with the static ones.
            specs: The shape and dtype of each array.
            device: Where torch runs.
            has_noise: Whether the call has a key, so that it may draw random numbers.
        """
        self.ambient.refuse_sharded()
        modes = self.ambient.modes()
        call = _with_index_note(_on_leaves(self.fn, structure, len(specs)), specs)
        call = under_autocast(call, device.type)
        traced = call  # runs in traces; `call` runs for the value alone
        traceable = True

        def inspect(call: Callable[..., Any]) -> Inspection:
            return inspect_call(call, specs, device, has_noise)

        try:
            found = inspect(call)
        except NeedsValues as err:
            answered = answer_questions(call, inspect)
            if answered is not None:
                traced, found = answered
            else:
                found = self._announced(structure, specs, err)
                traceable = False
                traced = call = _forbidding_draws(call)
        if traceable and self.output_shape is not None:
            check_announced(self.output_shape, found, structure, specs)
        if found.needs_overrides:
            call, traced = _with_overrides(call), _with_overrides(traced)
        encode = Encoding.of_output if traceable else Encoding.of_announced
        names = _output_names(found.treedef)
        outs = [encode(spec, name) for spec, name in zip(found.outs, names, strict=True)]
        program = TorchProgram(
            _pure(traced, found, len(specs)),
            (*specs, *(draw.spec for draw in found.draws)),
            found.outs,
            device,
            traceable=traceable,
            save=self.save,
        )
        no_grad = traceable and found.records_grad and _runs_without_grad(traced, specs, device, found)
        python = None
        if not found.draws:
            # The code may switch a module itself, and has just done so in the trace.
            python = self.ambient.guarded(_as_python(call, found, no_grad), modes, self.ambient.modes())
        return Specialization(Apply(program, outs, python), found.treedef, found.draws)

    def _announced(self, structure: CallStructure, specs: tuple[Spec, ...], why: NeedsValues) -> Inspection:
        if self.output_shape is None:
            raise not_announced(why) from why.__cause__
        outs, treedef = announced_outputs(self.output_shape, structure, specs)
        # What cannot be inspected is taken to edit or keep every input.
        return Inspection(treedef, outs, frozenset(range(len(specs))), (), True, True)


def _on_leaves(fn: Callable[..., Any], structure: CallStructure, count: int) -> Callable[..., Any]:
    """``fn`` as a function of the dynamic leaves of its call."""
    if not structure.static and structure.treedef == jax.tree_util.tree_structure((tuple(range(count)), {})):
        return fn  # each argument is a leaf

    def call(*tensors: torch.Tensor) -> Any:
        args, kwargs = structure.unflatten(tensors)
        return fn(*args, **kwargs)

    return call


def _forbidding_draws(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, which raises if it draws random numbers."""

    def guarded(*tensors: torch.Tensor) -> Any:
        with forbid_draws():
            return call(*tensors)

    return guarded


def _with_overrides(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call under the overrides that its trace needed."""

    def run(*tensors: torch.Tensor) -> Any:
        with RuntimeOverrides():
            return call(*tensors)

    return run


def _with_index_note(call: Callable[..., Any], specs: tuple[Spec, ...]) -> Callable[..., Any]:
    """The call, with a note on errors about 32-bit indices that says what to write."""
    if not any(spec.dtype is torch.int32 for spec in specs):
        return call

    def noting(*tensors: torch.Tensor) -> Any:
        try:
            return call(*tensors)
        except (RuntimeError, IndexError) as err:
            if "Long" in str(err) or "int64" in str(err):
                err.add_note("JAX passed 32-bit integers; write tensor.long() in the torch code.")
            raise

    return noting


def _pure(call: Callable[..., Any], found: Inspection, count: int) -> Callable[..., Sequence[torch.Tensor]]:
    """The call as a function of tensors and noise that does not write to its inputs."""

    def pure(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        given = [x.clone() if i in found.copied else x for i, x in enumerate(tensors[:count])]
        if found.draws:
            with Replay(tensors[count:]):
                return flatten_output(call(*given))[0]
        return flatten_output(call(*given))[0]

    return pure


def _runs_without_grad(
    call: Callable[..., Any], specs: tuple[Spec, ...], device: torch.device, found: Inspection
) -> bool:
    """Whether a call that closes over parameters needs no autograd graph: it does not differentiate inside."""
    try:
        with torch.no_grad():
            again = inspect_call(call, specs, device, draws_allowed=False)
    except (RuntimeError, NeedsValues):
        return False
    return again.outs == found.outs and again.treedef == found.treedef


def _as_python(
    call: Callable[..., Any], found: Inspection, no_grad: bool
) -> Callable[..., Sequence[torch.Tensor]]:
    """The call as it runs for its value alone. ``no_grad``: it builds no autograd graph."""

    def run(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if found.copied:
            tensors = tuple(x.clone() if i in found.copied else x for i, x in enumerate(tensors))
        leaves, treedef = flatten_output(call(*tensors))
        if treedef is not found.treedef and treedef != found.treedef:
            raise OutputError(
                f"the output of the torch function was announced as {found.treedef} and is {treedef}. Correct "
                "output_shape=, or return the same structure in every call."
            )
        return leaves

    return without_grad(run) if no_grad else run


def _output_names(treedef: Any) -> list[str]:
    if treedef.num_leaves == 1 and treedef == jax.tree_util.tree_structure(0):
        return ["the output"]
    numbered = jax.tree_util.tree_unflatten(treedef, range(treedef.num_leaves))
    paths = jax.tree_util.tree_flatten_with_path(numbered)[0]
    return [f"output{jax.tree_util.keystr(path)}" for path, _ in paths]
