"""Results and arguments of a wrapped torch function that torch alone knows as pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils import _pytree

from torchjax_bridge import as_jax_function, as_jax_module, errors, to_jax

MATRIX = torch.tensor(np.random.default_rng(0).normal(size=(4, 4)), dtype=torch.float32)
SPD = MATRIX @ MATRIX.T + torch.eye(4)
linalg = torch.linalg
FUNCTIONS = {
    "eigh": (linalg.eigh, SPD),
    "svd": (lambda x: linalg.svd(x, full_matrices=False), MATRIX),
    "qr": (linalg.qr, MATRIX),
    "slogdet": (linalg.slogdet, SPD),
    "inv_ex": (linalg.inv_ex, SPD),
    "cholesky_ex": (linalg.cholesky_ex, SPD),
    "lu": (linalg.lu, MATRIX),
    "eig": (linalg.eig, MATRIX),
    "max": (lambda x: x.max(1), MATRIX),
    "min": (lambda x: x.min(0), MATRIX),
    "sort": (lambda x: x.sort(), MATRIX),
    "topk": (lambda x: x.topk(2), MATRIX),
    "median": (lambda x: x.median(0), MATRIX),
    "mode": (lambda x: x.mode(0), MATRIX),
    "cummax": (lambda x: x.cummax(0), MATRIX),
    "aminmax": (lambda x: torch.aminmax(x, dim=0), MATRIX),
    "frexp": (torch.frexp, MATRIX),
}


def floats(tree):
    """The sum of the absolute values of what can be differentiated."""
    leaves = [leaf for leaf in _pytree.tree_leaves(tree) if leaf.dtype.is_floating_point or leaf.is_complex()]
    return sum(leaf.abs().sum() for leaf in leaves)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_return_type_comes_back_as_what_it_was(name):
    fn, x = FUNCTIONS[name]
    expected = fn(x)
    out = jax.jit(as_jax_function(fn))(to_jax(x))
    assert type(out) is type(expected)
    for mine, theirs in zip(out, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["eigh", "slogdet", "sort"])
def test_gradients_and_lanes_of_return_types(name):
    fn, x = FUNCTIONS[name]
    f = as_jax_function(fn)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(floats(fn(leaf)), leaf)
    total = as_jax_function(lambda x: floats(fn(x)))
    np.testing.assert_allclose(jax.grad(total)(to_jax(x)), expected, atol=1e-4)

    def over(x):
        leaves = jax.tree.leaves(f(x))
        return sum(jnp.abs(v).sum() for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact))

    np.testing.assert_allclose(jax.jit(jax.grad(over))(to_jax(x)), expected, atol=1e-4)
    lanes = jax.vmap(f)(jnp.stack([to_jax(x), 2 * to_jax(x)]))
    assert type(lanes) is type(fn(x))
    np.testing.assert_allclose(lanes[0][1], fn(2 * x)[0], atol=1e-5)


def test_a_size_comes_back_as_a_tuple_and_goes_in_as_it_is():
    f = as_jax_function(lambda x, size: (x.shape, torch.zeros(size) + x.sum(), isinstance(size, torch.Size)))
    shape, filled, kept = f(jnp.ones((2, 3)), torch.Size([4]))
    assert type(shape) is tuple
    assert [int(n) for n in shape] == [2, 3]
    assert filled.shape == (4,)
    assert kept


def test_return_types_nest():
    out = jax.jit(as_jax_function(lambda x: {"a": [x.max(0), x.min(0)]}))(jnp.eye(3))
    assert out["a"][0].indices.tolist() == [0, 1, 2]
    assert type(out["a"][1]) is torch.return_types.min


def test_loops_carry_return_types():
    f = as_jax_function(lambda found: (found.values * 2).sort())
    first = to_jax(torch.tensor([2.0, 1.0]).sort())
    last, _ = jax.lax.scan(lambda found, _: (f(found), None), first, length=3)
    assert last.values.tolist() == [8, 16]


def test_a_module_that_returns_what_torch_knows():
    class Best(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).max(-1)

    module = Best(3, 4)
    apply, variables = as_jax_module(module)
    x = torch.ones(2, 3)

    def loss(params):
        return apply({**variables, "params": params}, to_jax(x)).values.sum()

    module(x).values.sum().backward()
    np.testing.assert_allclose(jax.grad(loss)(variables["params"])["weight"], module.weight.grad)


def test_a_tensordict_is_an_argument_and_a_result():
    tensordict = pytest.importorskip("tensordict")
    td = tensordict.TensorDict({"a": torch.rand(3, 2), "in": {"b": torch.rand(3)}}, batch_size=[3])

    def double(td):
        assert isinstance(td, tensordict.TensorDict)
        td = td.clone()
        td["a"] = td["a"] * td["in", "b"][..., None]
        return td

    f = as_jax_function(double)
    arrays = to_jax(td)
    np.testing.assert_allclose(jax.jit(f)(arrays)["a"], double(td)["a"])
    slopes = jax.grad(lambda arrays: f(arrays)["a"].sum())(arrays)
    np.testing.assert_allclose(slopes["in", "b"], td["a"].sum(1), atol=1e-6)


def test_a_model_output_is_an_argument_and_a_result():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def fn(out):
        return outputs.BaseModelOutput(last_hidden_state=out.last_hidden_state.sin())

    f = as_jax_function(fn)
    given = to_jax(outputs.BaseModelOutput(last_hidden_state=torch.zeros(2)))
    assert type(jax.jit(f)(given)) is outputs.BaseModelOutput
    slopes = jax.grad(lambda given: f(given).last_hidden_state.sum())(given)
    assert slopes["last_hidden_state"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda x: {"s": x.to_sparse()}, r"output\['s'\].*sparse_coo tensor.*\.to_dense\(\)"),
        (lambda x: [x, object()], r"output\[1\].*builtins\.object.*neither JAX nor torch.*register_pytree"),
    ],
)
def test_what_no_one_can_take_apart_is_named_with_its_fix(fn, text):
    with pytest.raises(errors.OutputError, match=text):
        as_jax_function(fn, output_shape=jnp.ones(2))(jnp.ones(2))
