"""Operators that are awkward to trace, cut or batch agree with torch's own autograd, alone and lane by lane."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.marking import slow_but
from torchjax_bridge import as_jax_function, as_jax_module

RNG = np.random.default_rng(11)
WEIGHT = torch.from_numpy(RNG.normal(size=(4, 3, 2, 2)).astype(np.float32))
CONJ = torch.complex(torch.arange(4.0), torch.ones(4)).conj()


def channels_last(x):
    image = x.view(1, 3, 4, 4).to(memory_format=torch.channels_last)
    return F.conv2d(image, WEIGHT).permute(0, 2, 3, 1).reshape(-1)


def heads(x):
    h = x.view(6, 2, 4).transpose(0, 1)
    out = (h @ h.transpose(-1, -2)).softmax(-1) @ h
    return out.transpose(0, 1).contiguous().view(6, 8)


def strides(x):
    m = x.view(6, 8)
    return (
        torch.as_strided(m, (2, 2), (3, 1)).sin().sum() + m.unfold(0, 2, 1).pow(2).sum() + m.diagonal().exp()
    )


def scatter(x):
    index = torch.tensor([0, 2, 1, 0, 2, 2])
    return torch.zeros(3, 8).index_add(0, index, x.view(6, 8)).pow(2)


def fill(x):
    out = torch.zeros(6, 8)
    for i in range(6):
        out[i, : i + 1] = x.view(6, 8)[i, : i + 1] * i
    return out


def inverse(x):
    square = x.view(6, 8)[:3, :3]
    return torch.linalg.inv(square @ square.T + torch.eye(3)) + torch.linalg.det(square)


def spectrum(x):
    return (torch.fft.fft(x.view(6, 8)) * torch.fft.ifft(x.view(6, 8))).abs()


def attention(x):
    h = x.view(1, 2, 6, 4)
    return F.scaled_dot_product_attention(h, h * 2, h + 1, is_causal=True)


OPERATORS = {
    "channels last": channels_last,
    "heads": heads,
    "strides": strides,
    "scatter": scatter,
    "assignment": fill,
    "inverse": inverse,
    "fft": spectrum,
    "attention": attention,
    "conjugate constant": lambda x: (x.view(12, 4) * CONJ).abs(),
    "sort and topk": lambda x: x.sort().values.cumsum(0) + x.topk(3).values.sum(),
    "instance norm": lambda x: F.instance_norm(x.view(2, 3, 8)),
    "layer norm": lambda x: F.layer_norm(x.view(6, 8), (8,)),
    "interpolate": lambda x: F.interpolate(x.view(1, 3, 4, 4), scale_factor=2, mode="bilinear"),
    "autocast inside": lambda x: torch.autocast("cpu", torch.bfloat16)(lambda m: (m @ m.T).float())(
        x.view(6, 8)
    ),
}
SLOW = {"inverse", "fft", "interpolate", "instance norm", "conjugate constant", "assignment"}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", slow_but(OPERATORS.keys() - SLOW, OPERATORS))
def test_value_gradient_and_lanes_are_those_of_torch(name):
    fn = OPERATORS[name]
    f = as_jax_function(fn)
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if "autocast" in name else {"atol": 2e-4, "rtol": 1e-3}
    lanes = RNG.normal(size=(2, 48)).astype(np.float32)

    def native(x):
        x = torch.from_numpy(x).requires_grad_()
        y = fn(x)
        return y.detach().numpy(), torch.autograd.grad((y**2).sum(), x)[0].numpy()

    both = lambda x: (f(x), jax.grad(lambda x: (f(x) ** 2).sum())(x))  # noqa: E731
    expected = [native(lane) for lane in lanes]
    for got, right in zip(jax.jit(both)(lanes[0]), expected[0], strict=True):
        np.testing.assert_allclose(got, right, **tolerance)
    for axis in (0, 1):
        stacked = lanes if axis == 0 else lanes.T
        for got, *right in zip(jax.jit(jax.vmap(both, axis))(stacked), *expected, strict=True):
            np.testing.assert_allclose(got, np.stack(right), **tolerance)


@pytest.mark.slow
def test_the_hessian_of_attention_is_that_of_torch():
    x = RNG.normal(size=48).astype(np.float32) * 0.5
    got = jax.hessian(lambda x: (as_jax_function(heads)(x) ** 2).sum())(jnp.asarray(x))
    right = torch.autograd.functional.hessian(lambda x: heads(x).pow(2).sum(), torch.from_numpy(x))
    np.testing.assert_allclose(got, right, atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_hessian_of_a_power_spectrum_is_that_of_jnp():
    x = jnp.asarray(RNG.normal(size=6), jnp.float32)
    got = jax.hessian(as_jax_function(lambda x: torch.fft.rfft(x).abs().pow(4).sum()))(x)
    right = jax.hessian(lambda x: (jnp.abs(jnp.fft.rfft(x)) ** 4).sum())(x)
    np.testing.assert_allclose(got, right, rtol=1e-3, atol=1e-2)


def test_in_place_code_that_mixes_arguments_and_closed_over_tensors_is_differentiated():
    other = torch.from_numpy(RNG.normal(size=(6, 8)).astype(np.float32))  # cosine_similarity clamps in place
    x = RNG.normal(size=48).astype(np.float32)
    fn = lambda x: F.cosine_similarity(x.view(6, 8), other, dim=1)  # noqa: E731
    given = torch.from_numpy(x).requires_grad_()
    (right,) = torch.autograd.grad(fn(given).sum(), given)
    f = as_jax_function(fn)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(jnp.asarray(x)), right, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(jnp.stack([x, -x]))[1], fn(-given).detach(), atol=1e-6)


def test_autocast_around_the_call_is_part_of_the_call():
    x = jnp.ones((4, 3))
    f = as_jax_function(lambda x: x @ x.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x).dtype == jnp.bfloat16
        inside = jax.jit(lambda x: f(x))
        assert inside(x).dtype == jnp.bfloat16
    assert inside(x).dtype == jnp.bfloat16  # compiled under it, it stays under it
    assert f(x).dtype == jnp.float32


def test_attention_s_own_argument_named_key_reaches_it():
    module = torch.nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.5)
    apply, variables = as_jax_module(module)
    x = jnp.asarray(RNG.normal(size=(2, 5, 4)), jnp.float32)
    named, _ = apply(variables, query=x, key=x, value=x)
    np.testing.assert_allclose(named, apply(variables, x, x, x)[0])
    (dropped, _), _ = apply(variables, x, x, x, train=True, key=jax.random.key(0))
    assert (dropped != named).any()


@pytest.mark.slow
def test_a_compiled_function_runs_compiled_and_is_differentiated_as_the_python_it_came_from():
    f = as_jax_function(torch.compile(lambda x: torch.sin(x).sum(), backend="eager"))
    x = jnp.arange(3.0)
    np.testing.assert_allclose(f(x), jnp.sin(x).sum(), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(x[None]), jnp.cos(x)[None], rtol=1e-6)
