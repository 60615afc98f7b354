"""Several devices and several threads at once: right values, the sums over devices in place, no deadlock."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from torchjax_bridge import as_jax_function

RNG = np.random.default_rng(9)
X = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32) * 0.3


def twin(x, w):
    return jnp.tanh(x @ w).sum(-1)


@pytest.fixture
def wrapped():
    return as_jax_function(lambda x, w: torch.tanh(x @ w).sum(-1))


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(f, mesh, check_vma=True):
    p = PartitionSpec
    return jax.shard_map(f, mesh=mesh, in_specs=(p("i"), p()), out_specs=p("i"), check_vma=check_vma)


def agree(ours, theirs, atol=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_value_and_gradient_of_sharded_and_replicated_inputs(wrapped, mesh, check_vma):
    def loss(f, x, w):
        return (sharded(f, mesh, check_vma)(x, w) ** 2).sum()

    agree(jax.jit(sharded(wrapped, mesh, check_vma))(X, W), twin(X, W))
    got = jax.jit(jax.value_and_grad(lambda x, w: loss(wrapped, x, w), (0, 1)))(X, W)
    agree(got, jax.value_and_grad(lambda x, w: (twin(x, w) ** 2).sum(), (0, 1))(X, W))


@pytest.mark.slow
def test_shard_map_jvp_and_hessian(wrapped, mesh):
    agree(
        jax.jit(lambda x, w: jax.jvp(sharded(wrapped, mesh), (x, w), (x, w)))(X, W),
        jax.jvp(twin, (X, W), (X, W)),
    )
    agree(
        jax.jit(jax.hessian(lambda w: (sharded(wrapped, mesh)(X, w) ** 2).sum()))(W),
        jax.hessian(lambda w: (twin(X, w) ** 2).sum())(W),
        atol=1e-3,
    )


def test_a_gradient_taken_inside_shard_map_sums_over_the_devices(wrapped, mesh):
    """With the default check_vma: a replicated input is cast to varying, so its cotangent is summed."""
    p = PartitionSpec

    def step(f):
        def inside(x, w):
            return jax.value_and_grad(lambda w: jax.lax.psum((f(x, w) ** 2).sum(), "i"))(w)

        return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(p("i"), p()), out_specs=(p(), p())))

    agree(step(wrapped)(X, W), step(twin)(X, W))
    agree(step(wrapped)(X, W)[1], jax.grad(lambda w: (twin(X, w) ** 2).sum())(W))


def test_vmap_inside_shard_map(wrapped, mesh):
    lanes = lambda f: jax.jit(sharded(lambda x, w: jax.vmap(f, (0, None))(x, w), mesh))  # noqa: E731
    agree(lanes(wrapped)(X, W), twin(X, W))


def test_sharded_arrays_outside_shard_map(mesh):
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("i")))
    f = as_jax_function(lambda x: x.cumsum(0).sin())
    for run in (f, jax.jit(f)):
        agree(run(x), jnp.sin(jnp.cumsum(X, 0)))
    agree(jax.jit(jax.grad(lambda x: f(x).sum()))(x), jax.grad(lambda x: jnp.sin(jnp.cumsum(x, 0)).sum())(X))


def test_the_result_lives_where_the_argument_lives():
    device = jax.devices()[2]
    y = as_jax_function(torch.sin)(jax.device_put(X, device))
    assert y.devices() == {device}
    assert not as_jax_function(torch.sin)(X).committed


def in_threads(count, work):
    failures = []

    def guarded(i):
        try:
            work(i)
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 120
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if failures:
        raise failures[0]


def test_eight_threads_share_one_compiled_function_and_its_derivatives(wrapped):
    fn = lambda x: wrapped(x, W).sum()  # noqa: E731
    ref = lambda x: twin(x, W).sum()  # noqa: E731
    run = jax.jit(lambda x: (fn(x), jax.grad(fn)(x), jax.jvp(fn, (x,), (x,))[1]))
    expected = [(ref(x), jax.grad(ref)(x), jax.jvp(ref, (x,), (x,))[1]) for x in (X * i for i in range(8))]

    def work(i):
        for _ in range(10):
            agree(run(X * i), expected[i], atol=1e-4)

    in_threads(8, work)


def test_eight_threads_trace_different_functions_at_once():
    def work(i):
        f = as_jax_function(lambda x: (torch.sin(x * i) * x).sum())
        agree(jax.hessian(f)(X[0]), jax.hessian(lambda x: (jnp.sin(x * i) * x).sum())(X[0]), atol=1e-3)

    in_threads(8, work)


def test_threads_on_different_devices_with_results_still_being_computed():
    """Each call reads what another callback is still computing; a wait that held the GIL would be for ever."""
    f = as_jax_function(lambda x: torch.tanh(x @ x))
    run = jax.jit(f)
    square = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32) * 0.1
    expected = square
    for _ in range(12):
        expected = jnp.tanh(expected @ expected)

    def work(i):
        x = jax.device_put(square, jax.devices()[i % 4])
        for _ in range(6):
            x = f(run(x))
        agree(x, expected)

    in_threads(8, work)


def test_two_functions_in_one_program_run_on_all_devices(mesh):
    a, b = as_jax_function(torch.sin), as_jax_function(torch.cos)
    f = jax.jit(sharded(lambda x, w: (a(x @ w) * b(x @ w)).sum(-1), mesh))
    for _ in range(5):
        agree(f(X, W), (jnp.sin(X @ W) * jnp.cos(X @ W)).sum(-1))
