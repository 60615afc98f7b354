"""Torch code that depends on values, has derivatives of its own, or takes derivatives itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function
from torchjax_bridge.wrap.torch_in_jax._trace import is_fake

X = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)), jnp.float32)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-5)


class OldRound(torch.autograd.Function):
    """Rounds; its derivative is declared to be that of x squared."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


class NewRound(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


class OnceRound(OldRound):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


@pytest.mark.every(2)
@pytest.mark.parametrize("own", [OldRound, NewRound])
def test_a_function_s_own_backward_counts_in_every_mode_and_order(own):
    f = as_jax_function(lambda x: own.apply(x).sum())
    close(f(X), X.round().sum())
    close(jax.jit(jax.grad(f))(X), 2 * X)
    close(jax.vmap(jax.grad(f))(X), 2 * X)
    close(jax.grad(lambda x: jax.vmap(f)(x).sum())(X), 2 * X)
    close(jax.jvp(f, (X,), (X,))[1], (2 * X * X).sum())
    close(jax.hessian(f)(X[0]), 2 * jnp.eye(3))


def test_a_backward_that_is_differentiable_once_serves_grad_and_jvp():
    f = as_jax_function(lambda x: OnceRound.apply(x).sum())
    close(jax.grad(f)(X), 2 * X)
    close(jax.jvp(f, (X,), (X,))[1], (2 * X * X).sum())


def test_no_grad_and_detach_inside_are_respected_in_both_modes_and_orders():
    def fn(x):
        with torch.no_grad():
            held = x * 2
        return (x * held + x.detach()).sum()

    f = as_jax_function(fn)
    close(f(X), (2 * X**2 + X).sum())
    close(jax.grad(f)(X), 2 * X)
    close(jax.jacfwd(f)(X), 2 * X)
    close(jax.jit(jax.vmap(jax.grad(f)))(X), 2 * X)
    close(jax.hessian(f)(X[0]), jnp.zeros((3, 3)))


def test_an_output_without_gradient_has_none():
    f = as_jax_function(lambda x: (x.detach() * 2, x.sum()))
    close(jax.grad(lambda x: f(x)[0].sum() + f(x)[1])(X), jnp.ones_like(X))
    close(jax.jvp(f, (X,), (X,))[1][0], jnp.zeros_like(X))


def test_torch_autograd_grad_inside_keeps_its_own_derivative():
    def force(x):
        x.requires_grad_()
        return torch.autograd.grad((x**3).sum(), x)[0]

    f = as_jax_function(force)
    for run in (f, jax.jit(f), jax.vmap(f)):
        close(run(X), 3 * X**2)
    close(jax.jit(jax.grad(lambda x: f(x).sum()))(X), 6 * X)
    close(jax.vmap(jax.grad(lambda x: f(x).sum()))(X), 6 * X)
    close(jax.hessian(lambda x: f(x).sum())(X[0]), 6 * jnp.eye(3))


def test_torch_func_grad_inside():
    f = as_jax_function(torch.func.grad(lambda x: (x.sin() ** 2).sum()))
    twin = jax.grad(lambda x: (jnp.sin(x) ** 2).sum())
    close(f(X), twin(X))
    close(jax.jacrev(f)(X[0]), jax.jacrev(twin)(X[0]))


def test_closed_over_parameters_get_no_gradient_and_are_read_anew():
    weight = torch.ones(3, 3, requires_grad=True)
    f = as_jax_function(lambda x: (x @ weight).sum())
    slope = jax.jit(jax.grad(f))
    close(slope(X), jnp.full_like(X, 3))
    assert weight.grad is None
    with torch.no_grad():
        weight.mul_(2)
    close(slope(X), jnp.full_like(X, 6))
    weight.data = torch.zeros(3, 3)
    close(slope(X), jnp.zeros_like(X))
    close(f(X), 0)


# --- code that depends on values ---


def branches(x):
    return x * 2 if x.sum() > 0 else x**3


def twin(x):
    return jnp.where(x.sum() > 0, x * 2, x**3)


@pytest.fixture
def dependent():
    return as_jax_function(branches, output_shape=lambda x: x)


@pytest.mark.every(2)
@pytest.mark.parametrize("sign", [1, -1])
def test_derivatives_of_code_that_branches_on_values(dependent, sign):
    x = sign * jnp.abs(X)
    close(jax.jit(dependent)(x), twin(x))
    close(jax.jit(jax.grad(lambda x: dependent(x).sum()))(x), jax.grad(lambda x: twin(x).sum())(x))
    close(jax.jvp(dependent, (x,), (x,))[1], jax.jvp(twin, (x,), (x,))[1])
    close(
        jax.hessian(lambda x: dependent(x).sum())(x[0]), jax.hessian(lambda x: twin(x).sum())(x[0]), atol=1e-4
    )


def test_vmap_of_code_that_branches_on_values_decides_lane_by_lane(dependent):
    x = jnp.stack([jnp.abs(X), -jnp.abs(X)])
    close(jax.vmap(dependent)(x), jax.vmap(twin)(x))
    last = jnp.moveaxis(x, 0, 2)
    close(jax.vmap(dependent, in_axes=2)(last), jax.vmap(twin)(x))
    close(
        jax.jit(jax.vmap(jax.grad(lambda x: dependent(x).sum())))(x),
        jax.vmap(jax.grad(lambda x: twin(x).sum()))(x),
    )
    close(
        jax.grad(lambda x: (jax.vmap(dependent)(x) ** 2).sum())(x),
        jax.grad(lambda x: (jax.vmap(twin)(x) ** 2).sum())(x),
        atol=1e-4,
    )


def test_numpy_inside_with_output_shape():
    f = as_jax_function(lambda x: torch.from_numpy(np.sin(x.numpy())), output_shape=lambda x: x)
    close(jax.jit(f)(X), jnp.sin(X))


def test_in_place_code_that_depends_on_values_leaves_the_caller_s_arrays():
    def fn(x):
        if x.sum() > -1e9:
            x.mul_(2)
        return x

    before = np.array(X)
    f = as_jax_function(fn, output_shape=lambda x: x)
    close(jax.jit(f)(X), 2 * before)
    np.testing.assert_array_equal(X, before)


def test_python_runs_in_every_call_for_its_value_and_once_a_trace_for_derivatives():
    calls = []
    f = as_jax_function(lambda x: (calls.append(x), x.sin().sum())[1])
    run = jax.jit(f)
    for _ in range(3):
        jax.block_until_ready(run(X))
    assert sum(type(x) is torch.Tensor for x in calls) == 3


def test_a_closed_over_module_records_no_autograd_graph_for_its_value():
    modes = []

    class Noting(torch.nn.Linear):
        def forward(self, x):
            if not is_fake(x):
                modes.append(torch.is_grad_enabled())
            return super().forward(x)

    jax.block_until_ready(jax.jit(as_jax_function(Noting(3, 2)))(X))
    assert modes == [False]


def test_a_function_that_differentiates_inside_keeps_grad_mode_also_where_it_closes_over_parameters():
    weight = torch.full((3,), 2.0, requires_grad=True)

    def fn(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((weight * x**2).sum(), x, create_graph=True)[0] * weight

    close(jax.jit(as_jax_function(fn))(X), 8 * X)
