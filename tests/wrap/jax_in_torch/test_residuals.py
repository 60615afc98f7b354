"""What is kept between the forward and the backward pass of a JAX function called from torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.autograd import grad

from tests.wrap.programs import leaf, program_of
from torchjax_bridge.wrap import as_torch_function
from torchjax_bridge.wrap.jax_in_torch import _linearized

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


class Pack:
    """Saved-tensor hooks that count, and move through numpy as an offloader would."""

    def __init__(self):
        self.packed = []

    def __enter__(self):
        def pack(tensor):
            self.packed.append(tensor)
            return tensor.detach().numpy().copy()

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        return self.hooks.__exit__(*error)


def test_residuals_go_through_saved_tensor_hooks():
    f = as_torch_function(lambda x, w: jnp.sin(x @ w))
    x, w = leaf(3, 4, dtype=torch.float32), leaf(4, 2, dtype=torch.float32)
    with Pack() as pack:
        y = f(x, w)
    shapes = sorted(tuple(tensor.shape) for tensor in pack.packed)
    assert shapes == [(3, 2), (3, 4), (4, 2)]  # the arguments, and cos(x @ w)
    torch.testing.assert_close(grad(y.sum(), (x, w)), grad(torch.sin(x @ w).sum(), (x, w)))


def test_a_residual_that_is_an_argument_or_a_result_is_kept_once():
    f = as_torch_function(lambda x, y: jnp.exp(x) * y)
    g = as_torch_function(jnp.exp)
    x, y = leaf(3, dtype=torch.float32), leaf(3, dtype=torch.float32, seed=1)
    with Pack() as pack:
        f(x, y)
    assert len(pack.packed) == 3  # x, y and exp(x)
    with Pack() as pack:
        z = g(x)
    assert [tensor.data_ptr() for tensor in pack.packed] == [x.data_ptr(), z.data_ptr()]


def kept_bytes(f, *args):
    with Pack() as pack:
        f(*args)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in pack.packed}.values())


def test_a_residual_that_is_another_moved_about_is_not_kept():
    x, scale = torch.ones(100, 100, requires_grad=True), torch.ones(100, requires_grad=True)
    f = as_torch_function(lambda x, s: jnp.sin(x) * jnp.exp(s))  # JAX keeps exp(s) as large as x
    assert kept_bytes(f, x, scale) == 3 * x.nbytes + 2 * scale.nbytes  # x, sin(x), cos(x); s, exp(s)
    g = as_torch_function(lambda x: jnp.sin(x) * jnp.arange(100.0))
    assert kept_bytes(g, x) == 2 * x.nbytes  # x, cos(x)


def test_a_normalised_layer_has_the_gradients_of_native_torch():
    def layer(x, w):
        y = x @ w
        mean, var = y.mean(0), ((y - y.mean(0)) ** 2).mean(0)
        return jnp.maximum((y - mean) * jax.lax.rsqrt(var + 1e-5), 0)

    norm = torch.nn.BatchNorm1d(64, affine=False)
    x, w = leaf(512, 64, dtype=torch.float32), leaf(64, 64, dtype=torch.float32)
    f = as_torch_function(layer)
    native = lambda x, w: torch.relu(norm(x @ w))  # noqa: E731
    torch.testing.assert_close(
        grad((f(x, w) ** 2).sum(), (x, w)), grad((native(x, w) ** 2).sum(), (x, w)), rtol=1e-3, atol=1e-3
    )


def test_every_residual_is_kept_where_jax_does_not_let_one_choose(monkeypatch):
    def layer(x, s):
        return jnp.tanh(x) * jnp.exp(s), jnp.exp(s)

    x, s = leaf(20, 10, dtype=torch.float32), leaf(10, dtype=torch.float32)
    thin = as_torch_function(layer)
    expected, few = grad(sum(y.sum() for y in thin(x, s)), (x, s)), kept_bytes(thin, x, s)

    def refuse(*_):
        raise TypeError("as an older or a newer JAX might")

    monkeypatch.setattr(_linearized, "ClosedJaxpr", refuse)
    whole = as_torch_function(layer)
    torch.testing.assert_close(grad(sum(y.sum() for y in whole(x, s)), (x, s)), expected)
    assert kept_bytes(whole, x, s) > few


def test_nothing_is_kept_under_no_grad():
    f = as_torch_function(lambda x: jnp.sin(x))
    x = torch.ones(3, requires_grad=True)
    with Pack() as pack, torch.no_grad():
        y = f(x)
    assert y.grad_fn is None
    assert pack.packed == []
    assert len(program_of(f).derived._entries) == 0
    with torch.inference_mode():
        z = f(torch.ones(3))
    assert z.is_inference()
    assert torch.equal(y, z)


def test_a_prng_key_among_the_residuals_stays_with_jax():
    @as_torch_function
    def f(x, key):
        @jax.checkpoint
        def noisy(x, key):
            return jnp.sin(x) * jax.random.normal(key, x.shape)

        return noisy(x, jax.random.fold_in(key, 7))

    key = jax.random.key(3)
    x = leaf(4, dtype=torch.float32)
    noise = torch.from_numpy(np.array(jax.random.normal(jax.random.fold_in(key, 7), (4,))))
    (g,) = grad(f(x, key).sum(), x)
    torch.testing.assert_close(g, torch.cos(x.detach()) * noise)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_and_gives_the_same_gradient(reentrant):
    calls = []

    @as_torch_function
    def f(x, w):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.tanh(x @ w)

    x, w = leaf(3, 4, dtype=torch.float32), leaf(4, 2, dtype=torch.float32)
    y = torch.utils.checkpoint.checkpoint(f, x, w, use_reentrant=reentrant)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close((x.grad, w.grad), grad(torch.tanh(x @ w).sum(), (x, w)))


def test_forward_and_backward_run_the_function_once():
    calls = []

    @as_torch_function
    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.tanh(x), jnp.sin(x)

    x = torch.ones(3, requires_grad=True)
    for used in (1, 2):
        sum(y.sum() for y in f(x)[:used]).backward()
        assert len(calls) == used
    with torch.no_grad():
        f(x)
    assert len(calls) == 3


def test_autocast_leaves_the_function_alone():
    f = as_torch_function(lambda x, w: x @ w)
    x, w = leaf(3, 4, dtype=torch.float32), leaf(4, 2, dtype=torch.float32)
    outside = f(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = x @ w
        assert half.dtype is torch.bfloat16
        inside = f(x, w)
        mixed = f(half, torch.ones(2, 2))
    assert torch.equal(inside, outside)
    assert mixed.dtype is torch.float32
    inside.sum().backward()
    torch.testing.assert_close((x.grad, w.grad), grad((x @ w).sum(), (x, w)))


# --- what must not be computed again -------------------------------------------------------------------------
#
# XLA computes x * w + b with one rounding where x * w has no other use, and with two where it has: a pullback that
# computed its residuals again would find no element equal to the maximum.


@jax.custom_vjp
def where_equal(y, m):
    return jnp.where(y == m, y, 0.0)


where_equal.defvjp(
    lambda y, m: (where_equal(y, m), (y, m)),
    lambda saved, g: (jnp.where(saved[0] == saved[1], g, 0.0), jnp.zeros_like(saved[1])),
)


def highest(z):
    return jax.lax.stop_gradient(z).max(1, keepdims=True)


STEPS = {
    "the place of a maximum": lambda z: z.max(1),
    "a comparison with a maximum": lambda z: jnp.where(z == highest(z), z * z, 0.0),
    "an index cast from a float": lambda z: jnp.take_along_axis(
        z, (-jnp.abs(z - highest(z))).astype(jnp.int32), 1
    ),
    "a comparison in a custom_vjp rule": lambda z: where_equal(z, highest(z)),
    "a comparison in a custom_vjp rule in a jit": lambda z: jax.jit(where_equal)(z, highest(z)),
    "a comparison in a checkpoint": lambda z: jax.checkpoint(lambda z, m: jnp.where(z == m, z * z, 0.0))(
        z, highest(z)
    ),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_sees_the_same_bits_in_the_backward_pass(step):
    def f(x, w, b):
        y = x * w
        return step(y + b).sum() + jnp.exp(y).sum(), y

    args = [leaf(64, 33, dtype=torch.float32, seed=i) for i in range(3)]
    arrays = [jnp.asarray(arg.detach().numpy()) for arg in args]
    expected = jax.grad(lambda *args: f(*args)[0], argnums=(0, 1, 2))(*arrays)
    found = grad(as_torch_function(f)(*args)[0], args)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, torch.from_numpy(np.array(wanted)), rtol=1e-4, atol=1e-4)
