"""A JAX function on CUDA tensors: streams keep the order, and the host never waits."""

import copy

import jax
import jax.numpy as jnp
import pytest
import torch

from torchjax_bridge.wrap import as_torch_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

# About a tenth of a second of GPU time: longer than any call takes to be launched.
LONG = 200_000_000


@pytest.fixture(autouse=True)
def exact_products():
    """JAX's products in float32, as torch's are, rather than in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


def mlp(x, w):
    return jnp.tanh(x @ w), (x @ w).argmax()


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(64, 128, device="cuda"), torch.randn(128, 32, device="cuda").requires_grad_()


def warm(f, x, w):
    """Compile everything that the tests below time by order alone."""
    for _ in range(2):
        f(x, w)[0].sum().backward()
        with torch.no_grad():
            f(x, w)
    w.grad = None
    torch.cuda.synchronize()


def test_values_and_gradients_are_on_the_device_and_agree_with_torch(inputs):
    x, w = inputs
    f = as_torch_function(mlp)
    y, n = f(x, w)
    (mine,) = torch.autograd.grad(y.sum(), w)
    (penalty,) = torch.autograd.grad(f(x, w)[0].sum(), w, create_graph=True)
    (second,) = torch.autograd.grad((penalty**2).sum(), w)
    expected = torch.tanh(x @ w)
    assert (y.device, n.device, mine.device) == (x.device,) * 3
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    (first,) = torch.autograd.grad(expected.sum(), w, create_graph=True)
    torch.testing.assert_close(mine, first, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(second, torch.autograd.grad((first**2).sum(), w)[0], rtol=1e-2, atol=1e-2)


def test_the_host_waits_in_neither_direction(inputs):
    x, w = inputs
    f = as_torch_function(mlp)
    warm(f, x, w)
    torch.cuda.set_sync_debug_mode("error")  # torch's own synchronising calls raise
    try:
        torch.cuda._sleep(LONG)
        before = torch.cuda.Event()
        before.record()
        y, _ = f(x, w)
        forward_waited = before.query()
        y.sum().backward()
        backward_waited = before.query()
        with torch.no_grad():
            f(x, w)
        plain_waited = before.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not forward_waited
    assert not backward_waited
    assert not plain_waited
    torch.cuda.synchronize()
    torch.testing.assert_close(w.grad, (x.T @ (1 - torch.tanh(x @ w) ** 2)).detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("side_stream", [False, True])
def test_jax_reads_what_torch_has_yet_to_write(inputs, side_stream):
    x, _ = inputs
    f = as_torch_function(lambda x: x * 2 + 1)
    f(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    for i in range(5):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG // 10)
            x.fill_(float(i))
            y = f(x)
            total = y.sum()
        stream.synchronize()
        assert total.item() == (2 * i + 1) * x.numel()


@pytest.mark.parametrize("side_stream", [False, True])
def test_torch_may_write_to_an_argument_and_a_cotangent_as_soon_as_the_call_returns(side_stream):
    f = as_torch_function(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x / 1024), x))
    x = torch.randn(1024, 1024, device="cuda")
    expected = f(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            work = x.clone()
            result = f(work)
            work.zero_()
            del work
            torch.full_like(x, float("nan"))  # takes the memory that was freed, if it was freed too soon
            stream.synchronize()
            assert torch.equal(result, expected)


def test_the_backward_pass_runs_on_the_stream_of_the_forward_pass(inputs):
    x, w = inputs
    f = as_torch_function(mlp)
    warm(f, x, w)
    expected = torch.autograd.grad(f(x, w)[0].sum(), w)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG // 10)
        y, _ = f(x, w)
    torch.cuda.current_stream().wait_stream(stream)
    (mine,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(mine, expected)


def test_results_share_memory_with_nothing_on_the_device(inputs):
    x, _ = inputs
    constant = jnp.arange(16.0, device=jax.devices("gpu")[0])
    f = as_torch_function(lambda x: (x, x, constant))
    results = f(x)
    pointers = {tensor.data_ptr() for tensor in results}
    assert len(pointers) == 3
    assert not pointers & {x.data_ptr(), constant.unsafe_buffer_pointer()}
    for tensor in results:
        tensor.fill_(-1)
    assert constant.tolist() == list(range(16))


def test_transforms_and_compile_on_the_device(inputs):
    x, w = inputs
    f = as_torch_function(lambda x, w: jnp.tanh(x @ w).sum())
    w = w.detach()
    mine = torch.func.vmap(torch.func.grad(f, 1), (0, None))(x, w)
    native = torch.func.vmap(torch.func.grad(lambda x, w: torch.tanh(x @ w).sum(), 1), (0, None))(x, w)
    torch.testing.assert_close(mine, native, rtol=1e-2, atol=1e-2)
    compiled = torch.compile(lambda x: f(x, w) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x, w) * 2)


def test_a_module_moves_to_the_device_and_draws_from_its_generator():
    from flax import nnx

    from torchjax_bridge import as_torch_module

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.bn = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.bn(self.fc(x)))

    module = as_torch_module(Net(nnx.Rngs(0)))
    x = torch.randn(16, 8)
    expected = copy.deepcopy(module).eval()(x)
    module.to("cuda")
    torch.testing.assert_close(module.eval()(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
    module.train()
    torch.cuda.manual_seed(0)
    first, second = module(x.cuda()), module(x.cuda())
    torch.cuda.manual_seed(0)
    assert torch.equal(module(x.cuda()) == 0, first == 0)
    assert not torch.equal(first == 0, second == 0)
    assert all(buffer.is_cuda for buffer in module.buffers())
