"""What a run of a model is: its calls, in order. And a run of a torch model, recorded by forward hooks.

Keeps copies of the inputs and outputs of the layers that it watches. Leaves the caller's modules as they were,
also when the model raises: hooks are removed; tensors, attributes, random states and flags are restored. The
model is given copies of the inputs, since it may write to them. Compares nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.errors
import flax.linen
import torch
from torch import nn

from torchjax_bridge.exchange import Path

from ..settings import FlaxLayer
from ._copies import map_arrays, own_copies
from ._torch_state import as_it_was
from ._values import Value, values_in

__all__ = ["MODEL_ERRORS", "Call", "Change", "Record", "record_torch"]

# What a model raises on inputs that it cannot take.
MODEL_ERRORS = (TypeError, ValueError, AttributeError, LookupError, flax.errors.FlaxError)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module.

    Attributes:
        path: The path of the module: torch's, or Flax's.
        inputs: The arrays among its arguments, in order.
        outputs: The arrays it returned, in order; none where it raised.
        arguments: ``(args, kwargs)`` with numpy arrays in the places of arrays (Flax only).
        module: The torch module; for linen a copy of the module, for nnx None.
    """

    path: Path
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    arguments: Any = None
    module: Any = None


@dataclass
class Record:
    """One run.

    Attributes:
        calls: Every call that was watched, in the order in which they ended.
        output: The arrays that the model returned.
        state: Buffers or collections that the run changed, as they were after it.
        layers: The settings of the Flax modules that were called (linen).
        error: What the model raised.
    """

    calls: list[Call] = field(default_factory=list)
    output: tuple[Value, ...] = ()
    state: Mapping[Any, Any] = field(default_factory=dict)
    layers: dict[Path, FlaxLayer] = field(default_factory=dict)
    error: BaseException | None = None


class Change(NamedTuple):
    """A change of the output of one call, for an experiment; ``call`` is its index in the record."""

    call: int
    tensor: Callable[[torch.Tensor], torch.Tensor]


# --- torch -------------------------------------------------------------------------------------------


def record_torch(
    root: nn.Module,
    watched: Iterable[tuple[Path, nn.Module]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    change: Change | None = None,
) -> Record:
    """Run a torch model in its present mode, without gradients; with one output changed if asked."""
    record = Record()
    given: dict[
        nn.Module, list[tuple[Value, ...]]
    ] = {}  # by module: a module that raises leaves an entry behind
    paths: dict[nn.Module, Path] = {}
    for path, module in watched:
        paths.setdefault(module, path)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.setdefault(module, []).append(
            values_in((args, kwargs))
        )  # now: the layer may write to its input

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if change is not None and change.call == len(record.calls):
            output = map_arrays(output, lambda _, leaf: change.tensor(leaf))
        record.calls.append(Call(paths[module], given[module].pop(), values_in(output), module=module))
        return output

    with ExitStack() as stack:
        stack.enter_context(as_it_was(root))
        stack.enter_context(_exact(root))
        stack.enter_context(torch.no_grad())
        for module in paths:
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        own_args, own_kwargs = own_copies((args, dict(kwargs)))
        record.output = values_in(root(*own_args, **own_kwargs))
        record.state = {
            (module, name): values_in(buffer)[0]
            for module in paths
            for name, buffer in module.named_buffers(recurse=False)
            if buffer is not None and not buffer.is_meta
        }
    return record


@contextmanager
def _exact(root: nn.Module) -> Iterator[None]:
    """Run every layer by itself, with exact products; put the flags of torch back afterwards."""
    cuda = any(p.device.type == "cuda" for p in root.parameters())
    owners: list[Any] = [torch.backends.cuda.matmul]
    owners += [getattr(torch.backends.cudnn, name, None) for name in ("conv", "rnn")]
    with ExitStack() as stack:
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # it fuses layers and bypasses their hooks
        for owner in owners if cuda else ():
            if (precision := getattr(owner, "fp32_precision", None)) is not None:
                stack.callback(setattr, owner, "fp32_precision", precision)
                owner.fp32_precision = "ieee"
        yield
