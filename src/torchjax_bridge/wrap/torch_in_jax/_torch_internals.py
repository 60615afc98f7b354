"""The names on which tracing rests and which torch does not promise: all of them, in one place.

They are those that ``torch.compile`` is built of, in use for years, and yet not public. Each is probed for
here. Without those that a trace cannot do without (`MISSING` says which), nothing is traced: torch code
inside JAX then needs ``output_shape=`` and runs as Python at every order of derivative and lane by lane.
Without the others a trace is poorer: compiled functions are refused, operators without a batching rule run
lane by lane, libraries do not take the branches that they have for compilers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = [
    "MISSING",
    "NEEDS_VALUES",
    "FakeTensor",
    "OpOverload",
    "TorchDispatchMode",
    "compiling",
    "decompositions",
    "fake_tensors",
    "has_batching_rule",
    "make_fx",
    "outside_transforms",
    "through_compiled_functions",
    "truthful_schemas",
]

OpOverload: Any = type(torch.ops.aten.sin.default)

MISSING: ImportError | None = None
NEEDS_VALUES: tuple[type[BaseException], ...] = ()
make_fx: Any = None
FakeTensor: Any = type("FakeTensor", (), {})
TorchDispatchMode: Any = type("TorchDispatchMode", (), {})
_fake_mode: Callable[..., AbstractContextManager[Any]] = nullcontext
try:
    from torch._subclasses import fake_tensor as _fake
    from torch.fx.experimental import proxy_tensor as _proxy
    from torch.utils import _python_dispatch as _dispatch

    # What fake tensors raise where the answer depends on values that they do not have.
    NEEDS_VALUES = (
        _fake.DataDependentOutputException,
        _fake.DynamicOutputShapeException,
        _fake.UnsupportedOperatorException,
    )
    make_fx, FakeTensor, _fake_mode = _proxy.make_fx, _fake.FakeTensor, _fake.FakeTensorMode
    TorchDispatchMode = _dispatch.TorchDispatchMode
except (ImportError, AttributeError) as err:
    MISSING = err if isinstance(err, ImportError) else ImportError(str(err))


def fake_tensors(cached: bool) -> AbstractContextManager[Any]:
    """Tensors made inside have shape, dtype and device, and no memory.

    ``cached``: what an operator made of such arguments before is made again without asking it.
    """
    mode: Any = _fake_mode(allow_non_fake_inputs=True)
    if not cached:
        mode.cache_enabled = False
    return mode


def truthful_schemas() -> AbstractContextManager[Any]:
    """Operators are dispatched in Python, to ones whose schemas say what they write (batch norm's statistics)."""
    try:
        from torch._dispatch.python import enable_python_dispatcher
    except ImportError:
        return nullcontext()
    return enable_python_dispatcher()


def through_compiled_functions() -> AbstractContextManager[Any]:
    """By default Dynamo refuses to be met by a tracer; where it cannot be told not to, it says so itself."""
    config: Any = getattr(torch._dynamo, "config", None)  # the first trace loads it in any case
    if hasattr(config, "error_on_nested_fx_trace"):
        return config.patch(error_on_nested_fx_trace=False)
    return nullcontext()


@contextmanager
def compiling() -> Iterator[None]:
    """``torch.compiler.is_compiling()`` is true, as when torch traces for a compiler; if that can be set."""
    before = getattr(torch.compiler, "_is_compiling_flag", None)
    if before is None:
        yield
        return
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def outside_transforms() -> AbstractContextManager[Any]:
    """The transforms of ``torch.func`` that run in this thread do not see what is made inside."""
    try:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    except ImportError:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def decompositions(operators: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """How to take operators apart, for those of them that torch can."""
    try:
        from torch._decomp import get_decompositions
    except ImportError:
        return {}
    return dict(get_decompositions(list(operators)))


def has_batching_rule(operator: Any) -> bool:
    """Whether ``torch.func.vmap`` runs an operator on all lanes at once; True where torch does not say."""
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    if not isinstance(operator, OpOverload) or has_kernel is None:
        return True
    return bool(has_kernel(operator.name(), "FuncTorchBatched"))
