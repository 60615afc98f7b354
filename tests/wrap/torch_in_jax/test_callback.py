"""The adapter to XLA: over its own buffers, and over host copies where that is not to be had."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function, errors
from torchjax_bridge.wrap.torch_in_jax import _callback, _torch_internals, _vmap

X = jnp.asarray(np.random.default_rng(10).normal(size=(4, 3)), jnp.float32)


@pytest.fixture(params=["buffers", "host copies"])
def path(request, monkeypatch):
    if request.param == "host copies":
        monkeypatch.setattr(_callback, "buffer_callback", None)
    return request.param


def test_the_buffer_path_is_taken_here():
    assert _callback.buffer_callback is not None
    text = jax.jit(as_jax_function(torch.sin)).lower(X).as_text()
    assert "xla_buffer_python_cpu_callback" in text


def test_the_host_path_is_taken_where_it_must(monkeypatch):
    monkeypatch.setattr(_callback, "buffer_callback", None)
    text = jax.jit(as_jax_function(torch.sin)).lower(X).as_text()
    assert "buffer" not in text
    assert "callback" in text


def test_values_derivatives_and_lanes(path):
    f = as_jax_function(lambda x: torch.tanh(x).sum())
    twin = lambda x: jnp.tanh(x).sum()  # noqa: E731
    for take in (lambda f: f(X), lambda f: jax.grad(f)(X), lambda f: jax.vmap(jax.grad(f))(X)):
        np.testing.assert_allclose(take(f), take(twin), rtol=1e-5)
        np.testing.assert_allclose(jax.jit(lambda take=take: take(f))(), take(twin), rtol=1e-5)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "bool", "complex64", "int8", "float32"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_dtypes_and_shapes(path, dtype, shape):
    x = jnp.ones(shape, dtype)
    got = jax.jit(as_jax_function(lambda x: x.clone()))(x)
    assert got.dtype == x.dtype
    assert got.shape == shape
    assert got.tobytes() == x.tobytes()


def test_in_place_code_leaves_the_caller_s_arrays(path):
    before = np.array(X)
    np.testing.assert_allclose(as_jax_function(lambda x: x.mul_(2))(X), 2 * before)
    np.testing.assert_array_equal(X, before)


def test_errors_and_narrowing(path):
    with pytest.raises(OverflowError):
        as_jax_function(lambda x: torch.tensor(2**40))(X)
    f = as_jax_function(lambda x: (x.double() ** 3).sum().float())
    np.testing.assert_allclose(jax.jit(jax.grad(f))(X), 3 * X**2, rtol=1e-5)


# --- the names of torch that are not promised ---


def test_every_name_that_tracing_rests_on_is_there():
    assert _torch_internals.MISSING is None


@pytest.mark.slow
def test_without_the_tracer_announced_code_still_has_value_derivatives_and_lanes(monkeypatch):
    monkeypatch.setattr(_torch_internals, "MISSING", ImportError("no module named 'proxy_tensor'"))
    with pytest.raises(errors.OutputError, match=r"output_shape=.*") as caught:
        as_jax_function(torch.sin)(X)
    assert "proxy_tensor" in str(caught.value)
    f = as_jax_function(lambda x: torch.tanh(x).sum(), output_shape=jax.ShapeDtypeStruct((), jnp.float32))
    twin = lambda x: jnp.tanh(x).sum()  # noqa: E731
    for take in (lambda f: f(X), lambda f: jax.grad(f)(X), lambda f: jax.vmap(jax.grad(f))(X)):
        np.testing.assert_allclose(jax.jit(lambda take=take: take(f))(), take(twin), rtol=1e-5)
    np.testing.assert_allclose(jax.hessian(f)(X[0]), jax.hessian(twin)(X[0]), rtol=1e-4, atol=1e-6)


def test_without_decompositions_and_the_list_of_batching_rules_lanes_are_still_right(monkeypatch):
    monkeypatch.setattr(_vmap, "decompositions", lambda operators: {})
    monkeypatch.setattr(_vmap, "has_batching_rule", lambda operator: True)
    norm = torch.nn.BatchNorm1d(3).eval()
    got = jax.vmap(as_jax_function(norm))(jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(got[1], 2 * X / np.sqrt(1 + 1e-5), rtol=1e-5)


# --- on a GPU, for which CPU memory and streams that note their order stand in ---------------------------------


@pytest.mark.parametrize("closes_over", [True, False])
def test_torch_runs_on_xlas_stream_between_two_waits_for_the_callers_stream(monkeypatch, closes_over):
    order = []

    class Stream:
        def __init__(self, name, index=0):
            self.name = name

        def wait_stream(self, other):
            order.append(f"{self.name} waits for {other.name}")

    class Buffer:
        """An operand or a result of XLA's."""

        def __init__(self, value):
            self.tensor = torch.full((2,), value)

        def __dlpack__(self):
            return self.tensor.__dlpack__()

        def __dlpack_device__(self):
            return 2, 0

    inside = [Stream("the caller")]

    @contextlib.contextmanager
    def switch(stream):
        inside.append(stream)
        yield
        inside.pop()

    def fill(outs, ins):
        order.append(f"torch runs on {inside[-1].name}")
        outs[0].copy_(ins[0] + 1)

    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: inside[-1])
    monkeypatch.setattr(torch.cuda, "device", lambda index: switch(Stream("the default")))
    monkeypatch.setattr(torch.cuda, "stream", switch)
    monkeypatch.setattr(_callback, "_filler", lambda op, device, errors: fill)
    op = types.SimpleNamespace(device=torch.device("cuda", 0), closes_over=closes_over)
    out = Buffer(0.0)
    _callback._over_buffers(op, None)(types.SimpleNamespace(stream="XLA"), [out], Buffer(4.0))
    assert out.tensor.tolist() == [5.0, 5.0]
    waits = ["XLA waits for the caller", "the caller waits for XLA"] if closes_over else []
    assert order == [*waits[:1], "torch runs on XLA", *waits[1:]]
