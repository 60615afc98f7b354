"""What torch code raises reaches the user, and leaves nothing broken behind."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function, errors
from torchjax_bridge.wrap.torch_in_jax._trace import is_fake

X = jnp.arange(6.0).reshape(2, 3)


class CustomError(Exception):
    pass


def fails_when_run(x):
    if not is_fake(x):
        raise CustomError("the cat sat on the mat")
    return x * 2


def test_eagerly_the_exception_itself_arrives_from_the_first_call_and_from_later_ones():
    f = as_jax_function(fails_when_run)
    for _ in range(3):
        with pytest.raises(CustomError, match="the cat sat on the mat") as caught:
            f(X)
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert any(frame.name == "fails_when_run" for frame in frames)


def test_eagerly_the_exception_arrives_where_earlier_calls_went_well():
    f = as_jax_function(lambda x: x if is_fake(x) or x.sum() > 0 else fails_when_run(x))
    for _ in range(3):
        assert (f(X) == X).all()
    with pytest.raises(CustomError):
        f(-X)
    assert (f(X) == X).all()


def test_compiled_its_type_message_and_traceback_arrive_as_text():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(as_jax_function(fails_when_run))(X))
    text = str(caught.value)
    assert "CustomError: the cat sat on the mat" in text
    assert "in fails_when_run" in text


def test_an_error_under_trace_arrives_as_it_is():
    with pytest.raises(RuntimeError, match="reduction dim"):
        jax.jit(as_jax_function(lambda x: x @ x))(X)


def test_an_error_in_a_backward_arrives():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise CustomError("no way back")

    f = as_jax_function(lambda x: Fails.apply(x).sum())
    assert f(X) == X.sum()
    with pytest.raises(CustomError, match="no way back"):
        jax.grad(f)(X)


def test_after_an_error_everything_still_works():
    bad, good = as_jax_function(fails_when_run), as_jax_function(lambda x: torch.sin(x).sum())
    for take in (lambda f: f(X), lambda f: jax.jit(f)(X), lambda f: jax.jit(lambda x: f(f(x)))(X)):
        with pytest.raises((CustomError, jax.errors.JaxRuntimeError)):
            jax.block_until_ready(take(bad))
        np.testing.assert_allclose(jax.hessian(good)(X[0]), -jnp.diag(jnp.sin(X[0])), atol=1e-6)
        assert torch.func.grad(lambda x: (x**2).sum())(torch.ones(2)).tolist() == [2, 2]


def test_a_missing_derivative_is_named():
    f = as_jax_function(lambda x: torch.special.zeta(x + 2, x + 1).sum())
    assert np.isfinite(f(X))
    with pytest.raises(errors.TransformError, match="zeta"):
        jax.grad(f)(X)
    twice = as_jax_function(lambda x: torch.cdist(x, 2 * x).sum())
    jax.grad(twice)(X + jnp.eye(2, 3))
    with pytest.raises(errors.TransformError, match="_cdist_backward"):
        jax.hessian(twice)(X + jnp.eye(2, 3))


def test_an_index_of_32_bits_where_torch_wants_64_says_what_to_write(x64_off):
    with pytest.raises(RuntimeError) as caught:
        as_jax_function(lambda x, i: torch.ops.aten.nll_loss_forward(x, i, None, 1, -100))(
            X, jnp.array([0, 1])
        )
    assert "tensor.long()" in caught.value.__notes__[-1]


def test_code_that_depends_on_values_asks_for_output_shape():
    for fn in (
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 1],
        lambda x: torch.from_numpy(np.sin(x.numpy())),
        lambda x: x * float(x.max()),
    ):
        with pytest.raises(errors.OutputError, match="output_shape="):
            as_jax_function(fn)(X)


def test_a_wrong_output_shape_is_an_error_and_never_a_broadcast():
    def fn(x):
        return x[x > 1] if x.sum() > 0 else x

    one = as_jax_function(fn, output_shape=jax.ShapeDtypeStruct((4,), jnp.float32))
    assert one(X).tolist() == [2, 3, 4, 5]
    with pytest.raises(errors.OutputError, match=r"announced as float32\[4\] and is float32\[1\]"):
        one(jnp.array([[0.0, 0.0, 9.0]]))  # one element, which a copy would spread over four
    with pytest.raises(jax.errors.JaxRuntimeError, match="OutputError"):
        jax.block_until_ready(jax.jit(one)(jnp.array([[0.0, 0.0, 9.0]])))
    half = as_jax_function(fn, output_shape=jax.ShapeDtypeStruct((4,), jnp.bfloat16))
    with pytest.raises(errors.OutputError, match="bfloat16"):
        half(X)
    other = as_jax_function(fn, output_shape={"y": jax.ShapeDtypeStruct((4,), jnp.float32)})
    with pytest.raises(errors.OutputError, match="announced as"):
        other(X)


def test_an_output_shape_that_the_trace_contradicts_is_an_error_before_anything_runs():
    f = as_jax_function(lambda x: x.sum(), output_shape=jax.ShapeDtypeStruct((4,), jnp.float32))
    with pytest.raises(errors.OutputError, match="leave it out"):
        jax.eval_shape(f, X)
    with pytest.raises(errors.ArgumentError, match="ShapeDtypeStruct"):
        as_jax_function(lambda x: x[x > 1], output_shape=(3,))(X)


def test_control_flow_operators_are_refused_with_what_to_write():
    f = as_jax_function(lambda x: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)))
    with pytest.raises(errors.TransformError, match=r"jax\.lax\.cond"):
        f(jnp.ones(3))
