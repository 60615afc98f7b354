"""A JAX function inside ``torch.compile`` and under the modes that watch operators."""

import gc
import subprocess
import sys
import warnings
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from torchjax_bridge.errors import TransformError
from torchjax_bridge.wrap import as_torch_function
from torchjax_bridge.wrap.jax_in_torch import _op, _state

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # What the compiler's own imports warn of.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]

Pair = namedtuple("Pair", "left right")
BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp(tree, w, scale, mode="tanh"):
    y = getattr(jnp, mode)(tree["x"] @ w) * scale
    return {"y": y, "none": None, "pair": Pair(tree["x"].sum(), [y.argmax()])}


f = as_torch_function(mlp)


def use(x, w, scale=2.0):
    result = f({"x": x}, w, scale, mode="sin")
    assert result["none"] is None
    return torch.relu(result["y"]).sum() + result["pair"].left, result["pair"].right[0]


def inputs(n=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((n, 4), (4, 2))]


@jax.tree_util.register_dataclass
@dataclass
class Point:
    x: torch.Tensor


# Calls that no graph can hold: the function, its argument, and what of its result is used.
OUTSIDE = {
    "key": (lambda x, key: x + jax.random.normal(key, x.shape), jax.random.key(0), lambda y: y),
    "array": (lambda x, y: x * y, jnp.arange(3.0), lambda y: y),
    "function": (lambda x, g: g(x), jnp.tanh, lambda y: y),
    "dataclass": (lambda x, p: x * p.x, Point(torch.ones(3)), lambda y: y),
    "dataclass out": (lambda x, _: Point(x * 2), None, lambda y: y.x),
    "defaultdict out": (lambda x, _: defaultdict(list, a=x), None, lambda y: y["a"]),
    "key out": (lambda x, _: (x, jax.random.key(1)), None, lambda y: y[0]),
}


@contextmanager
def quiet_unless_jax_is_read():
    """Dynamo warns of its own doings after a graph break; what it says of code it reads there is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Dynamo (detected|does not know)")
        yield


@pytest.mark.every(3)
@pytest.mark.parametrize("case", OUTSIDE)
def test_what_no_graph_can_hold_runs_outside_it(case):
    function, other, used = OUTSIDE[case]
    wrapped = as_torch_function(function)

    def run(x):
        return torch.relu(used(wrapped(x * 2, other))).sum()

    def grad(run):
        x = torch.arange(3.0).requires_grad_()
        loss = run(x)
        loss.backward()
        return loss.detach(), x.grad

    with quiet_unless_jax_is_read():
        found = grad(torch.compile(run, backend="aot_eager"))
    torch.testing.assert_close(found, grad(run))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"wrapped JAX function|TransformError"):
        torch.compile(lambda x: wrapped(x, other), fullgraph=True, backend="eager")(torch.ones(3))


def test_an_error_of_the_users_code_is_not_lost():
    wrapped = as_torch_function(lambda x: x @ jnp.ones((7, 7)))
    with pytest.raises(TypeError, match="contracting dimensions") as caught:
        torch.compile(lambda x: wrapped(x) + 1, backend="eager")(torch.ones(3))
    assert "args[0]: float32[3]" in "\n".join(caught.value.__notes__)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="contracting dimensions"):
        torch.compile(wrapped, fullgraph=True, backend="eager")(torch.ones(3))


@pytest.mark.slow
def test_more_shapes_than_torch_recompiles_for_run_as_they_are():
    wrapped = as_torch_function(lambda tree: {"y": jnp.tanh(tree["x"]), "none": None})
    compiled = torch.compile(lambda x: wrapped({"x": x * 2})["y"] + 1, backend="eager", dynamic=False)
    for n in range(2, 2 * torch._dynamo.config.recompile_limit + 4):
        torch.testing.assert_close(compiled(torch.ones(n)), torch.ones(n).mul(2).tanh() + 1)


def test_a_backward_pass_and_transforms_inside_a_compiled_region_are_not_read_by_dynamo():
    key = jax.random.key(0)
    wrapped = as_torch_function(lambda x, key: jnp.sin(x) * jax.random.normal(key, x.shape))

    def run(x):
        wrapped(x, key).sum().backward()
        return torch.func.vmap(lambda x: wrapped(x, key))(torch.stack([x.detach()] * 2))

    x, y = (torch.arange(3.0).requires_grad_() for _ in range(2))
    with quiet_unless_jax_is_read():
        found = torch.compile(run, backend="eager")(x)
    torch.testing.assert_close(found, run(y))
    torch.testing.assert_close(x.grad, y.grad)


def test_an_ordered_dict_keeps_its_order_in_a_graph():
    wrapped = as_torch_function(lambda tree: next(iter(tree.values())))

    def run(x):
        return wrapped(OrderedDict(z=x, a=2 * x))

    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(torch.ones(1)), torch.ones(1))


def test_a_function_is_read_by_dynamo_where_torch_cannot_be_told(monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")
    assert _state.hidden_from_dynamo(use) is use


@pytest.mark.every(3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_without_a_graph_break(backend):
    compiled = torch.compile(use, fullgraph=True, backend=backend)
    x, w = inputs()
    for _ in range(2):
        (mine, index), (expected, expected_index) = compiled(x, w), use(x, w)
        torch.testing.assert_close(mine, expected)
        assert index == expected_index
        torch.testing.assert_close(torch.autograd.grad(mine, (x, w)), torch.autograd.grad(expected, (x, w)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w), use(x, w))


def test_what_is_compiled_holds_the_pullback_and_not_a_second_forward():
    calls = []

    @as_torch_function
    def g(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(x).sum()

    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: g(x) * 2, fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(x.detach()))
    assert len(calls) == 1


@pytest.mark.slow
def test_other_shapes_and_numbers_recompile():
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    for n in (3, 5, 4, 3):
        torch.testing.assert_close(compiled(*inputs(n)), use(*inputs(n)))
    for scale in (2.0, 3.0, 4.5, 7):
        torch.testing.assert_close(compiled(*inputs(), scale), use(*inputs(), scale))
    dynamic = torch.compile(use, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 6):
        torch.testing.assert_close(dynamic(*inputs(n)), use(*inputs(n)))


def test_zeros_of_both_signs_are_two_numbers_in_a_graph():
    g = as_torch_function(lambda x, c: x * jnp.copysign(1.0, c))
    x = torch.ones(2)
    one = torch.compile(lambda x: g(x, 0.0), fullgraph=True, backend="aot_eager")
    other = torch.compile(lambda x: g(x, -0.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(one(x), x)
    assert torch.equal(other(x), -x)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "transform",
    [
        lambda g: torch.func.grad(g),
        lambda g: torch.func.vmap(torch.func.grad(g, argnums=1), (None, 0)),
        lambda g: torch.func.jacfwd(g),
    ],
    ids=["grad", "vmap of grad", "jacfwd"],
)
def test_transforms_inside_a_compiled_function(transform):
    g = as_torch_function(lambda x, w: jnp.tanh(x @ w).sum())
    x, w = torch.randn(3), torch.randn(3, 2)
    w = torch.stack([w, -w]) if "vmap" in str(transform.__code__.co_names) else w
    mine = torch.compile(lambda x, w: transform(g)(x, w), fullgraph=True, backend="aot_eager")(x, w)
    torch.testing.assert_close(mine, transform(lambda x, w: torch.tanh(x @ w).sum())(x, w))


def test_a_module_that_calls_a_wrapped_function_is_compiled_whole():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.act = as_torch_function(lambda x: x * jax.nn.sigmoid(x))

        def forward(self, x):
            return self.act(self.linear(x)).mean()

    layer, x = Layer(), torch.randn(2, 4)
    compiled = torch.compile(layer, fullgraph=True)
    compiled(x).backward()
    mine = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.nn.functional.silu(layer.linear(x)).mean().backward()
    torch.testing.assert_close(mine, [p.grad for p in layer.parameters()])


def test_opcheck_passes():
    @as_torch_function
    def g(x, w, n):
        return jnp.sin(x) @ w * n, x.argmax(), jnp.exp(x)

    x, w = inputs()
    make_fx(lambda x, w: g(x, w, 3))(x, w)  # as a mode watches, the program gets its name
    bound = [b for b in _op._bound.values() if b.program.origin is g._origin]
    assert bound
    for b in bound:
        tensors = [
            torch.randn(a.shape, requires_grad=True)
            for a, o in zip(b.program.inputs, b.others, strict=True)
            if o is None
        ]
        result = torch.library.opcheck(_op._operator(), (b.name, tensors))
        assert set(result.values()) == {"SUCCESS"}


def test_the_operator_is_kept_out_of_cuda_graphs():
    assert torch.Tag.cudagraph_unsafe in _op._operator().tags


def test_the_operator_alone_has_gradients_and_vmap():
    g = as_torch_function(lambda x, w: (jnp.sin(x @ w), (x @ w).argmax()))
    x, w = inputs()
    make_fx(lambda x, w: g(x, w)[0])(x.detach(), w.detach())
    (bound,) = [b for b in _op._bound.values() if b.program.origin is g._origin]
    y, _ = torch.ops.torchjax_bridge.call(bound.name, [x, w])
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(torch.sin(x @ w).sum(), (x, w))
    )
    batch = torch.stack([x, -x]).detach()
    mine = torch.func.vmap(lambda x: torch.ops.torchjax_bridge.call(bound.name, [x, w.detach()])[0])(batch)
    torch.testing.assert_close(mine, torch.sin(batch @ w))


# --- modes -------------------------------------------------------------------------------------------------


def test_fake_and_meta_tensors_give_shapes_without_running():
    ran = []

    @as_torch_function
    def g(x, w):
        jax.debug.callback(lambda: ran.append(1))
        return (x @ w).astype(jnp.bfloat16), x.argmax(0)

    mode = torch._subclasses.FakeTensorMode()
    with mode:
        y, n = g(torch.ones(3, 4), torch.ones(4, 2))
    assert (tuple(y.shape), y.dtype, tuple(n.shape), n.dtype) == ((3, 2), torch.bfloat16, (4,), torch.int32)
    outside, _ = g(mode.from_tensor(torch.ones(5, 4)), mode.from_tensor(torch.ones(4, 2)))
    assert tuple(outside.shape) == (5, 2)
    meta, _ = g(torch.ones(3, 4, device="meta"), torch.ones(4, 2, device="meta"))
    assert meta.is_meta
    assert tuple(meta.shape) == (3, 2)
    assert not ran


@pytest.mark.every(3)
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx_records_the_call_and_not_its_result(tracing):
    g = as_torch_function(lambda x, s: jnp.sin(x) * s)
    graph = make_fx(lambda x: g(x, 2.0) + 1, tracing_mode=tracing)(torch.ones(3))
    gc.collect()
    x = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(graph(x), torch.sin(x) * 2 + 1)


def test_export_keeps_the_call():
    class Module(torch.nn.Module):
        def forward(self, x):
            return f({"x": x}, torch.ones(4, 2), 2.0)["y"]

    exported = torch.export.export(Module(), (torch.ones(3, 4),))
    x = torch.randn(3, 4)
    torch.testing.assert_close(exported.module()(x), Module()(x))


def test_a_counting_mode_sees_torch_and_does_not_disturb():
    g = as_torch_function(lambda x, w, key: x @ w + jax.random.normal(key, (2,)))
    x, w = inputs()
    with FlopCounterMode(display=False):
        y = g(x, w, jax.random.key(0))
        mine = torch.autograd.grad(y.sum(), (x, w))
    assert torch.equal(y, g(x, w, jax.random.key(0)))
    torch.testing.assert_close(mine, torch.autograd.grad((x @ w).sum(), (x, w)))


def test_selective_checkpointing_keeps_or_recomputes_the_operator():
    calls = []

    @as_torch_function
    def g(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(x)

    x = torch.ones(3, requires_grad=True)
    operator = _op._operator()
    for kept, expected in (([operator], 1), ([], 2)):
        calls.clear()
        contexts = lambda kept=kept: create_selective_checkpoint_contexts(kept)  # noqa: E731
        y = checkpoint(lambda x: g(x) * 2, x, use_reentrant=False, context_fn=contexts)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, 2 * torch.cos(x.detach()))
        assert len(calls) == expected


# --- lifetimes and limits ------------------------------------------------------------------------------------


def recorded(g, x):
    return make_fx(lambda x: g(x, 2.0))(x)


def test_a_graph_lives_through_cache_clear_and_dies_with_a_clear_error():
    g = as_torch_function(lambda x, s: jnp.sin(x) * s)
    x = torch.ones(3)
    graph = recorded(g, x)
    g.cache_clear()
    gc.collect()
    torch.testing.assert_close(graph(x), torch.sin(x) * 2)
    watched = weakref.ref(g)
    del g
    gc.collect()
    assert watched() is None
    with pytest.raises(TransformError, match="wrapper is gone"):
        graph(x)


@pytest.mark.slow
def test_a_wrapped_function_that_was_compiled_dies_too_and_its_programs_with_it():
    def bound():
        torch._dynamo.reset()
        gc.collect()
        return len(_op._bound)

    before = bound()
    g = as_torch_function(lambda x: jnp.sin(x))
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x, g=g: g(x), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert len(_op._bound) > before
    watched = weakref.ref(g)
    del g
    assert bound() == before
    assert watched() is None


def test_modes_leave_nothing_behind_in_eager_calls():
    g = as_torch_function(lambda x, s, key: x * s)
    for i in range(5):
        with FlopCounterMode(display=False):
            g(torch.ones(3), float(i), jax.random.key(i))
    assert g._origin.pins == {}


def test_a_prng_key_result_is_refused_in_a_graph():
    g = as_torch_function(lambda x: (x, jax.random.key(0)))
    with pytest.raises(TransformError, match="PRNG key"):
        make_fx(lambda x: g(x)[0])(torch.ones(3))


def test_calls_without_compilation_do_not_load_the_compiler():
    code = (
        "import sys, torch, jax.numpy as jnp\n"
        "from torchjax_bridge import as_torch_function\n"
        "f = as_torch_function(jnp.sin)\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "f(x).sum().backward()\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'flax') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
