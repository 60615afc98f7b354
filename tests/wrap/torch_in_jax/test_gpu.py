"""Torch code inside JAX on a GPU: on XLA's stream, in order, and without the host waiting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function, as_jax_module
from torchjax_bridge.wrap.torch_in_jax._trace import is_fake

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products():
    """JAX's products in float32, as torch's are, rather than in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def x():
    value = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    return jax.device_put(value, jax.devices("gpu")[0])


def close(a, b, atol=1e-3):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-3)


def test_values_and_derivatives_on_the_device(x):
    f = as_jax_function(lambda x: torch.tanh(x * 0.5).sum())
    twin = lambda x: jnp.tanh(x * 0.5).sum()  # noqa: E731
    close(jax.jit(f)(x), twin(x), atol=1)
    close(jax.jit(jax.grad(f))(x), jax.grad(twin)(x))
    close(jax.vmap(jax.grad(f))(x), jax.grad(twin)(x))
    close(jax.hessian(f)(x[0, :3]), jax.hessian(twin)(x[0, :3]))
    assert f(x).devices() == x.devices()


def test_the_tensors_lie_on_the_gpu_and_are_views(x):
    seen = []

    def look(x):
        if not is_fake(x):
            seen.append((x.device.type, x.data_ptr()))
        return x + 1

    jax.block_until_ready(as_jax_function(look)(x))
    assert seen == [("cuda", x.unsafe_buffer_pointer())]


def test_torch_runs_in_order_between_what_jax_computes(x):
    """Long kernels before and after: a torch kernel on another stream would read too early or be read too early."""
    f = as_jax_function(lambda x: x.flip(0) + 1)

    @jax.jit
    def chain(x):
        for _ in range(8):
            x = jnp.tanh(x @ x * 1e-2)
            x = f(x)
        return x

    def expected(x):
        for _ in range(8):
            x = jnp.tanh(x @ x * 1e-2)
            x = x[::-1] + 1
        return x

    for _ in range(20):
        close(chain(x), jax.jit(expected)(x))


def test_the_host_does_not_wait(x):
    """The torch code asks for a long pause on the GPU; the call returns long before it ends."""

    def slow(x):
        if not is_fake(x):
            torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        return x + 1

    run = jax.jit(as_jax_function(slow))
    jax.block_until_ready(run(x))
    y = run(x)
    assert not y.is_ready()
    close(y, x + 1)


def test_no_operation_of_ours_synchronises(x):
    f = as_jax_function(lambda x, w: torch.relu(x @ w).sum())
    step = jax.jit(jax.value_and_grad(f, (0, 1)))
    jax.block_until_ready(step(x, x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        jax.block_until_ready(step(x, x))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_wrapped_functions_run_on_one_stream_which_is_xla_s(x):
    streams = []

    def note(x):
        if not is_fake(x):
            streams.append(torch.cuda.current_stream().cuda_stream)
        return x * 2

    f, g = as_jax_function(lambda x: note(x) + 1), as_jax_function(lambda x: note(x) - 1)
    close(jax.jit(lambda x: g(f(x)))(x), (x * 2 + 1) * 2 - 1)
    assert len(streams) == 2
    assert streams[0] == streams[1]
    assert streams[0] not in (0, torch.cuda.default_stream().cuda_stream)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize("stream", ["default", "side"])
def test_closed_over_weights_are_read_after_torch_has_written_them(x, stream):
    weight = torch.zeros(512, 512, device="cuda")
    f = jax.jit(as_jax_function(lambda x: x + weight))
    jax.block_until_ready(f(x))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()):
        for value in range(1, 20):
            torch.cuda._sleep(5_000_000)
            weight.fill_(float(value))
            y = f(x)
            weight.fill_(-1.0)
            close(y, x + value)


def test_an_error_of_the_torch_code_surfaces_at_the_call(x):
    def broken(x):
        if not is_fake(x):
            raise KeyError("a fault of the user's code")
        return x

    with pytest.raises((KeyError, jax.errors.JaxRuntimeError), match="a fault of the user's code"):
        jax.block_until_ready(as_jax_function(broken)(x))


def test_a_module_trains_on_the_gpu(x):
    module = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.BatchNorm1d(8)).cuda()
    apply, variables = as_jax_module(module)

    def loss(params):
        out, buffers = apply({**variables, "params": params}, x, train=True)
        return (out**2).mean(), buffers

    (_, buffers), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    out = module(torch.from_dlpack(x))
    (out**2).mean().backward()
    close(slopes["0.weight"], module[0].weight.grad.cpu())
    close(buffers["1.running_mean"], module[1].running_mean.cpu())


def test_dropout_from_a_key_on_the_gpu(x):
    f = as_jax_function(lambda x: torch.nn.functional.dropout(x, 0.5))
    key = jax.random.key(0)
    close(jax.grad(lambda x: f(x, key=key).sum())(x) * x, f(x, key=key))


def test_a_traced_function_compiled_for_the_other_device_says_what_to_do(x):
    f = jax.jit(as_jax_function(torch.sin), backend="cpu")
    with pytest.raises(RuntimeError, match="default_device"):
        f(np.ones(3, np.float32))
