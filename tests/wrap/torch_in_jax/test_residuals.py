"""Reverse mode runs the forward once: what the backward needs crosses as JAX arrays."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function
from torchjax_bridge.wrap.torch_in_jax import _callback
from torchjax_bridge.wrap.torch_in_jax._graph import Graph
from torchjax_bridge.wrap.torch_in_jax._ops import Apply, LinearMap, Save, Vmapped

X = jnp.asarray(np.random.default_rng(4).normal(size=(8, 16)), jnp.float32)
W = jnp.asarray(np.random.default_rng(5).normal(size=(16, 16)), jnp.float32)


def mlp(x, w):
    return torch.tanh(torch.tanh(x @ w) @ w).sum()


@pytest.fixture
def ran(monkeypatch):
    """Counts the ATen operators and the operations that run, by name."""
    counts = Counter()
    plain = _callback._filler

    def counting(op, device, errors):
        fill = plain(op, device, errors)
        name = type(op.base if isinstance(op, Vmapped) else op).__name__
        graph = op.graph() if not isinstance(op, Apply) else None
        matmuls = (
            sum("mm" in str(node.target) for node in graph.nodes.nodes) if isinstance(graph, Graph) else 0
        )

        def counted(outs, ins):
            counts[name] += 1
            counts["mm"] += matmuls
            return fill(outs, ins)

        return counted

    monkeypatch.setattr(_callback, "_filler", counting)
    return counts


def test_value_and_grad_is_one_forward_and_one_backward(ran):
    f = as_jax_function(mlp)
    step = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
    jax.block_until_ready(step(X, W))
    assert ran == {"Save": 1, "LinearMap": 1, "mm": 6}  # two forward, four backward


def test_recompute_runs_the_forward_again(ran):
    f = as_jax_function(mlp, residuals="recompute")
    step = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
    jax.block_until_ready(step(X, W))
    assert ran["Save"] == 1
    assert ran["LinearMap"] == 1
    assert ran["mm"] == 2 + 6


def test_the_forward_alone_saves_nothing(ran):
    jax.block_until_ready(jax.jit(as_jax_function(mlp))(X, W))
    assert ran == {"Apply": 1, "mm": 0}


def test_only_the_inputs_asked_for_are_differentiated(ran):
    jax.block_until_ready(jax.jit(jax.grad(as_jax_function(mlp)))(X, W))
    assert ran["mm"] == 4  # two forward; two backward, and none for w


def test_linearize_runs_the_forward_once_for_many_tangents(ran):
    _, push = jax.linearize(as_jax_function(mlp), X, W)
    for _ in range(3):
        jax.block_until_ready(push(X, W))
    assert ran["Save"] == 1
    assert ran["LinearMap"] == 3


def test_jacfwd_runs_the_forward_once(ran):
    f = as_jax_function(lambda x: torch.tanh(x))
    np.testing.assert_allclose(jax.jacfwd(f)(X[0]), jax.jacfwd(jnp.tanh)(X[0]), rtol=1e-5)
    assert ran["Save"] == 1
    assert ran["LinearMap"] == 1


def test_checkpoint_saves_no_residuals_and_runs_the_forward_again(ran):
    f = as_jax_function(mlp)
    got = jax.jit(jax.grad(jax.checkpoint(f)))(X, W)
    np.testing.assert_allclose(got, jax.grad(f)(X, W), rtol=1e-5)
    saved = [
        v.aval.shape
        for v in jax.tree.leaves(jax.vjp(jax.checkpoint(f), X, W)[1])
        if hasattr(v, "aval") and v.aval.size > 1
    ]
    assert all(shape in ((8, 16), (16, 16)) for shape in saved)


def kinds_of(f):
    """Which operations a jaxpr holds."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if "op" in eqn.params:
                yield eqn.params["op"]
            for sub in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(sub, "eqns"):
                    yield from walk(sub)

    return list(walk(f.jaxpr))


def test_outputs_and_inputs_serve_as_residuals_without_a_copy():
    """tanh's backward needs its result, a product's its factors: neither is returned twice."""
    save, linear = kinds_of(jax.make_jaxpr(jax.grad(lambda x: as_jax_function(torch.tanh)(x).sum()))(X))
    assert isinstance(save, Save)
    assert isinstance(linear, LinearMap)
    assert len(save.outs) == 1
    save, linear = kinds_of(
        jax.make_jaxpr(jax.grad(lambda x, w: as_jax_function(lambda x, w: x @ w)(x, w).sum(), (0, 1)))(X, W)
    )
    assert len(save.outs) == 1
    assert len(linear.used) == 3


def test_what_the_backward_does_not_read_does_not_cross():
    _, linear = kinds_of(jax.make_jaxpr(jax.grad(lambda x: as_jax_function(lambda x: x * 3)(x).sum()))(X))
    assert linear.used == (1,)


def test_a_residual_that_no_mapped_input_reaches_is_not_repeated():
    f = as_jax_function(lambda x, w: (torch.sin(torch.exp(w)) * x).sum())
    save, _ = kinds_of(jax.make_jaxpr(jax.vmap(jax.grad(f, (0, 1)), (0, None)))(X, W[0]))
    assert isinstance(save, Vmapped)
    assert save.out_dims[0] == 0
    assert None in save.out_dims
