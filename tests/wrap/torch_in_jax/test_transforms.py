"""Every transform of JAX gives for a torch function what it gives for the same function written in jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from torchjax_bridge import as_jax_function

pytestmark = pytest.mark.usefixtures("x64_on")

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 3))
TORCH_W = torch.tensor(W, requires_grad=True)


def ours(x):
    return torch.tanh(x @ TORCH_W).sin().sum()


def theirs(x):
    return jnp.sin(jnp.tanh(x @ W)).sum()


@pytest.fixture
def wrapped():
    return as_jax_function(ours)


@pytest.fixture
def x():
    return jnp.asarray(RNG.normal(size=(2, 3)))


def agree(transform, wrapped, *, jit=True, twin=theirs, atol=1e-12):
    """A transform of the torch function and of its twin give the same leaves, eagerly and compiled."""
    expected = jax.tree.leaves(transform(twin))
    runs = [transform(wrapped)] + ([jax.jit(lambda: transform(wrapped))()] if jit else [])
    for got in runs:
        leaves = jax.tree.leaves(got)
        assert len(leaves) == len(expected)
        for a, b in zip(leaves, expected, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=atol, rtol=1e-10)


def test_value_eagerly_and_compiled(wrapped, x):
    agree(lambda f: f(x), wrapped)


def test_grad_and_value_and_grad(wrapped, x):
    agree(lambda f: (jax.grad(f)(x), jax.value_and_grad(f)(x)), wrapped)


@pytest.mark.slow
def test_jvp_and_linearize(wrapped, x):
    agree(lambda f: jax.jvp(f, (x,), (x * 2,)), wrapped)
    agree(lambda f: (jax.linearize(f, x)[0], jax.linearize(f, x)[1](x)), wrapped)


@pytest.mark.slow
def test_jacfwd_and_jacrev(x):
    ours = as_jax_function(lambda x: torch.sin(x @ TORCH_W))
    twin = lambda x: jnp.sin(x @ W)  # noqa: E731
    agree(lambda f: (jax.jacfwd(f)(x), jax.jacrev(f)(x)), ours, twin=twin)


@pytest.mark.slow
def test_hessian_in_all_four_compositions(wrapped, x):
    agree(lambda f: jax.hessian(f)(x), wrapped)
    agree(lambda f: jax.jacrev(jax.jacrev(f))(x), wrapped, jit=False)
    agree(lambda f: jax.jacfwd(jax.jacfwd(f))(x), wrapped, jit=False)
    agree(lambda f: jax.jacrev(jax.jacfwd(f))(x), wrapped, jit=False)


@pytest.mark.slow
def test_third_derivatives(wrapped, x):
    agree(lambda f: jax.jacfwd(jax.hessian(f))(x[0]), wrapped, jit=False)
    agree(lambda f: jax.jacrev(jax.jacrev(jax.grad(f)))(x[0]), wrapped, jit=False)


@pytest.mark.slow
def test_check_grads_to_the_third_order_forward_and_reverse(wrapped, x):
    check_grads(wrapped, (x[0],), order=3, modes=["fwd", "rev"])


@pytest.mark.every(3)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap_over_any_axis(axis, x):
    ours = as_jax_function(lambda x: torch.softmax(x, 0))
    agree(lambda f: jax.vmap(f, in_axes=axis, out_axes=1)(x), ours, twin=lambda x: jax.nn.softmax(x, 0))


@pytest.mark.slow
def test_vmap_with_an_argument_that_all_lanes_share(x):
    ours = as_jax_function(lambda x, w: torch.tanh(x @ w))
    twin = lambda x, w: jnp.tanh(x @ w)  # noqa: E731
    w = jnp.asarray(W)
    agree(lambda f: jax.vmap(f, in_axes=(0, None))(x, w), ours, twin=twin)
    agree(lambda f: jax.grad(lambda w: (jax.vmap(f, in_axes=(0, None))(x, w) ** 2).sum())(w), ours, twin=twin)
    ws = jnp.stack([w, 2 * w])
    agree(lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0), 1)(x, ws), ours, twin=twin)


def test_vmap_of_grad_and_grad_of_vmap(wrapped, x):
    agree(lambda f: jax.vmap(jax.grad(f))(x), wrapped)
    agree(lambda f: jax.grad(lambda x: (jax.vmap(f)(x) ** 2).sum())(x), wrapped)


@pytest.mark.slow
def test_vmap_of_vmap_of_grad(wrapped, x):
    agree(lambda f: jax.vmap(jax.vmap(jax.grad(f)))(jnp.stack([x, -x])), wrapped, jit=False)


@pytest.mark.slow
def test_vmap_of_hessian_and_hessian_of_vmap(wrapped, x):
    agree(lambda f: jax.vmap(jax.hessian(f))(x), wrapped, jit=False)
    agree(lambda f: jax.hessian(lambda x: jax.vmap(f)(x).sum())(x), wrapped, jit=False)


@pytest.mark.slow
def test_vmap_of_value_and_grad_shares_what_the_lanes_share(x):
    """A residual that no mapped input reaches is not made once a lane, and its cotangent is their sum."""
    ours = as_jax_function(lambda x, w: (torch.sin(torch.exp(w) @ w) * x).sum())
    twin = lambda x, w: (jnp.sin(jnp.exp(w) @ w) * x).sum()  # noqa: E731
    w = jnp.asarray(W) * 0.3
    agree(lambda f: jax.vmap(jax.value_and_grad(f, (0, 1)), (0, None))(x, w), ours, twin=twin)


def test_scan_and_grad_of_scan(wrapped, x):
    def run(f, x):
        return jax.lax.scan(lambda c, k: (c + k * f(c), f(c)), x, jnp.arange(3.0))

    agree(lambda f: run(f, x), wrapped)
    agree(lambda f: jax.grad(lambda x: run(f, x)[0].sum() + run(f, x)[1].sum())(x), wrapped)


def test_while_and_cond_and_switch(wrapped, x):
    agree(
        lambda f: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * f(c[1])), (0, x)),
        wrapped,
    )
    agree(lambda f: jax.grad(lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: -3 * f(x), x))(x), wrapped)
    agree(
        lambda f: jax.vmap(lambda i, x: jax.lax.switch(i, [f, lambda x: 2 * f(x)], x))(jnp.arange(2), x),
        wrapped,
    )


def test_checkpoint(wrapped, x):
    agree(lambda f: jax.grad(jax.checkpoint(lambda x: f(f(x) * x)))(x), wrapped)


def test_custom_vjp_around_it(wrapped, x):
    def outer(f):
        around = jax.custom_vjp(lambda x: f(x))
        around.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * 7 * jax.grad(f)(x),))
        return jax.grad(around)(x)

    agree(outer, wrapped)


def test_compiled_ahead_of_time(wrapped, x):
    compiled = jax.jit(jax.value_and_grad(wrapped)).lower(x).compile()
    value, slope = compiled(x)
    np.testing.assert_allclose(value, theirs(x), rtol=1e-12)
    np.testing.assert_allclose(slope, jax.grad(theirs)(x), rtol=1e-10)


def test_eval_shape_runs_nothing(x):
    calls = []
    wrapped = as_jax_function(lambda x: (calls.append(type(x).__name__), x.sum(0))[1])
    assert jax.eval_shape(wrapped, x).shape == (3,)
    assert calls == ["FakeTensor"]


def test_linear_transpose_is_refused(x):
    wrapped = as_jax_function(lambda x: 2 * x)
    with pytest.raises(RuntimeError, match=r"Use jax\.vjp"):
        jax.linear_transpose(wrapped, x)(x)


@pytest.mark.slow
def test_two_torch_functions_chained_and_mixed_with_jnp(x):
    a, b = as_jax_function(torch.sin), as_jax_function(lambda x, y: x * y.exp())
    ours = lambda x: b(a(x) ** 2, jnp.cos(a(x))).sum()  # noqa: E731
    twin = lambda x: (jnp.sin(x) ** 2 * jnp.exp(jnp.cos(jnp.sin(x)))).sum()  # noqa: E731
    agree(lambda f: jax.hessian(f)(x), ours, twin=twin, jit=False)


@pytest.mark.every(2)
@pytest.mark.parametrize("residuals", ["save", "recompute"])
def test_both_ways_to_the_backward_agree(residuals, x):
    wrapped = as_jax_function(ours, residuals=residuals)
    agree(lambda f: (jax.value_and_grad(f)(x), jax.vmap(jax.grad(f))(x)), wrapped)
    agree(lambda f: jax.hessian(f)(x), wrapped, jit=False)
