"""Forward mode through a backward that leaves torch, and through operators that autograd does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torchjax_bridge import as_jax_function, as_jax_module, errors, to_jax

X = jnp.arange(1.0, 4.0)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.numpy() * 2 * x.detach().numpy())


class Detaching(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * 2 * x.detach().numpy())


class Listing(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.tensor((g * 2 * x).tolist())


class Once(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.numpy() * 2 * x.numpy())


class Partly(Square):
    """The half of its gradient is a constant to torch."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x + torch.tensor((g * x).tolist())


class Scaled(Square):
    """Asks for a value of what it saved, and is still a map of its cotangent."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * torch.tensor(x.tolist())


class Clipping(Square):
    """Not linear, and a function of its cotangent in torch."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (g * 2 * torch.tensor(x.tolist())).clamp(-0.5, 0.5)


@pytest.mark.every(2)
@pytest.mark.parametrize("function", [Square, Detaching, Listing, Once, Partly])
def test_a_backward_that_leaves_torch_has_a_gradient_and_names_itself_in_forward_mode(function):
    f = as_jax_function(function.apply)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(X), 2 * X)
    with pytest.raises(errors.TransformError, match=rf"{function.__name__}.*Forward mode.*torch operations"):
        jax.jvp(f, (X,), (X,))


def test_a_backward_that_stays_with_its_cotangent_has_a_tangent():
    f = as_jax_function(Scaled.apply)
    np.testing.assert_allclose(jax.jvp(f, (X,), (X,))[1], 2 * X**2)
    jax.jvp(as_jax_function(Clipping.apply), (X,), (X,))


def test_code_that_depends_on_values_has_a_tangent():
    def fn(x, z):
        return (x * 0.5 if x.sum() > 1 else x) * z, x.sum() * z.abs()

    f = as_jax_function(fn, output_shape=(jnp.ones(3, jnp.complex64), jnp.ones(3)))
    z = X + 1j
    values, tangents = jax.jvp(f, (X, z), (X, z))
    np.testing.assert_allclose(tangents[0], values[0] * 2, rtol=1e-6)
    np.testing.assert_allclose(tangents[1], values[1] * 2, rtol=1e-6)


def test_numpy_in_a_forward_names_where_it_is_called():
    def fn(x):
        return torch.from_numpy(x.numpy() * 2)

    f = as_jax_function(fn, output_shape=lambda x: x)
    np.testing.assert_allclose(f(X), 2 * X)
    with pytest.raises(errors.TransformError, match=r"fn', line \d+.*\.numpy\(\)"):
        jax.grad(lambda x: f(x).sum())(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_module_runs_for_its_value_and_says_that_it_has_no_derivative():
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    module = torch.ao.quantization.quantize_dynamic(plain.eval(), {nn.Linear}, dtype=torch.qint8)
    apply, variables = as_jax_module(module)
    for x in (torch.ones(1, 3), torch.rand(5, 3)):  # the second with what the first has left in a cache
        np.testing.assert_array_equal(jax.jit(apply)(variables, to_jax(x)), module(x))
        np.testing.assert_array_equal(as_jax_function(module)(to_jax(x)), module(x))
    loss = as_jax_function(module, output_shape=lambda x: jnp.ones((1, 2)))
    for call in (lambda x: apply(variables, x).sum(), lambda x: loss(x).sum()):
        with pytest.raises(
            errors.TransformError, match=r"^the torch function calls.*packed weights.*quantized"
        ):
            jax.grad(call)(X[None])
