"""What torch has set around a call is part of the call: modes of modules, the default dtype, inference mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function, errors

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)

MODEL = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))


def by_name(x):
    return MODEL(x)


class Agent:
    def __init__(self, model):
        self.model = model

    def act(self, x):
        return self.model(x)


def holding(kind):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    return {
        "itself": (model, model),
        "method": (model, model.forward),
        "partial": (model, functools.partial(model)),
        "closure": (model, lambda x: model(x)),
        "global": (MODEL, by_name),
        "default": (model, lambda x, model=model: model(x)),
        "attribute": (model, Agent(model).act),
        "decorated": (model, torch.no_grad()(lambda x: model(x))),
    }[kind]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "kind", ["itself", "method", "partial", "closure", "global", "default", "attribute", "decorated"]
)
def test_a_module_switched_to_train_mode_is_another_function_and_never_written(kind):
    model, fn = holding(kind)
    f = as_jax_function(fn)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    right = f(X)
    model.train()
    for call in (f, jax.jit(f), jax.grad(lambda x: f(x).sum())):
        with pytest.raises(errors.TransformError, match="train=True"):
            call(X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    np.testing.assert_array_equal(f(X), right)


def test_a_module_switched_after_it_was_compiled_is_refused_and_never_written():
    norm = torch.nn.BatchNorm1d(3).eval()
    f = jax.jit(as_jax_function(norm))
    right = f(X)
    norm.train()
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="was switched between"):
        jax.block_until_ready(f(X))
    assert norm.num_batches_tracked == 0
    norm.eval()
    np.testing.assert_array_equal(f(X), right)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit])
def test_code_may_switch_its_module_by_itself(around):
    dropout = torch.nn.Dropout(0.5)
    f = around(as_jax_function(lambda x: dropout.eval()(x) * 2))
    for _ in range(3):
        np.testing.assert_array_equal(f(X), 2 * X)
        dropout.train()


def test_a_function_that_names_itself_can_be_wrapped_where_it_is_defined():
    @as_jax_function
    def f(x):
        return x.sin() if f is not None else x

    np.testing.assert_allclose(f(X), jnp.sin(X), rtol=1e-6)


def test_the_default_dtype_is_part_of_the_call(x64_on):
    f = as_jax_function(lambda x: torch.ones(3))
    assert f(X).dtype == jnp.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert f(X).dtype == jnp.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.every(2)
@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("output_shape", [None, jax.ShapeDtypeStruct((), jnp.float32)])
def test_derivatives_are_jax_s_to_ask_for_whatever_torch_has_switched_off(around, output_shape):
    def fn(x):
        return (x**3).sum() if output_shape is None or x.sum() < 100 else x.sum()

    f = as_jax_function(fn, output_shape=output_shape)
    with around():
        np.testing.assert_allclose(f(X), (X**3).sum(), atol=1e-6)
        np.testing.assert_allclose(jax.grad(f)(X), 3 * X**2, atol=1e-6)
        hessian = jax.jit(jax.hessian(f))(X[0])
    np.testing.assert_allclose(hessian, jnp.diag(6 * X[0]), atol=1e-6)
    np.testing.assert_allclose(jax.grad(f)(2 * X), 12 * X**2, atol=1e-6)


def test_code_that_differentiates_inside_does_so_under_inference_mode():
    def slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x**3).sum(), x)[0]

    with torch.inference_mode():
        np.testing.assert_allclose(as_jax_function(slope)(X), 3 * X**2, atol=1e-6)
