"""A JAX function under ``torch.func`` and forward-mode AD, against the same function in torch."""

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from torchjax_bridge.wrap import as_jax_function, as_torch_function

# What torch itself warns of when torch.func is first used, and in torch.func.linearize.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def scalar_native(x, w):
    return (torch.tanh(x @ w) ** 2).sum()


def vector_native(x, w):
    return torch.sin(x @ w) * x.sum()


scalar = as_torch_function(lambda x, w: (jnp.tanh(x @ w) ** 2).sum())
vector = as_torch_function(lambda x, w: jnp.sin(x @ w) * x.sum())


def arrays(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def same(transform, mine, native, *args):
    torch.testing.assert_close(transform(mine)(*args), transform(native)(*args))


TRANSFORMS = {
    "grad": grad,
    "grad of both": lambda f: grad(f, argnums=(0, 1)),
    "vjp": lambda f: lambda x, w: vjp(f, x, w)[1](torch.tensor(2.0, dtype=torch.float64)),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (w[:, 0], w * 2)),
    "jvp of one": lambda f: lambda x, w: jvp(lambda x: f(x, w), (x,), (w[:, 0],)),
    "linearize": lambda f: lambda x, w: linearize(f, x, w)[1](w[:, 0], w),
    "jacrev": jacrev,
    "jacfwd": lambda f: jacfwd(f, argnums=1),
    "hessian": hessian,
    "mixed hessian": lambda f: hessian(f, argnums=(0, 1)),
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
    "third": lambda f: jacfwd(jacrev(grad(f))),
    "vmap": lambda f: lambda x, w: vmap(f, (None, 0))(x, torch.stack([w, 2 * w])),
    "vmap of grad": lambda f: lambda x, w: vmap(grad(f), (0, None))(torch.stack([x, 2 * x, 3 * x]), w),
    "grad of vmap": lambda f: (
        lambda x, w: grad(lambda w: vmap(f, (0, None))(torch.stack([x, 2 * x]), w).sum())(w)
    ),
    "vmap of hessian": lambda f: lambda x, w: vmap(hessian(f), (0, None))(torch.stack([x, 2 * x]), w),
    "per-sample gradients": lambda f: lambda x, w: vmap(grad(f, 1), (0, None))(torch.stack([x, -x]), w),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_transform_agrees_with_native_torch(name, x64_on):
    same(TRANSFORMS[name], scalar, scalar_native, *arrays((3,), (3, 2)))


@pytest.mark.parametrize(
    "transform",
    [jacrev, jacfwd, lambda f: vmap(jacrev(f), (None, -1))],
    ids=["jacrev", "jacfwd", "vmap of jacrev"],
)
def test_a_vector_valued_function_agrees_with_native_torch(transform, x64_on):
    x, w = arrays((3,), (3, 2))
    same(
        transform, vector, vector_native, x, w if transform in (jacrev, jacfwd) else torch.stack([w, -w], -1)
    )


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 2), (-1, 0), (0, -2), 0], ids=str)
@pytest.mark.parametrize("out_dims", [0, -1])
def test_vmap_takes_any_axes(in_dims, out_dims, x64_on):
    x, w = arrays((4, 4), (4, 4, 4))
    if in_dims == (0, None):
        w = w[0]
    if in_dims == (None, 0):
        x = x[0]
    same(lambda f: vmap(f, in_dims, out_dims), vector, vector_native, x, w)


def test_nested_vmap_takes_any_axes(x64_on):
    x, w = arrays((5, 3), (3, 2, 4))
    same(lambda f: vmap(vmap(f, (None, -1)), (0, None)), vector, vector_native, x, w)
    x, w = arrays((5, 3, 4), (4, 5, 3, 2))
    same(lambda f: vmap(vmap(f, (-1, 0)), (0, 1), 1), vector, vector_native, x, w)


def test_vmap_over_a_function_that_ignores_the_batch(x64_on):
    f = as_torch_function(lambda x, y: (y * 2, jnp.arange(3.0)))
    doubled, constant = vmap(f, (0, None))(torch.ones(4, 2), torch.ones(3))
    assert doubled.tolist() == [[2.0] * 3] * 4
    assert constant.tolist() == [[0.0, 1.0, 2.0]] * 4


def test_vmap_of_pytrees_keys_and_numbers():
    @as_torch_function
    def f(tree, key, scale, flag):
        return {"y": tree["a"][0] * scale + jax.random.normal(key), "n": tree["a"][0].argmax(), "key": key}

    key = jax.random.key(0)
    result = vmap(lambda a: {k: v for k, v in f({"a": (a,)}, key, 2.0, "s").items() if k != "key"})(
        torch.eye(3)
    )
    noise = float(jax.random.normal(key))
    torch.testing.assert_close(result["y"], 2 * torch.eye(3) + noise)
    assert result["n"].tolist() == [0, 1, 2]


def test_grad_with_integer_results_and_aux(x64_on):
    f = as_torch_function(lambda x: (jnp.sin(x).sum(), {"n": x.argmax(), "y": x * 2}))
    x = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    g, aux = grad(f, has_aux=True)(x)
    torch.testing.assert_close(g, torch.cos(x))
    assert aux["n"].item() == 1
    torch.testing.assert_close(aux["y"], 2 * x)


def test_randomness_across_a_batch_is_that_of_the_key():
    f = as_torch_function(lambda x, key: x + jax.random.normal(key))
    y = vmap(lambda x: f(x, jax.random.key(1)), randomness="different")(torch.zeros(3))
    assert len(set(y.tolist())) == 1  # one key, one number: as in jax.vmap


def test_autograd_outside_a_transform_reaches_through_it(x64_on):
    x, w = arrays((4, 3), (3, 2))
    gradients = []
    for f in (vector, vector_native):
        p = w.clone().requires_grad_()
        gradients.append(torch.autograd.grad(vmap(f, (0, None))(x, p).sum(), p))
    torch.testing.assert_close(*gradients)


def test_functional_call_and_ensembles(x64_on):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(arrays((3, 2))[0])

        def forward(self, x):
            return scalar(x, self.w)

    layer, (x, w) = Layer(), arrays((3,), (5, 3, 2))
    mine = vmap(grad(lambda w: functional_call(layer, {"w": w}, (x,))))(w)
    torch.testing.assert_close(mine, vmap(grad(lambda w: scalar_native(x, w)))(w))


# --- forward AD ----------------------------------------------------------------------------------------------


def test_dual_numbers_go_through(x64_on):
    x, w = arrays((3,), (3, 2))
    tangents = arrays((3,), (3, 2))
    results = []
    for f in (vector, vector_native):
        with forward_ad.dual_level():
            both = f(forward_ad.make_dual(x, tangents[0]), forward_ad.make_dual(w, tangents[1]))
            one = f(forward_ad.make_dual(x, tangents[0]), w)
            none = f(x, w)
            assert forward_ad.unpack_dual(none).tangent is None
            results.append([tuple(forward_ad.unpack_dual(y)) for y in (both, one)])
    torch.testing.assert_close(*results)


def test_forward_over_reverse(x64_on):
    x, w = arrays((3,), (3, 2))
    results = []
    for f in (scalar, scalar_native):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
            (g,) = torch.autograd.grad(f(dual, w), dual, create_graph=True)
            results.append(forward_ad.unpack_dual(g).tangent)
    torch.testing.assert_close(*results)


def test_reverse_over_forward(x64_on):
    x, w = arrays((3,), (3, 2))
    results = []
    for f in (vector, vector_native):
        p = x.clone().requires_grad_()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(p, torch.ones_like(x)), w)).tangent
        results.append(torch.autograd.grad(tangent.sum(), p))
    torch.testing.assert_close(*results)


def test_a_tangent_of_a_complex_function_is_not_conjugated(x64_on):
    z = torch.tensor([1 + 2j, 3 - 1j])
    f = as_torch_function(lambda z: z**2 * 1j)
    with jax.enable_x64(False):
        mine = jvp(f, (z,), (torch.full_like(z, 1 + 1j),))
    torch.testing.assert_close(mine, jvp(lambda z: z**2 * 1j, (z,), (torch.full_like(z, 1 + 1j),)))


def test_a_custom_jvp_is_respected():
    @jax.custom_jvp
    def odd(x):
        return x * 3

    odd.defjvp(lambda primals, tangents: (odd(*primals), tangents[0] * 100))
    f = as_torch_function(lambda x: odd(x))
    x = torch.tensor(2.0, requires_grad=True)
    assert jvp(f, (x.detach(),), (torch.tensor(1.0),))[1] == 100.0
    assert torch.autograd.grad(f(x), x) == (100.0,)


def dual_tangent(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (grad, (3,)),
        (hessian, (3,)),
        (lambda f: vmap(grad(f)), (2, 3)),
        (lambda f: lambda x: jvp(f, (x,), (x,))[1], (3,)),
        (lambda f: lambda x: dual_tangent(f, x), (3,)),
    ],
    ids=["grad", "hessian", "vmap of grad", "jvp", "dual numbers"],
)
def test_a_function_that_goes_back_to_torch_may_be_traced_under_a_transform(transform, shape):
    """Its first call runs torch code inside JAX on fake tensors, which are none of the transform's."""
    back = as_jax_function(lambda x: torch.sin(x) * x)
    f = as_torch_function(lambda x: back(x).sum())
    x = torch.randn(shape)
    torch.testing.assert_close(transform(f)(x), transform(lambda x: (torch.sin(x) * x).sum())(x))
