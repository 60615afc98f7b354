"""A graph of plain ATen operators, which runs without any transform state.

Owns shapes and dtypes (`Spec`), and the graph itself: cutting one graph out of another, and running it as a
straight-line Python function. That function needs no autograd, no ``torch.func`` level and no user code, so
many threads may run it at once. How torch code becomes a graph is in ``_trace``. Knows nothing of JAX.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ._code import Run, straight_line, without_grad
from ._torch_internals import OpOverload

__all__ = ["Graph", "Spec", "is_view"]

_STRIDED = (
    torch.ops.aten.as_strided.default,
    torch.ops.aten.as_strided_copy.default,
    torch.ops.aten.as_strided_scatter.default,
)


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
        device: The device on which it was traced.
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
        """Run it on the device on which it was traced; autograd sees the operators."""
        return self._function(self.device)(*tensors)

    def on(self, device: torch.device) -> Run:
        """The function that runs the graph on ``device``, without an autograd graph."""
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
    def reads_strides(self) -> bool:
        """Whether some operator reads memory by strides, so that its operands need the strides of the trace."""
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
        copy = fx.Graph()
        image: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(inputs):
            image[node] = copy.placeholder(f"arg{i}")
            image[node].meta = dict(node.meta)
        for node in self.nodes.nodes:
            if node in needed:
                image[node] = copy.node_copy(node, lambda parent: image[parent])
        copy.output([image[node] for node in outputs])
        return Graph(copy, self.constants, self.device)


def is_view(node: fx.Node) -> bool:
    """Whether the result of the node is a view of its inputs."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
