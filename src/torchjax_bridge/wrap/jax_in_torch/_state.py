"""Which of torch's transforms and modes are active around a call.

They decide which road a call takes, and torch tells of most of them only through private functions. Each is
probed for; where one is missing, the answer is the cautious one, which costs time and never correctness.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

__all__ = [
    "dual_level_active",
    "functorch_active",
    "jit_tracing",
    "lies_elsewhere",
    "modes_active",
    "saving_hooks_active",
    "unseen",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def dual_level_active() -> bool:
    """Whether a ``torch.autograd.forward_ad`` level is open."""
    level = getattr(forward_ad, "_current_level", 0)  # missing: take one to be open
    return not isinstance(level, int) or level >= 0


def saving_hooks_active() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` take what is saved for a backward pass."""
    return _saving_hooks(True) is not None


def lies_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a stand-in for others (fake, meta, wrapped, a subclass), with no memory to lend."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        return True
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def unseen(function: _F) -> _F:
    """Have ``torch.compile`` run the function, and all that it calls, as they are.

    Inside a compiled region Python runs under Dynamo's eye also where no graph is made: after a graph break, in
    a backward pass, past the limit of recompilations. Reading JAX's tracing machinery there, it breaks it. Costs
    nothing in a call; ``torch.compiler.disable`` would wrap the function, and load the compiler.
    """
    try:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):  # private names, gone: it is read, as any other function
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
"""The state of ``torch.jit.trace`` if it is recording, which sees operators of torch's and no others."""

_saving_hooks = _probe("_autograd._top_saved_tensors_default_hooks", True)
