"""Gradients of a JAX function called from torch, against native torch and finite differences."""

import threading
import traceback

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from tests.wrap.programs import leaf, program_of
from torchjax_bridge.errors import ExchangeError
from torchjax_bridge.wrap import as_torch_function
from torchjax_bridge.wrap.jax_in_torch import _autograd
from torchjax_bridge.wrap.jax_in_torch._linearized import Linearized

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


# --- values ----------------------------------------------------------------------------------------------

FUNCTIONS = {
    "mlp": (
        lambda x, w, b: jnp.tanh(x @ w + b),
        lambda x, w, b: torch.tanh(x @ w + b),
        [(2, 3), (3, 2), (2,)],
    ),
    "reductions": (
        lambda x: (jnp.sin(x).sum(0), jnp.max(x), x.mean()),
        lambda x: (torch.sin(x).sum(0), torch.max(x), x.mean()),
        [(2, 3)],
    ),
    "softmax": (lambda x: jax.nn.softmax(x, 0), lambda x: torch.softmax(x, 0), [(2, 3)]),
    "scan": (
        lambda x, c: jax.lax.scan(lambda c, x: (jnp.sin(c * x), c), c, x),
        None,
        [(3,), ()],
    ),
    "cond": (lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), None, [(3,)]),
    "checkpoint": (lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x), None, [(3,)]),
    "inner_jit": (lambda x: jax.jit(jnp.sin)(x) * jax.jit(lambda x: x)(x), None, [(3,)]),
    "solve": (jnp.linalg.solve, torch.linalg.solve, [(2, 2), (2,)]),
    "indexing": (lambda x: x[jnp.array([0, 2, 0])] * x[1:], None, [(4,)]),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_agree_with_finite_differences(name, x64_on):
    mine, _, shapes = FUNCTIONS[name]
    f = as_torch_function(mine)
    inputs = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert gradcheck(f, inputs, check_undefined_grad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_undefined_grad=True, check_batched_grad=True)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["mlp", "scan", "softmax"])
def test_forward_mode_agrees_with_finite_differences(name, x64_on):
    mine, _, shapes = FUNCTIONS[name]
    f = as_torch_function(mine)
    inputs = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", [name for name, case in FUNCTIONS.items() if case[1]])
def test_values_and_gradients_agree_with_native_torch(name, x64_on):
    mine, native, shapes = FUNCTIONS[name]
    inputs = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    results = [f(*inputs) for f in (as_torch_function(mine), native)]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    torch.testing.assert_close(*results)
    weights = [torch.randn_like(r) for r in results[0]]
    torch.testing.assert_close(
        grad(results[0], inputs, weights, retain_graph=True), grad(results[1], inputs, weights)
    )


def test_float32_gradients_agree_with_native_torch():
    f = as_torch_function(lambda x, w: jnp.tanh(x @ w))
    x, w = leaf(8, 16, dtype=torch.float32), leaf(16, 4, dtype=torch.float32)
    mine, theirs = grad(f(x, w).sum(), (x, w)), grad(torch.tanh(x @ w).sum(), (x, w))
    torch.testing.assert_close(mine, theirs)


def test_the_third_and_fourth_derivative_are_right(x64_on):
    f = as_torch_function(lambda x: jnp.sin(x) * x**2)
    x = leaf(3)
    mine, native = f(x).sum(), (torch.sin(x) * x**2).sum()
    for _ in range(4):
        (mine,) = grad(mine.sum(), x, create_graph=True)
        (native,) = grad(native.sum(), x, create_graph=True)
        torch.testing.assert_close(mine, native)


def test_a_scaled_loss_scales_the_gradient():
    f = as_torch_function(lambda x: (x**2).sum())
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (2 * f(x)).backward()
    assert x.grad.tolist() == [4.0, 8.0]


def test_a_gradient_penalty_trains_like_native_torch(x64_on):
    x = leaf(5, 3).detach()

    def penalty(f, w):
        point = x.clone().requires_grad_()
        (g,) = grad(f(point, w).sum(), point, create_graph=True)
        ((g.norm(dim=1) - 1) ** 2).mean().backward()
        return w.grad

    mine = penalty(as_torch_function(lambda x, w: jnp.tanh(x @ w) ** 2), leaf(3, 2))
    native = penalty(lambda x, w: torch.tanh(x @ w) ** 2, leaf(3, 2))
    torch.testing.assert_close(mine, native)


def test_hessian_jacobian_and_products_of_autograd_functional(x64_on):
    functional = torch.autograd.functional
    f, native = as_torch_function(lambda x: (jnp.sin(x) * x**2).sum()), lambda x: (torch.sin(x) * x**2).sum()
    sin = as_torch_function(jnp.sin)
    x, v = leaf(4).detach(), leaf(4, seed=1).detach()
    for vectorize in (False, True):
        torch.testing.assert_close(
            functional.hessian(f, x, vectorize=vectorize), functional.hessian(native, x)
        )
        for strategy in ("reverse-mode", *(["forward-mode"] if vectorize else [])):
            torch.testing.assert_close(
                functional.jacobian(sin, x, vectorize=vectorize, strategy=strategy),
                functional.jacobian(torch.sin, x),
            )
    one = torch.ones((), dtype=torch.float64)
    for product, vector in (
        (functional.hvp, v),
        (functional.vhp, v),
        (functional.jvp, v),
        (functional.vjp, one),
    ):
        torch.testing.assert_close(product(f, x, vector), product(native, x, vector))


def test_batched_cotangents_of_autograd_grad(x64_on):
    f = as_torch_function(lambda x, w: jnp.tanh(x @ w))
    x, w = leaf(3, 4), leaf(4, 2)
    cotangents = torch.randn(5, 3, 2, dtype=torch.float64)
    mine = grad(f(x, w), (x, w), cotangents, is_grads_batched=True)
    torch.testing.assert_close(mine, grad(torch.tanh(x @ w), (x, w), cotangents, is_grads_batched=True))


# --- complex ---------------------------------------------------------------------------------------------

COMPLEX = {
    "holomorphic": (lambda z: jnp.sin(z) * (1 + 2j), lambda z: torch.sin(z) * (1 + 2j)),
    "conjugate": (lambda z: jnp.conj(z) * z**2, lambda z: z.conj() * z**2),
    "to_real": (lambda z: jnp.abs(z) ** 2 + jnp.real(z), lambda z: z.abs() ** 2 + z.real),
    "matmul": (lambda z: z @ jnp.conj(z).T, lambda z: z @ z.conj().T),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_gradients_follow_torchs_convention(name, x64_on):
    mine, native = COMPLEX[name]
    z = leaf(2, 2, dtype=torch.complex128)
    f = as_torch_function(mine)
    a, b = f(z), native(z)
    torch.testing.assert_close(a, b)
    cotangent = torch.randn_like(b)
    (first,) = grad(a, z, cotangent, create_graph=True)
    (expected,) = grad(b, z, cotangent, create_graph=True)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(grad(f(z), z, cotangent), (expected,))  # through the residuals
    second = grad(first, z, cotangent.sum() * torch.ones_like(first))
    torch.testing.assert_close(second, grad(expected, z, cotangent.sum() * torch.ones_like(first)))
    assert gradcheck(f, (z,), check_forward_ad=True)
    assert gradgradcheck(f, (z,))


def test_a_real_input_of_a_complex_function_has_a_real_gradient(x64_on):
    x, z = leaf(3), leaf(3, dtype=torch.complex128)
    f = as_torch_function(lambda x, z: x * z * jnp.exp(1j * x))
    native = x * z * torch.exp(1j * x)
    cotangent = torch.randn_like(native)
    mine = grad(f(x, z), (x, z), cotangent)
    torch.testing.assert_close(mine, grad(native, (x, z), cotangent))
    assert mine[0].dtype is torch.float64


def test_complex64_gradients_without_x64():
    z = leaf(3, dtype=torch.complex64)
    f = as_torch_function(lambda z: jnp.exp(z))
    cotangent = torch.randn_like(z)
    torch.testing.assert_close(grad(f(z), z, cotangent), grad(torch.exp(z), z, cotangent))


# --- which cotangents, which inputs ------------------------------------------------------------------------


def test_unused_results_and_integers_beside_floats_cost_no_gradient():
    f = as_torch_function(lambda x: (x * 2, {"unused": jnp.sin(x), "n": x.astype(int), "b": x > 0}))
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    used, rest = f(x)
    used.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
    assert rest["unused"].requires_grad
    assert not rest["n"].requires_grad
    assert not rest["b"].requires_grad


def test_an_unused_result_brings_no_nan():
    f = as_torch_function(lambda x: (x * 2, jnp.log(x), jnp.sqrt(x)))
    x = torch.zeros(2, requires_grad=True)
    f(x)[0].sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]  # with a zero cotangent, 0 * inf would be nan
    (g,) = grad(f(x)[0].sum(), x, create_graph=True)
    assert g.tolist() == [2.0, 2.0]
    assert torch.func.grad(lambda x: f(x)[0].sum())(torch.zeros(2)).tolist() == [2.0, 2.0]


@jax.custom_vjp
def doubled(x, y):
    return x * y, x + y


doubled.defvjp(
    lambda x, y: (doubled(x, y), (x, y)), lambda r, ct: (2 * ct[0] * r[1] + ct[1], 2 * ct[0] * r[0])
)


def test_a_custom_vjp_is_respected_with_all_and_with_some_cotangents():
    f = as_torch_function(lambda x, y: doubled(x, y))
    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    product, total = f(x, y)
    assert grad(product + total, (x, y), retain_graph=True) == (11.0, 6.0)
    assert grad(product, (x, y), retain_graph=True) == (10.0, 6.0)
    assert grad(total, (x, y)) == (1.0, 0.0)
    first = grad(sum(f(x, y)), (x, y), create_graph=True)
    assert first == (11.0, 6.0)
    assert grad(first[0], y) == (2.0,)


def test_a_cotangent_without_strides_goes_back():
    f = as_torch_function(lambda x: x * 3)
    x = torch.ones(5, requires_grad=True)
    f(x).sum().backward()  # torch sends an expanded tensor of stride 0
    assert x.grad.tolist() == [3.0] * 5


def test_an_unaligned_cotangent_goes_back():
    f = as_torch_function(lambda x: x * 3)
    x = torch.ones(5, requires_grad=True)
    f(x).backward(torch.arange(6.0)[1:])
    assert x.grad.tolist() == [3.0, 6.0, 9.0, 12.0, 15.0]


def test_only_inputs_that_require_grad_are_differentiated():
    f = as_torch_function(lambda x, w: jnp.tanh(x @ w).sum())
    x, w = torch.randn(8, 4), torch.randn(4, 2, requires_grad=True)
    f(x, w).backward()
    assert x.grad is None
    linear = Linearized.of(program_of(f), (1,))
    pullback = linear.pullback((0,))
    assert len(pullback.outputs) == 1
    dots = str(pullback.jaxpr).count("dot_general")
    assert dots == 1  # for w alone; the product for x's gradient is not there
    both = Linearized.of(program_of(f), (0, 1)).pullback((0,))
    assert str(both.jaxpr).count("dot_general") == 2


def test_a_function_without_a_differentiable_result_or_argument_builds_no_graph():
    f = as_torch_function(lambda x: x.astype(int))
    assert f(torch.ones(2, requires_grad=True)).grad_fn is None
    g = as_torch_function(lambda n: n * 1.5)
    assert g(torch.ones(2, dtype=torch.int32)).grad_fn is None


def test_an_argument_passed_twice_has_the_sum_of_both_gradients():
    f = as_torch_function(lambda x, y: (x * y).sum())
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    f(x, x).backward()
    assert x.grad.tolist() == [4.0, 6.0]


# --- writing in place --------------------------------------------------------------------------------------


def test_writing_to_an_argument_before_backward_is_torchs_error():
    f = as_torch_function(lambda x, w: x * w)
    x, w = torch.ones(3), torch.ones(3, requires_grad=True)
    y = f(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_writing_to_a_result_that_is_a_residual_before_backward_is_torchs_error():
    f = as_torch_function(jnp.exp)
    x = torch.ones(3, requires_grad=True)
    y = f(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_writing_to_a_result_that_is_none_gives_the_right_gradient():
    f = as_torch_function(jnp.sin)
    x = torch.zeros(3, requires_grad=True)
    y = f(x)
    y.mul_(2).add_(1)
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


CONSTANT = jnp.arange(16.0)

ALIASING = {
    "the argument": lambda x: x,
    "the argument twice": lambda x: (x, x),
    "one value twice": lambda x: (lambda y: (y, y))(x + 1),
    "equal values": lambda x: (x + 1, x + 1),
    "through an inner jit": lambda x: jax.jit(lambda x: x)(x),
    "a jax constant": lambda x: (x, CONSTANT),
    "a constant through an inner jit": lambda x: jax.jit(lambda: CONSTANT)(),
    "a fresh constant": lambda x: jnp.zeros(16),
    "a reshape": lambda x: (x.reshape(4, 4), x[None]),
    "stop_gradient": lambda x: jax.lax.stop_gradient(x),
    "donated": jax.jit(lambda x: x + 1, donate_argnums=0),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ALIASING)
def test_a_result_shares_memory_with_nothing(name, requires_grad):
    before = CONSTANT.tolist()
    x = torch.arange(16.0).requires_grad_(requires_grad)
    f = as_torch_function(ALIASING[name])
    first, second = jax.tree.leaves(f(x)), jax.tree.leaves(f(x))
    pointers = [tensor.data_ptr() for tensor in (*first, *second)]
    assert len(set(pointers)) == len(pointers)
    assert x.data_ptr() not in pointers
    assert CONSTANT.unsafe_buffer_pointer() not in pointers
    expected = [tensor.tolist() for tensor in second]
    for tensor in first:
        tensor.detach().fill_(-1)
    assert x.tolist() == list(range(16))
    assert CONSTANT.tolist() == before
    assert [tensor.tolist() for tensor in second] == expected
    assert [tensor.tolist() for tensor in jax.tree.leaves(f(x))] == expected


def test_a_jax_array_argument_is_not_shared_with_a_result():
    a = jnp.arange(16.0)
    y = as_torch_function(lambda a: a)(a)
    y.fill_(-1)
    assert a.tolist() == list(range(16))


def test_a_gradient_shares_memory_with_nothing():
    f = as_torch_function(lambda x, y: x + y)
    x, y = torch.ones(16, requires_grad=True), torch.ones(16, requires_grad=True)
    cotangent = torch.arange(16.0)
    gx, gy = grad(f(x, y), (x, y), cotangent)
    assert len({gx.data_ptr(), gy.data_ptr(), cotangent.data_ptr()}) == 3


def slow(x):
    def step(_, x):
        return jnp.tanh(x @ x / 512)

    return jax.lax.fori_loop(0, 4, step, x)


def test_torch_may_write_to_an_argument_as_soon_as_the_call_returns():
    f = as_torch_function(slow)
    x = torch.randn(512, 512)
    expected = f(x.clone())
    for _ in range(5):
        work = x.clone()
        result = f(work)
        work.zero_()
        assert torch.equal(result, expected)


def test_torch_may_write_to_a_cotangent_as_soon_as_backward_returns():
    f = as_torch_function(lambda x: (x @ x.T) @ (x.T @ x))
    x = torch.randn(256, 256, requires_grad=True)
    cotangent = torch.randn(256, 256)
    (expected,) = grad(f(x), x, cotangent.clone())
    for _ in range(5):
        work = cotangent.clone()
        (result,) = grad(f(x), x, work)
        work.zero_()
        assert torch.equal(result, expected)


def test_a_call_without_results_has_ended_when_it_returns():
    seen = []

    @as_torch_function
    def f(x):
        jax.debug.callback(lambda total: seen.append(float(total)), (slow(x) * 0 + x).sum())

    x = torch.ones(64, 64)
    assert f(x) is None
    assert seen == [64.0 * 64]


# --- threads and settings -----------------------------------------------------------------------------------


def test_a_backward_pass_in_another_thread_has_the_forwards_x64():
    f = as_torch_function(lambda x: jnp.sin(x).sum())
    x, failures = leaf(3), []
    with jax.enable_x64(True):
        y = f(x)
        (first,) = grad(f(x), x, create_graph=True)

    def work():
        try:
            assert not jax.config.jax_enable_x64
            y.backward()
            x2 = grad(first.sum(), x)[0]
            torch.testing.assert_close(x2, -torch.sin(x.detach()))
        except BaseException as err:
            failures.append(err)

    with jax.enable_x64(False):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not failures
    torch.testing.assert_close(x.grad, torch.cos(x.detach()))


def test_an_error_in_the_backward_pass_names_what_is_at_fault():
    f = as_torch_function(lambda x: x * 2)
    x = torch.ones(4, requires_grad=True)
    y = f(x)
    with pytest.raises(ExchangeError, match="cotangent of result 0"):
        y.backward(torch.ones(4).to_sparse())


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda f: f(torch.ones(2, requires_grad=True)).sum().backward(), "transposed"),
        (lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(2)), "differentiated"),
        (lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)), "differentiated"),
    ],
    ids=["backward", "grad", "jvp"],
)
def test_an_error_of_a_derivative_names_the_function_and_shows_the_users_line(transform, words):
    def of_no_derivative(x):
        return jax.pure_callback(lambda x: x, x, x)  # the line

    def doubling(x):
        return jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c * 2, jnp.sin(x))  # the line

    function = doubling if words == "transposed" else of_no_derivative
    with pytest.raises(ValueError, match=r"Reverse-mode|do not support JVP") as caught:
        transform(as_torch_function(function))
    assert any(
        note.startswith(f"while JAX {words} ") and function.__name__ in note
        for note in caught.value.__notes__
    )
    assert "# the line" in "".join(traceback.format_exception(caught.value))


def test_the_two_roads_of_reverse_mode_agree(x64_on, monkeypatch):
    f = as_torch_function(lambda x, w: {"y": jnp.tanh(x @ w), "z": jnp.exp(x)})
    x, w = leaf(3, 4), leaf(4, 2)

    def gradients():
        y = f(x, w)
        return grad(y["y"].sum() + (y["z"] ** 2).sum(), (x, w))

    plain = gradients()
    monkeypatch.setattr(_autograd, "functorch_active", lambda: True)  # as if torch told nothing
    torch.testing.assert_close(gradients(), plain)
