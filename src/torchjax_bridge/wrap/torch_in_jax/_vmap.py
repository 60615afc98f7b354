"""A graph over one more axis, by ``torch.func.vmap``.

Owns the steps that keep operators from running lane by lane. Operators for which torch has no batching rule
are decomposed into ones that have. Fused attention cannot be decomposed; it folds the new axis into its own
batch axis. torch runs any other operator lane by lane: correct, but slow.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ._graph import Graph, Spec
from ._torch_internals import OpOverload, decompositions, has_batching_rule
from ._trace import trace

__all__ = ["vmap_graph"]


def vmap_graph(
    graph: Graph, in_dims: Sequence[int | None], out_dims: Sequence[int | None], specs: Sequence[Spec]
) -> Graph:
    """The graph of ``torch.func.vmap`` of a graph.

    Args:
        graph: The computation of one lane.
        in_dims: The mapped axis of each input; None for an input that all lanes share.
        out_dims: The mapped axis of each output, likewise.
        specs: Shape and dtype of each input, mapped axis included.

    Raises:
        NeedsValues: An operator asks for values.
    """
    one_lane = [Spec.of(node.meta["val"]) for node in graph.inputs]
    decomposed: set[Any] = set(_FOLDED)
    while table := _decompositions(graph, decomposed):
        decomposed |= set(table)
        graph = trace(graph, one_lane, graph.device, table)
    graph = graph.cut(graph.inputs, graph.outputs)  # a copy, because graphs are shared
    for node in graph.nodes.nodes:
        if node.target in _FOLDED:
            node.args = (node.target, *_positional(node))
            node.kwargs = {}
            node.target = _fold
    for node in graph.nodes.nodes:
        # A memory format does not change values, and one like channels-last needs a certain number of axes.
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    batched: Callable[..., Any] = torch.func.vmap(
        lambda *tensors: tuple(graph(*tensors)),
        in_dims=tuple(in_dims),
        out_dims=tuple(out_dims),  # type: ignore[arg-type]
    )
    return trace(batched, specs, graph.device)


def _decompositions(graph: Graph, known: set[Any]) -> dict[Any, Callable[..., Any]]:
    """Decompositions of the operators without a batching rule, except the known ones."""
    missing = {node.target for node in graph.nodes.nodes if not has_batching_rule(node.target)}
    return decompositions(missing - known)


def _positional(node: fx.Node) -> list[Any]:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    values = list(node.args)
    for argument in arguments[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))  # noqa: PERF401
    return values


# --- fused attention -----------------------------------------------------------------------------------

# These take and return tensors with the batch axis first. Only the mask may lack it; it broadcasts.
_FOLDED = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


def _fold(op: OpOverload, *args: Any) -> Any:
    return _FoldedVmap.apply(op, *args)


class _FoldedVmap(torch.autograd.Function):
    """An operator, with the batching rule that torch lacks."""

    @staticmethod
    def forward(op: OpOverload, *args: Any) -> Any:
        names = [argument.name for argument in op._schema.arguments]
        split = sum(not argument.kwarg_only for argument in op._schema.arguments)
        return op(*args[:split], **dict(zip(names[split:], args[split:], strict=True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: graphs are differentiated before they are batched."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: OpOverload, *args: Any) -> tuple[Any, Any]:
        """Fold the mapped axis into the batch axis, run once, and unfold."""
        lanes = info.batch_size
        count = args[0].shape[0 if in_dims[1] != 0 else 1]
        names = [argument.name for argument in op._schema.arguments]
        folded = [
            _folded(arg, dim, lanes, count, name == "attn_mask") if isinstance(arg, torch.Tensor) else arg
            for arg, dim, name in zip(args, in_dims[1:], names, strict=True)
        ]
        results = _FoldedVmap.apply(op, *folded)
        unfolded = tuple(r.unflatten(0, (lanes, count)) for r in _as_tuple(results))
        return unfolded, tuple(0 for _ in unfolded)


def _folded(tensor: torch.Tensor, dim: int | None, lanes: int, count: int, mask: bool) -> torch.Tensor:
    tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    while mask and tensor.ndim < 5:  # a mask without axes for batch and heads
        tensor = tensor.unsqueeze(1)
    return tensor.expand(lanes, count, *tensor.shape[2:]).flatten(0, 1)


def _as_tuple(results: Any) -> Iterable[torch.Tensor]:
    return results if isinstance(results, tuple | list) else (results,)
