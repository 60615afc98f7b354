"""Torch code becomes a graph of plain ATen operators, which runs without any transform state.

Owns tracing (fake tensors, under one lock: torch's tracer is not made for several threads), the making
functional of in-place code, the cutting of one graph out of another, and the straight-line Python function
that runs a graph. Such a function needs no autograd, no ``torch.func`` level and no user code, so it is
safe from many threads at once. Knows nothing of JAX.

The tracer is ``torch.fx.experimental.proxy_tensor.make_fx``, under the ``FakeTensorMode`` that
torch.compile uses (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html).
"""

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchjax_bridge.errors import TransformError

from . import _torch_internals as _jax_torch
from ._code import Run, straight_line, without_grad
from ._stand_ins import StandIns
from ._torch_internals import (
    NEEDS_VALUES,
    FakeTensor,
    OpOverload,
    fake_tensors,
    make_fx,
    outside_transforms,
    through_compiled_functions,
    truthful_schemas,
)

__all__ = ["Graph", "NeedsValues", "PackedWeights", "Spec", "fakes", "is_fake", "is_view", "trace", "tracing"]

# One trace at a time in this process, and never while a lock of ours is held by a running callback.
_LOCK = threading.RLock()

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_STRIDED = (
    torch.ops.aten.as_strided.default,
    torch.ops.aten.as_strided_copy.default,
    torch.ops.aten.as_strided_scatter.default,
)
_COPY = torch.ops.aten.copy_.default
_MKLDNN_RNN = torch.ops.aten.mkldnn_rnn_layer.default


class NeedsValues(Exception):  # noqa: N818 - a signal between files of this room, never seen by a caller
    """Fake execution could not know; ``__cause__`` says why."""


class PackedWeights(Exception):  # noqa: N818 - a signal, too
    """An operator on packed weights, as of a quantized module, which the cache of fake tensors cannot compare."""


_PACKED = "__torch__.torch.classes."


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and torch dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Spec":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def differentiable(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex


class Graph:
    """A function from a list of tensors to a list of tensors, as ATen operators.

    Attributes:
        nodes: The ``fx.Graph``; its placeholders are the inputs in order.
        constants: The tensors it closes over, by the target of their ``get_attr`` node.
        device: Where it was traced.
    """

    def __init__(self, nodes: fx.Graph, constants: dict[str, Any], device: torch.device) -> None:
        self.nodes = nodes
        self.constants = constants
        self.device = device
        self._compiled: dict[torch.device, Run] = {}

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.nodes.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[fx.Node]:
        return list(self.nodes.output_node().args[0])  # type: ignore[arg-type]

    def specs(self) -> list[Spec]:
        """Shape and dtype of every output."""
        return [Spec.of(node.meta["val"]) for node in self.outputs]

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run it as it is, on the device it was traced on; autograd sees the operators."""
        return self._function(self.device)(*tensors)

    def on(self, device: torch.device) -> Run:
        """The function that runs the graph on ``device`` and leaves no autograd graph behind."""
        run = self._function(device)
        if any(isinstance(v, torch.Tensor) and v.requires_grad for v in self.constants.values()):
            return without_grad(run)
        return run

    def _function(self, device: torch.device) -> Run:
        run = self._compiled.get(device)
        if run is None:
            run = straight_line(self.nodes, self.constants, self.device, device)
            self._compiled[device] = run
        return run

    @property
    def looks_at_strides(self) -> bool:
        """Whether some operator sees memory by strides, so that its operands must be strided as in the trace."""
        return any(node.target in _STRIDED for node in self.nodes.nodes)

    def reachable(self, sources: Iterable[fx.Node]) -> set[fx.Node]:
        """``sources`` and every node computed from one of them."""
        found = set(sources)
        for node in self.nodes.nodes:
            if any(parent in found for parent in node.all_input_nodes):
                found.add(node)
        return found

    def cut(self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> "Graph":
        """The graph that computes ``outputs`` from ``inputs`` (any nodes of this graph)."""
        inside = set(inputs)
        needed: set[fx.Node] = set()
        stack = [node for node in outputs if node not in inside]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(parent for parent in node.all_input_nodes if parent not in inside)
        fresh = fx.Graph()
        image: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(inputs):
            image[node] = fresh.placeholder(f"arg{i}")
            image[node].meta = dict(node.meta)
        for node in self.nodes.nodes:
            if node in needed:
                image[node] = fresh.node_copy(node, lambda parent: image[parent])
        fresh.output([image[node] for node in outputs])
        return Graph(fresh, self.constants, self.device)


@contextmanager
def tracing(device: torch.device, cached: bool = True) -> Iterator[StandIns]:
    """Under the lock, tensors are fake: they have shape, dtype and device, and no memory.

    Yields what stands in for some functions, and says whether it mattered. ``cached``: as for fake tensors.

    Raises:
        NeedsValues: The code inside asked a fake tensor for its values.
        TransformError: It called an operator that takes functions.
        PackedWeights: It called an operator on packed weights, and ``cached`` is true.
    """
    if _jax_torch.MISSING is not None:
        raise NeedsValues from _jax_torch.MISSING
    # Compiled functions run as the Python that they were compiled from.
    with (
        _LOCK,
        outside_transforms(),  # a JAX function that calls torch may itself be called from torch, and traced there
        torch.compiler.set_stance("force_eager"),
        through_compiled_functions(),
        _autograd_allowed(),
        truthful_schemas(),
        fake_tensors(cached),
        StandIns() as stand_ins,
    ):
        try:
            yield stand_ins
        except NEEDS_VALUES as err:
            raise NeedsValues from err
        except NotImplementedError as err:
            if _PACKED in str(err):
                raise PackedWeights from err
            if "HigherOrderOperator" not in str(err):
                raise
            raise TransformError(
                "the torch function calls torch.cond or another operator that takes functions, which cannot be "
                "traced here. Use jax.lax.cond and the like around wrapped functions, or plain Python with "
                "output_shape=."
            ) from err
        except RuntimeError as err:
            if ".numpy() is not supported for tensor subclasses" in str(err):
                raise NeedsValues from err
            raise


def _autograd_allowed() -> AbstractContextManager[Any]:
    """Under ``inference_mode`` there is no autograd whatever ``enable_grad`` says; ``no_grad`` stays as it is."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def fakes(specs: Iterable[Spec], device: torch.device) -> list[torch.Tensor]:
    """One empty row-major tensor a spec; fake ones inside `tracing`."""
    return [torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs]


def is_fake(value: Any) -> bool:
    """Whether it is a tensor of a trace, without values."""
    return isinstance(value, FakeTensor)


def trace(
    fn: Callable[..., Sequence[torch.Tensor]],
    specs: Sequence[Spec],
    device: torch.device,
    table: dict[Any, Callable[..., Any]] | None = None,
) -> Graph:
    """The graph of ``fn`` on tensors like ``specs``; every in-place operator made functional.

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
        # The fused attention kernels have one derivative; the plain formula has all.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            graph = _trace(fn, specs, device, table)
    if any(node.target is _MKLDNN_RNN for node in graph.nodes.nodes):
        # The trace gives its workspace no true shape; without it a recurrent layer is made of plain operators.
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
            opened, closed_over = _opened(graph)
            functional: Any = torch.func.functionalize(lambda *tensors: opened(*tensors), remove="mutations")
            module = make_fx(lambda *tensors: functional(*tensors, *closed_over))(*fakes(specs, device))
            for node in list(module.graph.nodes):
                if node.target is _COPY and node.args[0].op in ("placeholder", "get_attr"):
                    module.graph.erase_node(node)  # what an operator may write to, and here does not
            graph = _tidy(module, device)
        return graph


def _opened(graph: Graph) -> tuple[Graph, list[Any]]:
    """The graph with what it closes over as further inputs: ``functionalize`` takes no in-place code without."""
    closed = [node for node in graph.nodes.nodes if node.op == "get_attr"]
    fresh = fx.Graph()
    image = {node: fresh.placeholder(f"in{i}") for i, node in enumerate([*graph.inputs, *closed])}
    for node in graph.nodes.nodes:
        if node not in image:
            image[node] = fresh.node_copy(node, lambda parent: image[parent])
    return Graph(fresh, {}, graph.device), [graph.constants[str(node.target)] for node in closed]


def is_view(node: fx.Node) -> bool:
    """Whether the node only looks at the memory of its inputs in another way."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


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
    """Drop what has no effect: detach (there is no autograd below) and unused operators."""
    nodes = module.graph
    for node in list(nodes.nodes):  # a question for a value, which was answered without this operator
        if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()) and not node.users:
            nodes.erase_node(node)
    if any(_takes_packed(node) for node in nodes.nodes):
        raise _no_derivative()  # autograd does not see these, and takes their result for a constant
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
