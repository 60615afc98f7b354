"""The straight-line Python function that runs a graph of ATen operators.

Owns the source of that function. Strides may differ from those of the trace: a residual that crossed to JAX
is row-major, and a batched tensor has one more axis. So views become reshapes, and fused attention gets dense
rows. Knows nothing of tracing.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["Run", "straight_line", "without_grad"]

Run = Callable[..., Sequence[torch.Tensor]]

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def straight_line(
    nodes: fx.Graph, constants: dict[str, Any], traced_on: torch.device, device: torch.device
) -> Run:
    """One Python function that calls the operators in order and drops each value after its last use.

    Args:
        nodes: The operators.
        constants: The tensors closed over, by the target of their ``get_attr`` node.
        traced_on: The device of the trace, which the operators may name.
        device: The device that replaces it.
    """
    scope: dict[str, Any] = {}
    names: dict[fx.Node, str] = {}
    last_use: dict[fx.Node, fx.Node] = {}
    for node in nodes.nodes:
        for parent in node.all_input_nodes:
            last_use[parent] = node

    def constant(value: Any) -> str:
        if isinstance(value, torch.device) and value.type == traced_on.type:
            value = device
        name = f"c{len(scope)}"
        scope[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        if isinstance(value, list | fx.immutable_collections.immutable_list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(text(item) + ', ' for item in value)})"
        if isinstance(value, slice):
            return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        return constant(value)

    lines: list[str] = []
    arguments: list[str] = []
    for i, node in enumerate(nodes.nodes):
        if node.op == "placeholder":
            names[node] = f"v{i}"
            arguments.append(names[node])
        elif node.op == "get_attr":
            names[node] = constant(constants[str(node.target)])
        elif node.op == "output":
            lines.append(f"return {text(list(node.args[0]))}")
        else:
            names[node] = f"v{i}"
            call = [text(value) for value in node.args]
            if node.target in _VIEWS:  # the strides may differ from those of the trace
                lines.append(f"{names[node]} = {call[0]}.reshape({call[1]})")
            elif node.target is operator.getitem:
                lines.append(f"{names[node]} = {call[0]}[{call[1]}]")
            else:
                call += [f"{key}={text(value)}" for key, value in node.kwargs.items()]
                target = _with_dense_rows(node.target) if "_dot_product_" in str(node.target) else node.target
                lines.append(f"{names[node]} = {constant(target)}({', '.join(call)})")
            dead = [
                names[parent]
                for parent in node.all_input_nodes
                if last_use[parent] is node and parent.op == "call_function"
            ]
            if dead:
                lines.append(f"del {', '.join(dead)}")
    source = f"def run({', '.join(arguments)}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<torch graph>", "exec"), scope)
    run: Run = scope["run"]
    return run


def _with_dense_rows(op: Any) -> Callable[..., Any]:
    """A fused attention kernel on tensors with a dense last axis: where it is not dense, these read past it."""

    def dense(value: Any) -> Any:
        strided = isinstance(value, torch.Tensor) and value.ndim and value.stride(-1) != 1
        return value.contiguous() if strided else value

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*map(dense, args), **{key: dense(value) for key, value in kwargs.items()})

    return call


def without_grad(run: Run) -> Run:
    """The function without an autograd graph, for code that closes over parameters."""

    def guarded(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if not torch.is_grad_enabled():
            return run(*tensors)
        torch.set_grad_enabled(False)
        try:
            return run(*tensors)
        finally:
            torch.set_grad_enabled(True)

    return guarded
