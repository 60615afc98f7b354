"""What may be passed to a wrapped torch function, and what comes back: dtypes, structures, numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_jax_function, errors

X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-5)


def test_keyword_arguments_have_gradients():
    f = as_jax_function(lambda x, *, scale, shift=0: (x * scale + shift).sum())
    close(jax.grad(lambda s: f(X, scale=s))(2.0), X.sum())
    close(jax.jit(jax.grad(lambda s: f(X, scale=1.0, shift=s)))(2.0), X.size)


def test_python_numbers_and_strings_are_static():
    seen = []

    def fn(x, n, mode="up"):
        seen.append((n, mode))
        return x * n if mode == "up" else x / n

    f = as_jax_function(fn)
    close(f(X, 3), X * 3)
    close(jax.jit(lambda x: f(x, 2.0, mode="down"))(X), X / 2)
    assert all(type(n) in (int, float) for n, _ in seen)
    assert f.cache_info().currsize == 2
    f.cache_clear()
    assert f.cache_info().currsize == 0


def test_one_and_true_are_different_static_values():
    f = as_jax_function(lambda x, flag: x * 2 if flag is True else x)
    close(f(X, 1), X)
    close(f(X, True), X * 2)


def test_pytrees_in_and_out():
    f = as_jax_function(lambda tree, pair: {"a": tree["w"] @ pair[0], "b": (pair[1], None, [tree["w"]])})
    out = jax.jit(f)({"w": X}, (X.T, X[0]))
    close(out["a"], X @ X.T)
    close(out["b"][0], X[0])
    assert out["b"][1] is None
    close(out["b"][2][0], X)


def test_a_registered_dataclass_crosses():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Pair:
        left: object
        right: object

    f = as_jax_function(lambda p: Pair(p.right * 2, p.left))
    got = jax.jit(f)(Pair(X, X + 1))
    close(got.left, (X + 1) * 2)
    close(got.right, X)


def test_numbers_in_the_output_become_arrays():
    out = as_jax_function(lambda x: (x.sum(), 3, 2.5, True))(X)
    assert [o.dtype for o in out] == [jnp.float32, jnp.int32, jnp.float32, jnp.bool_]
    assert [o.item() for o in out[1:]] == [3, 2.5, True]


def test_no_arguments_and_no_outputs():
    assert jax.jit(as_jax_function(lambda: torch.arange(3)))().tolist() == [0, 1, 2]
    assert as_jax_function(lambda x: ())(X) == ()


def test_integer_inputs_have_float0_tangents():
    f = as_jax_function(lambda x, i: x[i.long()].sin().sum())
    index = jnp.array([0, 2])
    slope, none = jax.grad(f, argnums=(0, 1), allow_int=True)(X, index)
    close(slope, jax.grad(lambda x: jnp.sin(x[index]).sum())(X))
    assert none.dtype == jax.dtypes.float0


def test_an_int_output_beside_a_float_one_under_grad():
    f = as_jax_function(lambda x: {"loss": (x**2).sum(), "best": x.argmax(-1), "up": x > 0})
    (loss, aux), slope = jax.jit(jax.value_and_grad(lambda x: ((o := f(x))["loss"], o), has_aux=True))(X)
    close(slope, 2 * X)
    assert aux["best"].tolist() == jnp.argmax(X, -1).tolist()
    assert aux["up"].tolist() == (X > 0).tolist()
    close(loss, (X**2).sum())
    _, tangent = jax.jvp(f, (X,), (X,))
    assert tangent["best"].dtype == jax.dtypes.float0
    close(tangent["loss"], (2 * X * X).sum())


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "uint8", "int8", "bool"]
)
def test_every_small_dtype_crosses_both_ways(dtype):
    f = as_jax_function(lambda x: x.clone())
    x = X.astype(dtype)
    got = jax.jit(f)(x)
    assert got.dtype == x.dtype
    assert got.tobytes() == x.tobytes()


def test_gradients_in_bfloat16():
    f = as_jax_function(lambda x: (torch.softmax(x, 0) ** 2).sum())
    got = jax.grad(f)(X.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    close(got.astype(jnp.float32), jax.grad(lambda x: (jax.nn.softmax(x, 0) ** 2).sum())(X), atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_arrays_of_size_zero(shape):
    f = as_jax_function(lambda x: x.sin().sum())
    x = jnp.zeros(shape)
    assert f(x) == 0
    assert jax.jit(jax.grad(f))(x).shape == shape
    assert jax.vmap(f)(jnp.zeros((0, 2))).shape == (0,)
    assert jax.vmap(jax.grad(f))(jnp.zeros((0, 2))).shape == (0, 2)


def test_new_shapes_and_dtypes_just_work_under_one_wrapper():
    f = as_jax_function(lambda x: x.cumsum(0))
    for x in (X, X[:2], X.astype(jnp.bfloat16), jnp.arange(5), X[0]):
        got = jax.jit(f)(x)
        assert got.shape == x.shape
        close(got.astype(jnp.float32), jnp.cumsum(x.astype(jnp.float32), 0), atol=5e-2)


def test_weakly_typed_scalars_are_float32():
    f = as_jax_function(lambda x: x * 2)
    assert jax.jit(f)(1.5).dtype == jnp.float32


# --- complex numbers ---


def complex_twins():
    z = lambda x: jnp.sin(x) * x.conj() + jnp.abs(x)  # noqa: E731
    return as_jax_function(lambda x: torch.sin(x) * x.conj() + x.abs()), z


Z = jnp.asarray(X[:, 0] + 1j * X[:, 1], jnp.complex64)


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "take",
    [
        lambda f: jax.vjp(f, Z)[1](Z * (1 + 2j))[0],
        lambda f: jax.jvp(f, (Z,), (Z * (1 - 2j),))[1],
        lambda f: jax.grad(lambda z: jnp.abs(f(z)).sum())(Z),
        lambda f: jax.vmap(jax.grad(lambda z: jnp.real(f(z))))(Z),
        lambda f: jax.jacfwd(lambda r: jnp.real(f(r + 0j)))(X[0]),
        pytest.param(
            lambda f: jax.hessian(lambda r: jnp.imag(f(r * (1 + 1j))).sum())(X[0]), marks=pytest.mark.slow
        ),
        lambda f: jax.grad(lambda z: jnp.real(jax.vjp(f, z)[1](z)[0]).sum())(Z),
    ],
    ids=["vjp", "jvp", "grad", "vmap-grad", "jacfwd", "hessian", "grad-of-vjp"],
)
def test_complex_derivatives_follow_the_convention_of_jax(take):
    ours, twin = complex_twins()
    close(take(ours), take(twin), atol=1e-4)


def test_real_to_complex_and_back_follow_the_convention_of_jax():
    ours = as_jax_function(torch.fft.rfft)
    x, ct = jnp.arange(6.0), jnp.arange(4) + 1j
    close(jax.vjp(ours, x)[1](ct)[0], jax.vjp(jnp.fft.rfft, x)[1](ct)[0])
    ours = as_jax_function(lambda z: (z * torch.view_as_complex(torch.tensor([0.0, 1.0]))).real)
    close(jax.vjp(ours, Z)[1](X[:, 2])[0], jax.vjp(lambda z: (z * 1j).real, Z)[1](X[:, 2])[0])


def test_a_conjugate_or_negative_view_is_resolved():
    close(as_jax_function(lambda z: z.conj())(Z), Z.conj())
    close(as_jax_function(lambda z: z.conj().imag)(Z), -Z.imag)


# --- 64 bits ---


def test_a_large_int64_output_is_an_error_with_x64_off(x64_off):
    f = as_jax_function(lambda x: {"n": torch.tensor([2**40]), "x": x})
    with pytest.raises(OverflowError, match=r"output\['n'\].*1099511627776.*jax_enable_x64"):
        f(X)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"NarrowingError.*1099511627776"):
        jax.block_until_ready(jax.jit(f)(X))


def test_a_small_int64_output_is_int32_with_x64_off(x64_off):
    got = jax.jit(as_jax_function(lambda x: torch.tensor([2**31 - 1, -(2**31)])))(X)
    assert got.dtype == jnp.int32
    assert got.tolist() == [2**31 - 1, -(2**31)]


def test_a_uint64_output_narrows_only_where_it_fits(x64_off):
    make = lambda n: as_jax_function(lambda x: torch.tensor([n], dtype=torch.uint64))  # noqa: E731
    assert make(2**32 - 1)(X).tolist() == [2**32 - 1]
    for large in (2**32, 2**64 - 1):
        with pytest.raises(OverflowError, match="jax_enable_x64"):
            make(large)(X)


def test_a_float64_output_is_an_error_with_x64_off(x64_off):
    with pytest.raises(errors.DtypeError, match=r"output\['a'\].*float64.*\.to\(torch\.float32\)"):
        jax.eval_shape(as_jax_function(lambda x: {"a": x.double()}), X)


def test_int64_and_float64_cross_as_they_are_with_x64_on(x64_on):
    f = as_jax_function(lambda x: (x.double() / 3, torch.tensor([2**40])))
    out = jax.jit(f)(X)
    assert [o.dtype for o in out] == [jnp.float64, jnp.int64]
    assert out[1].tolist() == [2**40]


def test_a_numpy_integer_argument_that_does_not_fit_is_an_error(x64_off):
    with pytest.raises(OverflowError, match=r"args\[0\].*int64"):
        as_jax_function(lambda x: x)(np.array([2**40]))


def test_64_bit_residuals_cross_to_the_bit_with_x64_off(x64_off):
    """Inside torch the code computes in double and with int64 indices; both survive between the passes."""
    f = as_jax_function(lambda x: (x.double() ** 3).sum().float())
    close(jax.jit(jax.grad(f))(X), 3 * X**2)
    stack = jnp.stack([X, 2 * X])
    close(jax.vmap(jax.grad(f))(stack), 3 * stack**2, atol=1e-4)
    close(jax.vmap(jax.grad(f), in_axes=1, out_axes=1)(X), 3 * X**2)
    pool = as_jax_function(lambda x: torch.nn.functional.max_pool2d(x[None, None], 2).sum())
    twin = lambda x: x[:, :2].reshape(2, 2, 1, 2).max((1, 3)).sum()  # noqa: E731
    close(jax.grad(pool)(X), jax.grad(twin)(X))
    z = as_jax_function(lambda x: (torch.complex(x.double(), x.double().sin()) ** 2).abs().sum().float())
    close(jax.grad(z)(X), jax.grad(lambda x: jnp.abs((x + 1j * jnp.sin(x)) ** 2).sum())(X), atol=1e-4)


def test_one_wrapper_serves_x64_on_and_off():
    f = as_jax_function(lambda x: torch.tensor([2**40]) * x.long().sum())
    with jax.enable_x64(True):
        assert f(jnp.ones(3)).tolist() == [3 * 2**40]
    with jax.enable_x64(False), pytest.raises(OverflowError):
        f(jnp.ones(3, jnp.float32))


# --- refusals ---


def test_a_torch_tensor_argument_is_refused_by_name():
    with pytest.raises(errors.ArgumentError, match=r"kwargs\['w'\] is a torch.Tensor.*to_jax"):
        as_jax_function(lambda x, w: x)(X, w=torch.ones(2))


def test_a_dtype_unknown_to_torch_is_refused_by_name():
    with pytest.raises(errors.DtypeError, match=r"args\[0\]\['a'\].*int4"):
        as_jax_function(lambda x: x)({"a": jnp.ones(2, jnp.int4)})


def test_an_unhashable_static_value_is_refused_by_name():
    with pytest.raises(errors.ArgumentError, match=r"args\[1\]"):
        as_jax_function(lambda x, y: x)(X, {1, 2})


def test_an_output_that_is_no_tensor_is_refused_by_name():
    with pytest.raises(errors.OutputError, match=r"output\['s'\].*str"):
        as_jax_function(lambda x: {"s": "text"})(X)
    with pytest.raises(errors.OutputError, match="sparse"):
        as_jax_function(lambda x: x.to_sparse())(X)


def test_an_unknown_residuals_option_is_refused():
    with pytest.raises(errors.ArgumentError, match="recompute"):
        as_jax_function(torch.sin, residuals="some")


def test_static_zeros_of_either_sign_are_different_static_values():
    f = as_jax_function(lambda x, by: x / by)
    assert f(jnp.ones(2), 0.0).tolist() == [np.inf, np.inf]
    assert f(jnp.ones(2), -0.0).tolist() == [-np.inf, -np.inf]


def test_an_int32_output_may_be_announced_for_int64_with_x64_off(x64_off):
    struct = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    where = as_jax_function(lambda x: x.nonzero(), output_shape=struct)
    assert jax.jit(where)(jnp.array([3.0, 0.0, 1.0])).tolist() == [[0], [2]]
    lanes = jax.vmap(where)(jnp.array([[3.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    assert lanes[1].tolist() == [[1], [2]]
    assert lanes.dtype == jnp.int32
    traced = as_jax_function(lambda x: x.argsort()[:2, None], output_shape=struct)
    assert traced(jnp.array([3.0, 0.0, 1.0])).tolist() == [[1], [2]]
    far = as_jax_function(lambda x: x.nonzero() + 2**40, output_shape=struct)
    with pytest.raises(errors.NarrowingError):
        far(jnp.array([3.0, 0.0, 1.0]))
    with pytest.raises(errors.OutputError, match=r"announced as int32\[2,1\] and is float32"):
        as_jax_function(lambda x: x.nonzero().float(), output_shape=struct)(jnp.array([3.0, 0.0, 1.0]))


def test_int64_is_not_narrowed_for_an_announced_int32_with_x64_on(x64_on):
    f = as_jax_function(lambda x: x.nonzero(), output_shape=jax.ShapeDtypeStruct((2, 1), jnp.int32))
    with pytest.raises(errors.OutputError, match="is int64"):
        f(jnp.array([3.0, 0.0, 1.0]))


def test_numpy_arrays_that_hold_no_numbers_are_refused_by_name():
    with pytest.raises(errors.ArgumentError, match=r"args\[0\]\['x'\] is a numpy array of dtype <U1"):
        as_jax_function(lambda d: d["x"])({"x": np.array(["a", "b"])})


def test_what_is_no_function_is_refused_at_once():
    with pytest.raises(errors.ArgumentError, match="got an int"):
        as_jax_function(3)
