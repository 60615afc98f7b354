"""Which of torch's transforms and modes are active around a call.

They decide how a call runs. torch reports most of them only through private functions, so each is probed for.
If one is missing, the answer is the cautious one, which costs time and never correctness.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

__all__ = [
    "dual_level_active",
    "functorch_active",
    "has_no_memory",
    "hidden_from_dynamo",
    "jit_tracing",
    "modes_active",
    "saving_hooks_active",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def dual_level_active() -> bool:
    """Whether a ``torch.autograd.forward_ad`` level is open."""
    level = getattr(forward_ad, "_current_level", 0)  # missing: assume an open one
    return not isinstance(level, int) or level >= 0


def saving_hooks_active() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` receive what is saved for a backward pass."""
    return _saving_hooks(True) is not None


def has_no_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory that JAX could read: a fake, meta, wrapped or subclassed one."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        return True
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def hidden_from_dynamo(function: _F) -> _F:
    """Make ``torch.compile`` run the function, and all that it calls, as plain Python.

    Inside a compiled region Dynamo reads Python also where it makes no graph: after a graph break, in a backward
    pass, past the limit of recompilations. Reading JAX's tracing machinery there breaks it. This costs nothing per
    call, while ``torch.compiler.disable`` would wrap the function, and load the compiler.
    """
    try:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):  # without the private names, Dynamo reads it like any function
        pass
    return function


def _probe(name: str, missing: Any) -> Callable[..., Any]:
    found: Any = torch._C
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if callable(found) else lambda *_: missing


functorch_active = _probe("_are_functorch_transforms_active", True)
"""Whether a ``torch.func`` transform (grad, vjp, jvp, vmap, functionalize) is running."""

modes_active = _probe("_len_torch_dispatch_stack", True)
"""Whether a ``TorchDispatchMode`` watches: fake tensors, make_fx, selective checkpointing, counters."""

jit_tracing = _probe("_get_tracing_state", None)
"""The state of ``torch.jit.trace`` if it is recording. It sees only torch's operators."""

_saving_hooks = _probe("_autograd._top_saved_tensors_default_hooks", True)
