"""JAX's memory is only read: in-place code gives right answers, and no tensor outlives the memory it looks at."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function, errors
from torchjax_bridge.wrap.torch_in_jax._trace import is_fake

X = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
BEFORE = np.array(X)


def _double(x):
    return x.mul_(2)


def _first_row_to_zero(x):
    x[0].zero_()
    return x


def _through_data(x):
    x.data.add_(1)
    return x * 1


def _out_argument(x):
    return torch.add(x, 1, out=x)


def _index_put(x):
    x[torch.tensor([1]), :] = 7
    return x


IN_PLACE = {
    "mul_": (_double, lambda x: x * 2),
    "view": (_first_row_to_zero, lambda x: x.at[0].set(0)),
    "data": (_through_data, lambda x: x + 1),
    "out": (_out_argument, lambda x: x + 1),
    "index_put": (_index_put, lambda x: x.at[1].set(7)),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_code_gives_right_answers_and_leaves_the_caller_s_arrays(name):
    fn, twin = IN_PLACE[name]
    f = as_jax_function(fn)
    for run in (f, jax.jit(f)):
        np.testing.assert_array_equal(run(X), twin(X))
        np.testing.assert_array_equal(X, BEFORE)
    if name not in ("out", "data"):  # torch has no derivative of out=, and .data hides from autograd
        got = jax.jit(jax.grad(lambda x: (f(x) ** 2).sum()))(X)
        np.testing.assert_allclose(got, jax.grad(lambda x: (twin(x) ** 2).sum())(X), rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(f)(jnp.stack([X, -X]))[1], twin(-X))
    np.testing.assert_array_equal(X, BEFORE)


def test_one_array_passed_twice_and_written_once():
    f = as_jax_function(lambda x, y: (x.mul_(2), y * 1))
    twice, once = jax.jit(lambda x: f(x, x))(X)
    np.testing.assert_array_equal(twice, 2 * BEFORE)
    np.testing.assert_array_equal(once, BEFORE)
    np.testing.assert_array_equal(X, BEFORE)


def test_only_written_inputs_are_copied():
    seen = {}

    def fn(x, y):
        if not is_fake(x):
            seen["x"], seen["y"] = x.data_ptr(), y.data_ptr()
        return x.add_(1) + y

    f = as_jax_function(fn)
    f(X, X)
    assert seen["y"] == X.unsafe_buffer_pointer()
    assert seen["x"] != X.unsafe_buffer_pointer()


def test_an_input_returned_or_viewed_is_an_array_of_its_own():
    f = as_jax_function(lambda x: (x, x.T, x[1:], x))
    same, turned, rest, again = f(X)
    np.testing.assert_array_equal(turned, BEFORE.T)
    np.testing.assert_array_equal(rest, BEFORE[1:])
    pointers = {a.unsafe_buffer_pointer() for a in (X, same, again)}
    assert len(pointers) == 3


def test_a_closed_over_tensor_returned_is_copied():
    weight = torch.ones(3)
    f = as_jax_function(lambda x: weight)
    got = jax.block_until_ready(f(X))
    weight.zero_()
    assert got.tolist() == [1, 1, 1]
    assert f(X).tolist() == [0, 0, 0]  # and read anew in each call


@pytest.mark.parametrize(
    "write",
    [
        lambda c, x: c.add_(x[0]),
        lambda c, x: (c[:2].add_(1), x)[1],
        lambda c, x: (c.data.add_(1), x)[1],
        lambda c, x: (c.view(3, 1).squeeze(1).mul_(0), x)[1],
        lambda c, x: torch.sum(x, 0, out=c),
    ],
)
def test_writing_to_a_closed_over_tensor_is_refused_and_not_done(write):
    closed = torch.full((3,), 5.0)
    with pytest.raises(errors.TransformError, match=r"not one of its arguments.*as_jax_module"):
        as_jax_function(lambda x: write(closed, x))(X)
    assert closed.tolist() == [5, 5, 5]


@pytest.mark.slow
def test_a_tensor_literal_is_the_function_s_own_to_write_to():
    def fn(x):
        row, total = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(0.0)
        row += x[0]
        row[1] = 5
        for part in row:
            total += part**2
        return total

    def twin(x):
        return ((jnp.arange(1.0, 4.0) + x[0]).at[1].set(5) ** 2).sum()

    f = as_jax_function(fn)
    lanes = jnp.stack([X, -X])
    for _ in range(2):  # and not written for good
        np.testing.assert_allclose(f(X), twin(X), rtol=1e-6)
        np.testing.assert_allclose(jax.hessian(f)(X), jax.hessian(twin)(X), rtol=1e-6)
        got, right = (jax.vmap(jax.value_and_grad(g))(lanes) for g in (f, twin))
        for a, b in zip(got, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("view", [torch.from_numpy, torch.as_tensor, torch.asarray])
def test_writing_to_numpy_s_memory_is_refused_and_not_done(view):
    closed = np.full(3, 5, np.float32)
    with pytest.raises(errors.TransformError, match="not one of its arguments"):
        as_jax_function(lambda x: view(closed).add_(x[0]))(X)
    assert closed.tolist() == [5, 5, 5]


def test_batch_norm_in_train_mode_closed_over_is_refused_and_untouched():
    norm = torch.nn.BatchNorm1d(3)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with pytest.raises(errors.TransformError, match="train=True"):
        as_jax_function(norm)(X)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    norm.eval()
    np.testing.assert_allclose(as_jax_function(norm)(X), X / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_batch_norm_statistics_passed_as_arguments_are_not_written():
    def fn(x, mean, var):
        return torch.nn.functional.batch_norm(x, mean, var, training=True), mean, var

    mean, var = jnp.zeros(3), jnp.ones(3)
    for run in (as_jax_function(fn), jax.jit(as_jax_function(fn))):
        _, new_mean, new_var = run(X, mean, var)
        np.testing.assert_allclose(new_mean, 0.1 * BEFORE.mean(0), rtol=1e-4)
        np.testing.assert_allclose(new_var, 0.9 + 0.1 * BEFORE.var(0, ddof=1), rtol=1e-5)
        assert mean.tolist() == [0, 0, 0]
        assert var.tolist() == [1, 1, 1]


def test_a_tensor_that_the_function_always_keeps_is_its_own():
    kept = []
    f = as_jax_function(lambda x: (kept.append(x[1:]), x * 2)[1])
    run = jax.jit(lambda x: f(x + 0))
    for i in range(6):
        jax.block_until_ready(run(X * i))
    real = [tensor for tensor in kept if type(tensor) is torch.Tensor]
    assert len(real) == 6
    for i, tensor in enumerate(real):
        np.testing.assert_array_equal(tensor.numpy(), BEFORE[1:] * i)


def test_a_tensor_that_the_function_keeps_now_and_then_is_moved_off_jax_s_memory():
    """The trace cannot foresee it; the storage is swapped after the call, under every view."""
    kept, calls = [], []

    def sneaky(x):
        calls.append(0)
        if len(calls) > 2:
            kept.append((x, x.T, x[1]))
        return x * 2

    f = as_jax_function(sneaky)
    run = jax.jit(lambda x: f(x + 0))
    for i in range(8):
        jax.block_until_ready(run(X * i))
    assert len(kept) >= 5
    for back, (whole, turned, row) in enumerate(reversed(kept)):
        np.testing.assert_array_equal(whole.numpy(), BEFORE * (7 - back))
        np.testing.assert_array_equal(turned.numpy(), (BEFORE * (7 - back)).T)
        np.testing.assert_array_equal(row.numpy(), BEFORE[1] * (7 - back))


def test_a_kept_tensor_cannot_write_into_jax_afterwards():
    kept, calls = [], []

    def sneaky(x):
        calls.append(0)
        if len(calls) > 1:
            kept.append(x)
        return x.sum()

    f = as_jax_function(sneaky)
    jax.block_until_ready(f(X))
    kept[-1].fill_(99)
    np.testing.assert_array_equal(X, BEFORE)


def test_a_lent_tensor_is_not_kept_alive_by_us():
    seen = []
    f = as_jax_function(lambda x: (seen.append(weakref.ref(x)), x * 2)[1])
    jax.block_until_ready(f(X))
    gc.collect()
    assert all(reference() is None for reference in seen)
