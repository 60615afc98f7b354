"""The private names of torch that tracing uses, all in one place.

``torch.compile`` has been built of them for years, but they are not public, so each is probed for here.
Tracing is impossible without some (`MISSING` says which). Torch code inside JAX then needs ``output_shape=``,
and runs as Python at every order of derivative and lane by lane. Without the others, tracing works less well:
compiled functions are refused, operators without a batching rule run lane by lane, and libraries do not take
their branches for compilers.
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

    # Fake tensors raise these where a result depends on values, which they do not have.
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
    """A context in which new tensors have shape, dtype and device, and no memory.

    ``cached``: an operator that has run on such arguments before gives a result from torch's cache.
    """
    mode: Any = _fake_mode(allow_non_fake_inputs=True)
    if not cached:
        mode.cache_enabled = False
    return mode


def truthful_schemas() -> AbstractContextManager[Any]:
    """A context with Python dispatch, to operators whose schemas tell what they write (batch norm's statistics)."""
    try:
        from torch._dispatch.python import enable_python_dispatcher
    except ImportError:
        return nullcontext()
    return enable_python_dispatcher()


def through_compiled_functions() -> AbstractContextManager[Any]:
    """A context in which Dynamo lets a tracer into compiled functions. By default it raises, in its own words."""
    config: Any = getattr(torch._dynamo, "config", None)  # the first trace loads Dynamo in any case
    if hasattr(config, "error_on_nested_fx_trace"):
        return config.patch(error_on_nested_fx_trace=False)
    return nullcontext()


@contextmanager
def compiling() -> Iterator[Callable[[], None]]:
    """``torch.compiler.is_compiling()`` is true inside, as when torch traces for a compiler; if that can be set.

    Yields a function that makes it false again before the end.
    """
    before = getattr(torch.compiler, "_is_compiling_flag", None)

    def stop() -> None:
        if before is not None:
            torch.compiler._is_compiling_flag = before

    if before is not None:
        torch.compiler._is_compiling_flag = True
    try:
        yield stop
    finally:
        stop()


def outside_transforms() -> AbstractContextManager[Any]:
    """A context outside of the ``torch.func`` transforms that run in this thread."""
    try:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    except ImportError:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def decompositions(operators: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """Decompositions of those operators that torch can decompose."""
    try:
        from torch._decomp import get_decompositions
    except ImportError:
        return {}
    return dict(get_decompositions(list(operators)))


def has_batching_rule(operator: Any) -> bool:
    """Whether ``torch.func.vmap`` runs an operator on all lanes at once; True if torch does not tell."""
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    if not isinstance(operator, OpOverload) or has_kernel is None:
        return True
    return bool(has_kernel(operator.name(), "FuncTorchBatched"))
