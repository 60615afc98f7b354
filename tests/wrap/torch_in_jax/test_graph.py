"""Graphs of ATen operators: what tracing gives, what is cut out, what is batched."""

import operator

import pytest
import torch
import torch.nn.functional as F

from torchjax_bridge.wrap.torch_in_jax._graph import Graph, Spec, is_view
from torchjax_bridge.wrap.torch_in_jax._trace import NeedsValues, fakes, is_fake, trace, tracing
from torchjax_bridge.wrap.torch_in_jax._vmap import vmap_graph

CPU = torch.device("cpu")
SPEC = Spec((4, 3), torch.float32)
X = torch.linspace(-1, 1, 12).reshape(4, 3)


def targets(graph: Graph):
    return [str(node.target) for node in graph.nodes.nodes if node.op == "call_function"]


def mutable(graph: Graph):
    return [
        node
        for node in graph.nodes.nodes
        if node.op == "call_function"
        and node.target is not operator.getitem
        and node.target._schema.is_mutable
    ]


def test_a_traced_graph_gives_what_the_function_gives():
    weight = torch.ones(3, 2)
    graph = trace(lambda x: [torch.tanh(x @ weight), x.sum()], [SPEC], CPU)
    for got, expected in zip(graph.on(CPU)(X), [torch.tanh(X @ weight), X.sum()], strict=True):
        assert torch.equal(got, expected)
    assert graph.specs() == [Spec((4, 2), torch.float32), Spec((), torch.float32)]
    assert list(graph.constants.values()) == [weight]


def test_in_place_code_becomes_functional():
    def fn(x):
        y = x.clone()
        y[0] = 7
        y.mul_(2).relu_()
        return [y]

    graph = trace(fn, [SPEC], CPU)
    assert not mutable(graph)
    before = X.clone()
    assert torch.equal(graph.on(CPU)(X)[0], fn(X)[0])
    assert torch.equal(X, before)


def test_detach_and_unused_operators_leave_no_trace():
    graph = trace(lambda x: (x.exp(), [x.detach().sin()])[1], [SPEC], CPU)
    assert targets(graph) == ["aten.sin.default"]


def test_values_asked_for_are_a_signal():
    for fn in (lambda x: [x * float(x.sum())], lambda x: [x[x > 0]], lambda x: [torch.as_tensor(x.numpy())]):
        with pytest.raises(NeedsValues):
            trace(fn, [SPEC], CPU)
    assert torch.ones(2).sum() == 2  # and no mode is left behind


def test_fake_tensors_exist_inside_a_trace_only():
    with tracing(CPU):
        (inside,) = fakes([SPEC], CPU)
    (outside,) = fakes([SPEC], CPU)
    assert is_fake(inside)
    assert not is_fake(outside)


def test_a_cut_holds_only_what_its_outputs_need():
    graph = trace(lambda x: [x.sin().exp(), x.cos()], [SPEC], CPU)
    (x,) = graph.inputs
    assert targets(graph.cut([x], graph.outputs[1:])) == ["aten.cos.default"]
    sine = next(node for node in graph.nodes.nodes if node.target is torch.ops.aten.sin.default)
    rest = graph.cut([sine], graph.outputs[:1])
    assert targets(rest) == ["aten.exp.default"]
    assert torch.equal(rest.on(CPU)(X)[0], X.exp())


def test_views_are_told_from_values():
    graph = trace(lambda x: [x.t() + 1, x.reshape(12), x.expand(2, 4, 3)], [SPEC], CPU)
    views = {str(node.target) for node in graph.nodes.nodes if is_view(node)}
    assert views == {"aten.t.default", "aten.view.default", "aten.expand.default"}


def test_a_view_in_a_graph_runs_on_tensors_of_any_strides():
    graph = trace(lambda x: [x.view(12) * 2], [SPEC], CPU)
    strided = X.t().contiguous().t()
    assert torch.equal(graph.on(CPU)(strided)[0], X.reshape(12) * 2)


def test_a_graph_that_closes_over_parameters_records_no_autograd_graph():
    weight = torch.ones(3, 2, requires_grad=True)
    graph = trace(lambda x: [x @ weight], [SPEC], CPU)
    assert not graph.on(CPU)(X)[0].requires_grad
    assert torch.is_grad_enabled()


BATCHED = {
    "pointwise": lambda x: [x.sin() * 2],
    "in place": lambda x: [x.clone().mul_(2)],
    "view": lambda x: [x.view(12).cumsum(0)],
    "batch norm in eval": lambda x: [F.batch_norm(x, torch.zeros(3), torch.ones(3), training=False)],
    "batch norm in train": lambda x: [F.batch_norm(x, None, None, training=True)],
    "attention": lambda x: [F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])],
    "masked attention": lambda x: [
        F.scaled_dot_product_attention(
            x[None, None], x[None, None], x[None, None], attn_mask=torch.eye(4, dtype=torch.bool)
        )
    ],
    "pooling": lambda x: [F.max_pool1d(x[None], 2)],
    "sort": lambda x: list(torch.sort(x, dim=0)),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("dim", [0, 2])
def test_a_batched_graph_gives_each_lane_what_the_graph_gives_it(name, dim):
    fn = BATCHED[name]
    graph = trace(fn, [SPEC], CPU)
    lanes = torch.stack([X, X.flip(0) * 2, -X])
    stacked = lanes.movedim(0, dim).contiguous()
    batched = vmap_graph(graph, [dim], [0] * len(graph.outputs), [Spec.of(stacked)])
    assert not mutable(batched)
    for i, got in enumerate(batched.on(CPU)(stacked)):
        for lane, result in zip(lanes, got, strict=True):
            torch.testing.assert_close(result, fn(lane.clone())[i], atol=1e-5, rtol=1e-5)


def test_fused_attention_is_batched_in_one_call_and_not_lane_by_lane():
    graph = trace(BATCHED["attention"], [SPEC], CPU)
    batched = vmap_graph(graph, [0], [0], [Spec((5, 4, 3), torch.float32)])
    assert sum("scaled_dot_product" in target for target in targets(batched)) == 1
