"""Code that asks a tensor for a value in a trace: answered where the answer cannot matter, refused elsewhere."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn

from torchjax_bridge import as_jax_function, as_jax_module, errors, to_jax

L = 5
X = torch.tensor(np.random.default_rng(0).normal(size=(2, L, 8)), dtype=torch.float32)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
OTHER = torch.zeros(L, L)
OTHER[0, 3] = OTHER[2, 1] = -torch.inf
MASKS = {"causal": CAUSAL, "other": OTHER, "causal bool": CAUSAL != 0, "other bool": OTHER != 0}
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()


def layer(kind):
    return kind(8, 2, 16, batch_first=True)


def trained_alike(module, *args, **kwargs):
    """Output and gradients of a module in JAX, with and without ``jit``, are those of torch with gradients."""
    torch.manual_seed(0)
    module = module.eval()
    expected = module(*args, **kwargs)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    weight = torch.rand(expected.shape)
    named = dict(module.named_parameters())
    slopes = torch.autograd.grad((expected * weight).sum(), list(named.values()), materialize_grads=True)
    apply, variables = as_jax_module(module)

    def loss(params, args, kwargs):
        out = apply({**variables, "params": params}, *args, **kwargs)
        out = out if isinstance(out, jax.Array) else out[0]
        return (out * to_jax(weight)).sum(), out

    given = to_jax((args, kwargs))
    np.testing.assert_allclose(
        loss(variables["params"], *given)[1], expected.detach(), atol=1e-5, err_msg="the value alone"
    )
    (_, out), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"], *given)
    np.testing.assert_allclose(out, expected.detach(), atol=1e-5, err_msg="the value beside a gradient")
    for name, slope in zip(named, slopes, strict=True):
        np.testing.assert_allclose(found[name], slope, atol=1e-4, err_msg=name)


@pytest.mark.every(2)
@pytest.mark.parametrize("mask", MASKS)
def test_an_encoder_with_a_mask(mask):
    trained_alike(nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2), X, mask=MASKS[mask])


@pytest.mark.every(2)
@pytest.mark.parametrize("mask", ["causal", "other"])
def test_a_decoder_and_a_transformer_with_masks(mask):
    mask = MASKS[mask]
    trained_alike(nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 1), X, X.flip(1), tgt_mask=mask)
    trained_alike(nn.Transformer(8, 2, 1, 1, 16, batch_first=True), X, X, src_mask=mask, tgt_mask=mask)


@pytest.mark.parametrize("padding", [PADDING, torch.zeros(2, L).masked_fill(PADDING, -torch.inf)])
def test_padding_is_treated_alike_with_and_without_gradients(padding):
    """torch's fast path, which it takes without gradients, fills the padded places with zeros."""
    trained_alike(
        nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2), X, src_key_padding_mask=padding
    )


@pytest.mark.slow
def test_a_masked_encoder_under_the_other_transforms():
    module = nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 1).eval()
    apply, variables = as_jax_module(module)
    x, masks = to_jax(X), to_jax(torch.stack([CAUSAL, OTHER]))
    lanes = jax.vmap(lambda mask: apply(variables, x, mask=mask))(masks)
    for lane, mask in zip(lanes, (CAUSAL, OTHER), strict=True):
        np.testing.assert_allclose(lane, module(X, mask=mask).detach(), atol=1e-5)
    last, _ = jax.lax.scan(lambda x, mask: (apply(variables, x, mask=mask), None), x, masks)
    np.testing.assert_allclose(last, module(module(X, mask=CAUSAL), mask=OTHER).detach(), atol=1e-5)
    _, tangent = jax.jvp(lambda x: apply(variables, x, mask=masks[1]), (x,), (x,))
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = torch.autograd.functional.jvp(lambda x: module(x, mask=OTHER), X, X)[1]
    np.testing.assert_allclose(tangent, expected, atol=1e-4)


# --- distributions -------------------------------------------------------------------------------------------

_A = torch.tensor(np.random.default_rng(1).normal(size=(3, 3)), dtype=torch.float32)
SPD = _A @ _A.T + 3 * torch.eye(3)
MEAN = torch.tensor([0.5, -1.0, 2.0])
DENSITIES = {
    "MultivariateNormal": lambda mean, c: D.MultivariateNormal(mean, c).log_prob(mean * 2),
    "its KL": lambda mean, c: D.kl_divergence(
        D.MultivariateNormal(mean, c), D.MultivariateNormal(2 * mean, scale_tril=torch.linalg.cholesky(c + 1))
    ),
    "Wishart": lambda mean, c: D.Wishart(mean.norm() + 3, c).log_prob(c + torch.eye(3)),
    "its KL too": lambda mean, c: D.kl_divergence(
        D.Wishart(mean.norm() + 3, c), D.Wishart(mean.norm() + 4, 2 * c)
    ),
    "Geometric": lambda mean, c: D.Geometric(mean.sigmoid() * c[0, 0] / 9).log_prob(torch.tensor(2.0)),
    "ContinuousBernoulli": lambda mean, c: D.ContinuousBernoulli(
        mean.sigmoid() * c[0, 0] / 9, validate_args=True
    ).log_prob(torch.tensor(0.3)),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", DENSITIES)
def test_densities_of_distributions_that_check_their_arguments(name):
    fn = DENSITIES[name]
    leaves = [MEAN.clone().requires_grad_(), SPD.clone().requires_grad_()]
    expected = fn(*leaves).sum()
    slopes = torch.autograd.grad(expected, leaves, materialize_grads=True)
    f = as_jax_function(lambda *args: fn(*args).sum())
    value, found = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(to_jax(MEAN), to_jax(SPD))
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(f(to_jax(MEAN), to_jax(SPD)), expected.detach(), rtol=1e-5)
    for mine, theirs in zip(found, slopes, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_distribution_still_refuses_what_is_invalid_where_there_are_values():
    f = as_jax_function(
        lambda c: D.MultivariateNormal(torch.zeros(3), c, validate_args=True).log_prob(torch.ones(3))
    )
    with pytest.raises(ValueError, match="PositiveDefinite"):
        f(-jnp.eye(3))


def test_a_constraint_that_is_asked_for_itself_is_not_answered():
    f = as_jax_function(D.constraints.positive_definite.check)
    with pytest.raises(errors.OutputError, match="output_shape"):
        f(jnp.eye(3))


# --- questions of one's own ----------------------------------------------------------------------------------


def checked(x):
    if (x >= 100).any():  # pytest would have an assertion show its values, and ask for them
        raise AssertionError("too large")
    if torch.isnan(x).any():
        raise ValueError("not a number")
    torch._assert((x > -100).all(), "too small")
    if not torch.isfinite(x).all():
        raise ValueError(f"not finite, of shape {tuple(x.shape)}")
    return x.sin()


def test_checks_that_raise_are_passed_in_a_trace_and_made_in_a_call():
    f = as_jax_function(checked)
    x = jnp.arange(3.0)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: f(x).sum()))(x), jnp.cos(x), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(x), jnp.sin(x), atol=1e-6)
    with pytest.raises(AssertionError, match="too large"):
        f(x + 1000)
    with pytest.raises(ValueError, match="not a number"):
        f(x * jnp.nan)


def between(x):
    return x * 2 if x.sum() > 0 else x * 3


def one_raises_later(x):
    if x.sum() > 0:
        if (x > 100).any():
            raise ValueError("too large")
        return x * 2
    return x * 3


def only_one_can_be_traced(x):
    return F.dropout(x) if (x > 0).any() else x


def an_error_that_is_caught(x):
    try:
        if (x > 0).any():
            raise ValueError
    except ValueError:
        return x * 2
    return x * 3


def an_error_deeper_down(x):
    return torch.zeros(3) @ x if (x > 0).any() else x * 3


def an_error_without_a_raise(x):
    return x * [2.0][1] if (x > 0).any() else x * 3


def compared(x):
    return x * 2 if torch.equal(x, torch.zeros(2)) else x * 3


def an_error_for_want_of_another_value(x):
    if (x > 0).all():
        return x * 2
    try:
        scale = x.max().item()
    except RuntimeError as err:
        raise ValueError("no scale") from err
    return x * scale


def an_error_after_the_want_of_another_value(x):
    scale = None
    if (x > 0).all():
        return x * 2
    with contextlib.suppress(RuntimeError):
        scale = float(x.max())
    if scale is None:
        raise ValueError("no scale")
    return x * scale


def an_error_for_compilers(x):
    if (x > 0).all():
        return x * 2
    if torch.compiler.is_compiling():
        raise NotImplementedError("this branch runs eagerly alone")
    return x * 3


@pytest.mark.parametrize(
    "fn",
    [
        between,
        an_error_for_want_of_another_value,
        an_error_after_the_want_of_another_value,
        an_error_for_compilers,
        one_raises_later,
        only_one_can_be_traced,
        an_error_that_is_caught,
        an_error_deeper_down,
        an_error_without_a_raise,
        compared,
    ],
)
def test_a_choice_between_results_is_never_guessed(fn):
    with pytest.raises(errors.OutputError, match="depend on values"):
        as_jax_function(fn)(jnp.ones(2))


def or_else(read, otherwise):
    """Code that takes another number where a value cannot be read."""

    def fn(x):
        try:
            scale = read(x)
        except (RuntimeError, ValueError):
            scale = otherwise
        return x * scale

    return fn


CAUGHT = {
    "item": or_else(lambda x: x.max().item(), 1.0),
    "float": or_else(float, 1.0),
    "bool": or_else(lambda x: 2.0 if (x > 0).all() else 3.0, 1.0),
    "tolist": or_else(lambda x: sum(x.tolist()), 1.0),
    "numpy": or_else(lambda x: float(x.numpy().sum()), 1.0),
    "array": or_else(lambda x: float(np.asarray(x).sum()), 1.0),
    "nonzero": or_else(lambda x: x[x.nonzero()[:, 0]].sum(), 1.0),
    "mask": or_else(lambda x: x[x > 0].sum(), 1.0),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_what_code_does_for_want_of_a_value_is_not_what_it_does_with_values(name):
    f = as_jax_function(CAUGHT[name])
    with pytest.raises(errors.OutputError, match="depend on values"):
        jax.grad(lambda x: f(x).sum())(jnp.full(1, 3.0))


def test_a_question_that_has_an_answer_may_be_asked_in_a_try():
    def fn(x):
        try:
            assert (x > 0).all()
        except TypeError:
            return x * 3
        return x * 2

    assert jax.grad(lambda x: as_jax_function(fn)(x).sum())(jnp.ones(2)).tolist() == [2, 2]


def test_a_missing_key_is_still_what_is_missed():
    def fn(x):
        assert (x > 0).all()
        return F.dropout(x)

    with pytest.raises(errors.TransformError, match="key="):
        as_jax_function(fn)(jnp.ones(2))
    assert as_jax_function(fn)(jnp.ones(2), key=jax.random.key(0)).shape == (2,)


# --- code that knows of compilers -----------------------------------------------------------------------------


def faster_without_a_mask(x, mask):
    if not torch.compiler.is_compiling() and mask.all():
        return x.sum()
    return (x * mask).sum()


def test_code_is_traced_as_it_wants_to_be_compiled():
    f = as_jax_function(faster_without_a_mask)
    x = jnp.arange(3.0)
    for mask in (jnp.ones(3, bool), jnp.array([True, False, True])):
        assert f(x, mask) == (x * mask).sum()
        assert jax.jit(jax.grad(f))(x, mask).tolist() == mask.astype(float).tolist()
    assert not torch.compiler.is_compiling()


def test_code_that_knows_of_compilers_may_check_besides():
    def fn(x, mask):
        assert (x < 100).all()
        if torch.isnan(x).any():
            raise ValueError("not a number")
        y = faster_without_a_mask(x, mask)
        assert torch.isfinite(y)
        return y

    f = as_jax_function(fn)
    x, mask = jnp.arange(3.0), jnp.array([True, False, True])
    assert jax.grad(f)(x, mask).tolist() == [1, 0, 1]
    with pytest.raises(AssertionError):
        f(x + 1000, mask)


def test_the_flag_of_compilers_is_reset_after_an_error():
    def fn(x):
        if not torch.compiler.is_compiling() and x.all():
            return x
        return x @ torch.ones(7)

    with pytest.raises(errors.OutputError):
        as_jax_function(fn)(jnp.ones(3))
    assert not torch.compiler.is_compiling()


def test_without_the_flag_such_code_is_refused(monkeypatch):
    monkeypatch.delattr(torch.compiler, "_is_compiling_flag")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    with pytest.raises(errors.OutputError, match="depend on values"):
        as_jax_function(faster_without_a_mask)(jnp.ones(3), jnp.ones(3, bool))


# --- models of a hub -------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
IDS = torch.arange(12).reshape(2, 6)
PADDED = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED])
def test_a_bert_with_a_mask_is_trained_from_its_labels(mask):
    hub = pytest.importorskip("transformers")
    model = hub.BertForSequenceClassification(hub.BertConfig(**SMALL))
    trained_alike(model, IDS, attention_mask=mask, labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED])
def test_a_llama_with_a_mask_is_trained_from_its_labels(mask):
    hub = pytest.importorskip("transformers")
    model = hub.LlamaForCausalLM(hub.LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False))
    trained_alike(model, IDS, attention_mask=mask, labels=IDS)


def test_a_cache_in_the_result_is_named_with_what_leaves_it_out():
    hub = pytest.importorskip("transformers")
    apply, variables = as_jax_module(hub.LlamaModel(hub.LlamaConfig(**SMALL)))
    with pytest.raises(errors.OutputError, match=r"Cache.*use_cache=False"):
        apply(variables, to_jax(IDS))
    assert apply(variables, to_jax(IDS), use_cache=False).last_hidden_state.shape == (2, 6, 16)
