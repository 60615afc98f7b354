"""Tracing: torch code becomes a `Graph` of plain ATen operators.

Owns the trace itself (fake tensors, under one lock, because torch's tracer is not made for several threads),
and the rewriting of in-place operators into functional ones. Knows nothing of JAX.

The tracer is ``torch.fx.experimental.proxy_tensor.make_fx``, under the ``FakeTensorMode`` that
torch.compile uses (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html).
"""

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx

from torchjax_bridge.errors import TransformError

from . import _torch_internals
from ._graph import Graph, Spec
from ._overrides import TraceOverrides
from ._torch_internals import (
    FakeTensor,
    OpOverload,
    fake_tensors,
    make_fx,
    outside_transforms,
    through_compiled_functions,
    truthful_schemas,
)
from ._unanswered import UnansweredQuestions, asks_for_values

__all__ = ["NeedsValues", "PackedWeights", "fakes", "is_fake", "trace", "tracing"]

# One trace at a time in this process. A running callback holds no lock of ours.
_LOCK = threading.RLock()

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_COPY = torch.ops.aten.copy_.default
_MKLDNN_RNN = torch.ops.aten.mkldnn_rnn_layer.default


class NeedsValues(Exception):  # noqa: N818 - a signal between files of this package, never seen by a caller
    """The code asked a fake tensor for its values; ``__cause__`` is torch's error."""


class PackedWeights(Exception):  # noqa: N818 - a signal, too
    """An operator takes packed weights (of a quantized module); the cache of fake tensors cannot compare these."""


_PACKED = "__torch__.torch.classes."


@contextmanager
def tracing(device: torch.device, cached: bool = True) -> Iterator[TraceOverrides]:
    """Take the lock, and make tensors fake: they have shape, dtype and device, and no memory.

    Yields the overrides, which tell whether they are needed at run time. ``cached``: as for `fake_tensors`.

    Raises:
        NeedsValues: The code inside asked a fake tensor for its values, also if it caught the error.
        TransformError: It called an operator that takes functions.
        PackedWeights: It called an operator on packed weights, and ``cached`` is true.
    """
    if _torch_internals.MISSING is not None:
        raise NeedsValues from _torch_internals.MISSING
    # force_eager: compiled functions run as the Python that they were compiled from.
    with (
        _LOCK,
        outside_transforms(),  # torch may be tracing a JAX function that calls this torch function
        torch.compiler.set_stance("force_eager"),
        through_compiled_functions(),
        _autograd_allowed(),
        truthful_schemas(),
        fake_tensors(cached),
        TraceOverrides() as overrides,
        UnansweredQuestions() as unanswered,
    ):
        try:
            yield overrides
        except BaseException as err:
            if not isinstance(err, Exception):
                raise
            if unanswered.first is not None:  # the error may be what the code makes of it
                raise NeedsValues from unanswered.first
            if asks_for_values(err):
                raise NeedsValues from err
            if not isinstance(err, NotImplementedError):
                raise
            if _PACKED in str(err):
                raise PackedWeights from err
            if "HigherOrderOperator" not in str(err):
                raise
            raise TransformError(
                "the torch function calls torch.cond or another operator that takes functions, which cannot be "
                "traced here. Use jax.lax.cond and the like around wrapped functions, or plain Python with "
                "output_shape=."
            ) from err
        if unanswered.first is not None:
            raise NeedsValues from unanswered.first


def _autograd_allowed() -> AbstractContextManager[Any]:
    """A context without ``inference_mode``, which would overrule ``enable_grad``; ``no_grad`` stays as it is."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def fakes(specs: Iterable[Spec], device: torch.device) -> list[torch.Tensor]:
    """An empty row-major tensor for each spec; inside `tracing`, a fake one."""
    return [torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs]


def is_fake(value: Any) -> bool:
    """Whether it is a tensor of a trace, which has no values."""
    return isinstance(value, FakeTensor)


def trace(
    fn: Callable[..., Sequence[torch.Tensor]],
    specs: Sequence[Spec],
    device: torch.device,
    table: dict[Any, Callable[..., Any]] | None = None,
) -> Graph:
    """The graph of ``fn`` on tensors like ``specs``, with every in-place operator made functional.

    ``table``: how to decompose operators.

    Raises:
        NeedsValues: Control flow or shapes depend on values.
        Whatever ``fn`` raises.
    """
    try:
        graph = _trace(fn, specs, device, table)
    except PackedWeights as err:
        raise _no_derivative() from err
    except (RuntimeError, NotImplementedError) as err:
        if "derivative for aten::_scaled_dot_product" not in str(err):
            raise
        # The fused attention kernels have a first derivative only; the plain formula has all.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            graph = _trace(fn, specs, device, table)
    if any(node.target is _MKLDNN_RNN for node in graph.nodes.nodes):
        # The trace gives its workspace a wrong shape. Without MKLDNN a recurrent layer is plain operators.
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None, fp32_precision=None):
            graph = _trace(fn, specs, device, table)
    return graph


def _trace(
    fn: Callable[..., Sequence[torch.Tensor]],
    specs: Sequence[Spec],
    device: torch.device,
    table: dict[Any, Callable[..., Any]] | None,
) -> Graph:
    with tracing(device):
        module = make_fx(lambda *tensors: list(fn(*tensors)), table)(*fakes(specs, device))
        graph = _tidy(module, device)
        if any(_mutates(node) for node in graph.nodes.nodes):
            lifted, constants = _lift_constants(graph)
            functional: Any = torch.func.functionalize(lambda *tensors: lifted(*tensors), remove="mutations")
            module = make_fx(lambda *tensors: functional(*tensors, *constants))(*fakes(specs, device))
            for node in list(module.graph.nodes):
                if node.target is _COPY and node.args[0].op in ("placeholder", "get_attr"):
                    module.graph.erase_node(node)  # an operator may write to it, but does not here
            graph = _tidy(module, device)
        return graph


def _lift_constants(graph: Graph) -> tuple[Graph, list[Any]]:
    """The graph with its constants as further inputs, and the constants; ``functionalize`` needs them as inputs."""
    closed = [node for node in graph.nodes.nodes if node.op == "get_attr"]
    fresh = fx.Graph()
    image = {node: fresh.placeholder(f"in{i}") for i, node in enumerate([*graph.inputs, *closed])}
    for node in graph.nodes.nodes:
        if node not in image:
            image[node] = fresh.node_copy(node, lambda parent: image[parent])
    return Graph(fresh, {}, graph.device), [graph.constants[str(node.target)] for node in closed]


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _no_derivative() -> TransformError:
    return TransformError(
        "the torch function calls an operator on packed weights, as a quantized module does, which has no "
        "derivative and no batching rule. Call it for its value, or differentiate and vmap the module as it was "
        "before it was quantized."
    )


def _takes_packed(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    return any(_PACKED in str(argument.type) for argument in node.target._schema.arguments)


def _tidy(module: fx.GraphModule, device: torch.device) -> Graph:
    """The graph without operators that have no effect: ``detach`` (no autograd sees the graph) and unused ones."""
    nodes = module.graph
    for node in list(nodes.nodes):  # a question for a value, which `_questions` answered
        if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()) and not node.users:
            nodes.erase_node(node)
    if any(_takes_packed(node) for node in nodes.nodes):
        raise _no_derivative()  # to autograd their results are constants
    mutable = any(_mutates(node) for node in nodes.nodes)
    if not mutable:
        for node in list(nodes.nodes):
            if node.op == "call_function" and node.target in _ALIASES:
                node.replace_all_uses_with(node.args[0])
        nodes.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    constants = {
        node.target: operator.attrgetter(node.target)(module) for node in nodes.nodes if node.op == "get_attr"
    }
    return Graph(nodes, constants, device)
