"""Labels and indices in the integers that JAX has, for operators of torch that demand int64; dense gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchjax_bridge import as_jax_function, as_jax_module, to_jax
from torchjax_bridge.wrap.torch_in_jax._indices import widen_indices

X = torch.tensor(np.random.default_rng(0).normal(size=(3, 4)), dtype=torch.float32)
LABELS = torch.tensor([0, 3, 1])
PAIRS = torch.tensor([[0, 2], [1, 0], [2, 2]])
ROWS = torch.tensor([2, 0, 1])


def assigned(x, i):
    out = torch.zeros(3, 4)
    out[i] = x
    return out


INDEXED = {
    "cross_entropy": (F.cross_entropy, LABELS),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(ignore_index=3), LABELS),
    "nll_loss by keyword": (lambda x, i: F.nll_loss(F.log_softmax(x, -1), target=i), LABELS),
    "multi_margin_loss": (F.multi_margin_loss, LABELS),
    "one_hot": (lambda x, i: x * F.one_hot(i, 4), LABELS),
    "gather": (lambda x, i: x.gather(1, i), PAIRS),
    "gather by keyword": (lambda x, i: torch.gather(x, dim=1, index=i), PAIRS),
    "scatter": (lambda x, i: torch.zeros(3, 4).scatter(1, i, x[:, :2]), PAIRS),
    "scatter_add_": (lambda x, i: torch.zeros(3, 4).scatter_add_(1, i, x[:, :2]), PAIRS),
    "index_select": (lambda x, i: x.index_select(0, i), ROWS),
    "index_copy": (lambda x, i: torch.zeros(3, 4).index_copy(0, i, x), ROWS),
    "index_fill": (lambda x, i: x.index_fill(0, i[:2], 1.0), ROWS),
    "take": (torch.take, PAIRS),
    "take_along_dim": (lambda x, i: torch.take_along_dim(x, i, 1), PAIRS),
    "x[i]": (lambda x, i: x[i, 1:], PAIRS),
    "x[i] = y": (assigned, ROWS),
    "index_put": (lambda x, i: torch.zeros(3, 4).index_put((i[:, 0], i[:, 1]), x[:, 0]), PAIRS),
    "embedding": (lambda x, i: F.embedding(i, x), PAIRS),
    "embedding_bag": (lambda x, i: F.embedding_bag(i, x), PAIRS),
    "max_unpool1d": (lambda x, i: F.max_unpool1d(x[:, :2][None], i[None], 2), PAIRS),
    "tensor_split": (lambda x, i: torch.tensor_split(x, (1, 2))[1] * i.sum(), LABELS),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.usefixtures("x64_off")
def test_what_torch_wants_in_int64_may_come_in_any_integer(name):
    fn, index = INDEXED[name]
    leaf = X.clone().requires_grad_()
    expected = fn(leaf, index)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    f, x = as_jax_function(fn), to_jax(X)
    for dtype in (jnp.int32, jnp.int8):
        i = jnp.asarray(index.numpy(), dtype)
        np.testing.assert_allclose(f(x, i), expected.detach(), atol=1e-6)
        np.testing.assert_allclose(jax.grad(lambda x, i: f(x, i).sum())(x, i), slope, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "gather", "x[i]"])
@pytest.mark.usefixtures("x64_off")
def test_indices_inside_jit_and_over_lanes(name):
    fn, index = INDEXED[name]
    f, x, i = as_jax_function(fn), to_jax(X), jnp.asarray(index.numpy(), jnp.int32)
    np.testing.assert_allclose(jax.jit(f)(x, i), fn(X, index), atol=1e-6)
    lanes = jax.vmap(f)(jnp.stack([x, x + 1]), jnp.stack([i, i]))
    np.testing.assert_allclose(lanes[1], fn(X + 1, index), atol=1e-5)
    _, tangent = jax.jvp(lambda x: f(x, i), (x,), (x,))
    np.testing.assert_allclose(tangent, torch.func.jvp(lambda x: fn(x, index), (X,), (X,))[1], atol=1e-5)


def test_values_beside_an_index_keep_their_dtype():
    seen = []

    def fn(values, index):
        seen.append(values.gather(0, index).dtype)
        return values.gather(0, index) * 1.5

    as_jax_function(fn)(jnp.arange(3, dtype=jnp.int16), jnp.array([2, 0], jnp.int32))
    assert set(seen) == {torch.int16}


def test_a_mask_of_bytes_stays_a_mask():
    mask = torch.tensor([0, 1, 1], dtype=torch.uint8)
    assert widen_indices(torch.Tensor.__getitem__, (X, mask), {}) is None
    (_, index), _ = widen_indices(torch.take, (X, mask), {})
    assert index.dtype is torch.int64


@pytest.mark.usefixtures("x64_off")
def test_code_that_depends_on_values_gets_wide_indices_too():
    def fn(x, i):
        return F.cross_entropy(x, i) if x.sum() < 1e9 else x.sum()

    f = as_jax_function(fn, output_shape=jnp.ones(()))
    i = jnp.asarray(LABELS.numpy(), jnp.int32)
    np.testing.assert_allclose(f(to_jax(X), i), F.cross_entropy(X, LABELS), rtol=1e-6)
    leaf = X.clone().requires_grad_()
    F.cross_entropy(leaf, LABELS).backward()
    np.testing.assert_allclose(jax.grad(f)(to_jax(X), i), leaf.grad, atol=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(5, 3, sparse=True, padding_idx=1),
        nn.EmbeddingBag(5, 3, sparse=True),
        nn.EmbeddingBag(5, 3, sparse=True, mode="sum"),
    ],
)
def test_a_sparse_embedding_has_a_dense_gradient(module):
    ids = torch.tensor([[0, 1, 1], [2, 4, 0]])
    apply, variables = as_jax_module(module)

    def loss(params):
        return (apply({**variables, "params": params}, to_jax(ids)) ** 2).sum()

    module.zero_grad()
    (module(ids) ** 2).sum().backward()
    assert module.weight.grad.is_sparse
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(variables["params"])["weight"], module.weight.grad.to_dense(), atol=1e-6
    )


@pytest.mark.slow
def test_a_sparse_embedding_has_a_gradient_in_each_lane_and_a_hessian():
    apply, variables = as_jax_module(nn.Embedding(5, 3, sparse=True))
    table = variables["params"]["weight"]

    def loss(table, ids):
        return (apply({"params": {"weight": table}, "buffers": {}}, ids) ** 2).sum()

    ids = jnp.array([[0, 1], [4, 4]])
    assert jax.hessian(loss)(table, ids[0]).sum() == 2 * 2 * 3
    lanes = jax.vmap(jax.grad(loss), in_axes=(None, 0))(table, ids)
    for lane, row in zip(lanes, ids, strict=True):
        np.testing.assert_allclose(lane, jax.grad(lambda t, row=row: (t[row] ** 2).sum())(table), rtol=1e-6)


def test_a_sparse_gradient_is_dense_where_code_runs_as_python():
    def fn(table, ids):
        rows = F.embedding(ids, table, sparse=True)
        return rows.sin() if rows.sum() < 1e9 else rows

    f = as_jax_function(fn, output_shape=jnp.ones((3, 2, 4)))
    slope = jax.grad(lambda table: f(table, jnp.asarray(PAIRS.numpy())).sum())(to_jax(X))
    leaf = X.clone().requires_grad_()
    F.embedding(PAIRS, leaf).sin().sum().backward()
    np.testing.assert_allclose(slope, leaf.grad, atol=1e-6)


def test_a_sparse_gather_has_a_dense_gradient():
    f = as_jax_function(lambda x, i: x.gather(1, i, sparse_grad=True).sin().sum())
    leaf = X.clone().requires_grad_()
    leaf.gather(1, PAIRS).sin().sum().backward()
    np.testing.assert_allclose(jax.grad(f)(to_jax(X), jnp.asarray(PAIRS.numpy())), leaf.grad, atol=1e-6)
