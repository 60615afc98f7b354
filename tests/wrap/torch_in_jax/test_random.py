"""Random numbers come from a JAX key: reproducible, the same in both passes, different in every lane."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.marking import slow_but
from torchjax_bridge import as_jax_function, errors

X = jnp.asarray(np.random.default_rng(6).normal(size=(4, 3)), jnp.float32)
KEY = jax.random.key(0)


@pytest.fixture
def dropout():
    return as_jax_function(lambda x: F.dropout(x, 0.5))


@pytest.fixture(autouse=True)
def torch_s_generator_is_left_alone():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def test_a_key_makes_the_call_reproducible_eagerly_and_compiled(dropout):
    first = dropout(X, key=KEY)
    np.testing.assert_array_equal(first, dropout(X, key=KEY))
    np.testing.assert_array_equal(first, jax.jit(dropout)(X, key=KEY))
    assert (first != dropout(X, key=jax.random.key(1))).any()
    assert set(np.unique(np.asarray(first / X)).round(3)) == {0, 2}


def test_drawing_without_a_key_is_an_error():
    for fn in (lambda x: F.dropout(x, 0.5), lambda x: x + torch.randn(3), lambda x: torch.randperm(3)):
        with pytest.raises(errors.TransformError, match="key="):
            jax.jit(as_jax_function(fn))(X)


def test_code_that_draws_nothing_takes_a_key_too():
    f = as_jax_function(lambda x: F.dropout(x, 0.5, training=False))
    np.testing.assert_array_equal(f(X, key=KEY), X)
    np.testing.assert_array_equal(f(X, key=None), X)


@pytest.mark.every(2)
@pytest.mark.parametrize("residuals", ["save", "recompute"])
@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "checkpoint", "jit"])
def test_forward_and_backward_see_the_same_mask(residuals, around):
    f = as_jax_function(lambda x: F.dropout(x, 0.5), residuals=residuals)
    slope = jax.grad(around(lambda x: f(x, key=KEY).sum()))(X)
    np.testing.assert_allclose(slope * X, f(X, key=KEY), rtol=1e-6)


def test_second_derivatives_see_the_same_mask(dropout):
    mask = dropout(jnp.ones(3), key=KEY)
    hessian = jax.hessian(lambda x: (dropout(x, key=KEY) ** 3).sum())(X[0])
    np.testing.assert_allclose(hessian, jnp.diag(6 * mask**3 * X[0]), rtol=1e-5)


def test_each_lane_draws_what_its_key_draws_alone(dropout):
    keys = jax.random.split(KEY, 6)
    lanes = jax.jit(jax.vmap(lambda k: dropout(X, key=k)))(keys)
    for lane, key in zip(lanes, keys, strict=True):
        np.testing.assert_array_equal(lane, dropout(X, key=key))
    assert len({np.asarray(lane).tobytes() for lane in lanes}) == 6
    slopes = jax.vmap(jax.grad(lambda x, k: dropout(x, key=k).sum()), (None, 0))(X, keys)
    np.testing.assert_allclose(slopes * X, lanes, rtol=1e-6)


def test_lanes_that_share_a_key_share_the_mask(dropout):
    lanes = jax.vmap(lambda x: dropout(x, key=KEY))(jnp.ones((3, 5)))
    assert (lanes[0] == lanes[1]).all()
    assert (lanes[0] == lanes[2]).all()


def test_several_draws_of_one_call_differ():
    a, b = as_jax_function(lambda x: (torch.rand(8), torch.rand(8)))(X, key=KEY)
    assert (a != b).all()


def test_a_scan_over_keys(dropout):
    keys = jax.random.split(KEY, 3)
    _, rows = jax.lax.scan(lambda c, k: (c, dropout(c, key=k)), X, keys)
    np.testing.assert_array_equal(rows[1], dropout(X, key=keys[1]))


def test_a_raw_key_works_and_anything_else_is_refused(dropout):
    raw = jax.random.PRNGKey(0)
    np.testing.assert_array_equal(dropout(X, key=raw), dropout(X, key=jax.random.wrap_key_data(raw)))
    with pytest.raises(errors.ArgumentError, match="PRNG key"):
        dropout(X, key=3)


def test_an_argument_of_the_function_named_key_is_its_own():
    def attend(query, key, value):
        return F.dropout(query @ key.T @ value, 0.5)

    f = as_jax_function(lambda query, key: query @ key.T)
    np.testing.assert_allclose(f(X, key=X), X @ X.T, rtol=1e-5)
    g = as_jax_function(attend)
    with pytest.raises(TypeError):
        g(X, value=X, key=KEY)  # a typed key is always the random one, and then torch's own is missing
    assert g(X, X, X, key=KEY).shape == (4, 3)


SAMPLERS = {
    "rand": (lambda x: torch.rand(2000), 0.5, 1 / 12),
    "rand_like": (lambda x: torch.rand_like(x), 0.5, 1 / 12),
    "uniform_": (lambda x: torch.empty(2000).uniform_(2, 4), 3, 1 / 3),
    "randn": (lambda x: torch.randn(2000), 0, 1),
    "randn_like": (lambda x: torch.randn_like(x), 0, 1),
    "normal": (lambda x: torch.normal(x * 0 + 3, 2.0), 3, 4),
    "normal_size": (lambda x: torch.normal(3.0, 2.0, (2000,)), 3, 4),
    "normal_": (lambda x: torch.empty(2000).normal_(1, 3), 1, 9),
    "bernoulli": (lambda x: torch.bernoulli(x * 0 + 0.3), 0.3, 0.21),
    "bernoulli_": (lambda x: torch.empty(2000).bernoulli_(0.3), 0.3, 0.21),
    "exponential_": (lambda x: torch.empty(2000).exponential_(2.0), 0.5, 0.25),
    "geometric_": (lambda x: torch.empty(2000).geometric_(0.5), 2, 2),
    "log_normal_": (lambda x: torch.empty(2000).log_normal_(0.0, 0.5).log(), 0, 0.25),
    "cauchy_": (lambda x: torch.empty(2000).cauchy_(1.0, 2.0).sub(1).div(2).atan() / torch.pi, 0, 1 / 12),
    "randint": (lambda x: torch.randint(0, 10, (2000,)).float(), 4.5, 8.25),
    "randint_like": (lambda x: torch.randint_like(x, 3, 13), 7.5, 8.25),
    "random_": (lambda x: torch.empty(2000).random_(10), 4.5, 8.25),
    "multinomial": (lambda x: torch.multinomial(torch.tensor([0.2, 0.8]), 2000, True).float(), 0.8, 0.16),
    "dropout": (lambda x: F.dropout(torch.ones(2000), 0.25), 1, 1 / 3),
    "alpha_dropout": (lambda x: F.alpha_dropout(torch.randn(2000), 0.1, True), 0, 1),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_the_mean_and_variance_of_their_distribution(name):
    fn, mean, variance = SAMPLERS[name]
    sample = np.asarray(as_jax_function(fn)(jnp.zeros(2000), key=jax.random.key(7)), np.float64)
    error = np.sqrt(variance / 2000)
    assert sample.shape == (2000,)
    assert abs(sample.mean() - mean) < 4 * error
    assert abs(sample.var() - variance) < 0.2 * variance


def test_permutations_and_draws_without_replacement_repeat_nothing():
    f = as_jax_function(
        lambda x: (torch.randperm(9), torch.multinomial(torch.ones(9), 9), torch.randint(5, (6,)))
    )
    permutation, drawn, whole = f(X, key=KEY)
    assert sorted(permutation.tolist()) == list(range(9))
    assert sorted(drawn.tolist()) == list(range(9))
    assert all(0 <= n < 5 for n in whole.tolist())


def test_dtypes_are_those_of_torch(x64_on):
    f = as_jax_function(
        lambda x: (
            torch.rand(2, dtype=torch.bfloat16),
            torch.randn(2, dtype=torch.float64),
            torch.randperm(3),
        )
    )
    assert [o.dtype for o in f(X, key=KEY)] == [jnp.bfloat16, jnp.float64, jnp.int64]


def test_reparameterised_samples_have_gradients_and_torch_normal_has_none():
    f = as_jax_function(lambda m: (m * torch.randn(3)).sum())
    noise = as_jax_function(lambda m: torch.randn(3))(X[0], key=KEY)
    np.testing.assert_allclose(jax.grad(lambda m: f(m, key=KEY))(X[0]), noise)
    g = as_jax_function(lambda m: torch.normal(m, 1.0).sum())
    np.testing.assert_array_equal(jax.grad(lambda m: g(m, key=KEY))(X[0]), jnp.zeros(3))


def test_a_draw_that_no_key_can_make_is_named():
    with pytest.raises(errors.TransformError, match=r"poisson.*jax\.random"):
        as_jax_function(lambda x: torch.poisson(x.abs()))(X, key=KEY)
    with pytest.raises(errors.TransformError, match="32 bits"):
        as_jax_function(lambda x: torch.randint(0, 2**40, (3,)))(X, key=KEY)


def test_attention_with_dropout():
    q = jnp.asarray(np.random.default_rng(8).normal(size=(1, 2, 4, 8)), jnp.float32)
    f = as_jax_function(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    assert (f(q, key=KEY) == f(q, key=KEY)).all()
    assert (f(q, key=KEY) != f(q, key=jax.random.key(1))).any()
    assert jnp.isfinite(jax.grad(lambda q: f(q, key=KEY).sum())(q)).all()


def test_dropout_inside_torch_s_own_checkpoint_is_refused_and_never_redrawn():
    from torch.utils.checkpoint import checkpoint

    f = as_jax_function(lambda x: checkpoint(lambda y: F.dropout(y.sin(), 0.5), x, use_reentrant=False).sum())
    with pytest.raises(errors.TransformError, match=r"torch\.utils\.checkpoint"):
        jax.grad(lambda x: f(x, key=KEY))(X)


@pytest.mark.parametrize("key", [None, KEY])
def test_code_that_depends_on_values_and_draws_is_refused_with_a_key_and_without(key):
    f = as_jax_function(lambda x: F.dropout(x, 0.5) if x.sum() > -1e9 else x, output_shape=lambda x: x)
    with pytest.raises(errors.TransformError, match=r"depends on values.*jax\.random"):
        f(X, key=key)
    quiet = as_jax_function(lambda x: F.dropout(x, 0.0) if x.sum() > -1e9 else x, output_shape=lambda x: x)
    np.testing.assert_array_equal(quiet(X), X)


LSTM = (torch.nn.LSTM, {"bidirectional": True, "proj_size": 2})
GRU = (torch.nn.GRU, {"batch_first": True})
RNN = (torch.nn.RNN, {"nonlinearity": "relu", "bias": False})


def stacked(layer, options):
    """A stack of three, and its layers one by one with what is between them written out."""
    ways = 2 if options.get("bidirectional") else 1
    width = ways * options.get("proj_size", 4)
    with torch.random.fork_rng():
        whole = layer(3, 4, 3, dropout=0.5, **options)
        ones = [layer(3 if i == 0 else width, 4, **options) for i in range(3)]
    count = len(whole._flat_weights) // 3
    for i, one in enumerate(ones):
        one._flat_weights = whole._flat_weights[count * i : count * (i + 1)]

    def by_hand(x, hidden):
        finals = []
        for i, one in enumerate(ones):
            states = jax.tree.map(lambda h: h[ways * i : ways * (i + 1)], hidden)  # noqa: B023
            x, final = one(x, states)
            finals.append(jax.tree.leaves(final))
            x = F.dropout(x, 0.5) if i < 2 else x
        return [x, *map(torch.cat, zip(*finals, strict=True))]

    return lambda x, hidden: jax.tree.leaves(whole(x, hidden)), by_hand


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "options"), slow_but([GRU], [LSTM, GRU, RNN]), ids=["lstm", "gru", "rnn"])
def test_dropout_between_recurrent_layers_comes_from_the_key(layer, options):
    x = jnp.asarray(np.random.default_rng(7).normal(size=(2, 2, 3)), jnp.float32)
    rows, batch = 3 * (2 if options.get("bidirectional") else 1), 2
    hidden = jnp.ones((rows, batch, options.get("proj_size", 4)))
    hidden = (hidden, jnp.ones((rows, batch, 4))) if layer is torch.nn.LSTM else hidden
    f, g = map(as_jax_function, stacked(layer, options))
    with pytest.raises(errors.TransformError, match="key="):
        f(x, hidden)
    got = f(x, hidden, key=KEY)
    for a, b in zip(got, g(x, hidden, key=KEY), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not jnp.allclose(got[0], f(x, hidden, key=jax.random.key(1))[0])
    if layer is torch.nn.RNN:  # the others only take longer
        sums = [jax.value_and_grad(lambda x: h(x, hidden, key=KEY)[0].sum())(x) for h in (f, g)]  # noqa: B023
        np.testing.assert_allclose(sums[0][0], got[0].sum(), atol=1e-5)
        np.testing.assert_allclose(sums[0][1], sums[1][1], atol=1e-6)


def test_dropout_between_recurrent_layers_of_packed_sequences_is_refused():
    with torch.random.fork_rng():
        lstm = torch.nn.LSTM(3, 4, 2, dropout=0.5)
    pack = torch.nn.utils.rnn.pack_sequence
    f = as_jax_function(
        lambda x: lstm(pack([x[:4], x[4:6]]))[0].data, output_shape=jax.ShapeDtypeStruct((6, 4), jnp.float32)
    )
    with pytest.raises(errors.TransformError, match="draws random numbers"):
        f(jnp.ones((6, 3)))
    lstm.eval()
    assert f(jnp.ones((6, 3))).shape == (6, 4)


@pytest.fixture
def torch_checks_distributions():
    """As in a new process: torch.compile turns the checks off for good."""
    was = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.distributions.Distribution.set_default_validate_args(was)


@pytest.mark.usefixtures("torch_checks_distributions")
def test_distributions_are_sampled_from_the_key_and_their_checks_hold_nothing_up():
    def negative_elbo(mean, scale):
        q = torch.distributions.Normal(mean, scale)
        z = q.rsample()
        return (q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)).sum()

    f = as_jax_function(negative_elbo)
    mean, scale = X[0], jnp.ones(3)
    value, slope = jax.value_and_grad(f)(mean, scale, key=KEY)
    np.testing.assert_allclose(value, f(mean, scale, key=KEY), rtol=1e-6)
    noise = as_jax_function(lambda m: torch.randn(3))(mean, key=KEY)
    np.testing.assert_allclose(slope, mean + noise, rtol=1e-5)  # of z**2/2, z = mean + noise
    score = as_jax_function(lambda m, s: torch.distributions.Normal(m, s).log_prob(m).sum())
    with pytest.raises(ValueError, match="scale"):  # with values, torch's checks are made
        score(mean, -scale)
