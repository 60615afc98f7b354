"""Twins of the rule table: for any settings, the constructor makes the layer that computes what torch's does."""

import ast
import math
from pathlib import Path
from typing import Any

import flax.linen as ln
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from tests.marking import slow_but
from tests.weights.twins import draw, randomise, template
from torchjax_bridge import audit, errors, to_flax
from torchjax_bridge.weights import TWIN_RULES, layers
from torchjax_bridge.weights import rules as package
from torchjax_bridge.weights.rules import PLAIN, WEIGHTLESS, Symbol, Twin, twin_of

# torch says that an even kernel with padding="same" costs a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
both = pytest.mark.parametrize("flavour", slow_but(["nnx"], ["nnx", "linen"]))
Case = tuple[nn.Module, tuple[int, ...], float]  # the layer, the shape of its input, the mean of that
few = hypothesis.settings(max_examples=10, deadline=None, derandomize=True)

small = st.integers(1, 3)
maybe = st.booleans()
means = st.sampled_from([0, 30])
epsilons = st.sampled_from([1e-6, 1e-5, 1e-3])


# --- random layers -------------------------------------------------------------------------------------


def _axes(draw_: st.DrawFn, rank: int, numbers: st.SearchStrategy[int]) -> tuple[int, ...]:
    return tuple(draw_(st.lists(numbers, min_size=rank, max_size=rank)))


@st.composite
def linears(draw_: st.DrawFn) -> Case:
    width = draw_(small)
    return nn.Linear(width, draw_(small), bias=draw_(maybe)), (2, 3, width), 0


@st.composite
def convolutions(draw_: st.DrawFn) -> Case:
    rank, groups = draw_(small), draw_(small)
    kernel = _axes(draw_, rank, st.integers(1, 3))
    mode = draw_(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    padding: Any = draw_(st.sampled_from(["same", "valid", "numbers", "half"]))
    stride = (1,) * rank if padding == "same" else _axes(draw_, rank, small)
    if padding == "numbers":
        padding = _axes(draw_, rank, st.integers(0, 2))
    elif padding == "half":
        padding = tuple(size // 2 for size in kernel)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    channels = groups * draw_(small)
    module = kind(
        channels, groups * draw_(small), kernel, stride=stride, padding=padding, groups=groups,
        dilation=_axes(draw_, rank, st.integers(1, 2)), bias=draw_(maybe), padding_mode=mode,
    )  # fmt: skip
    return module, (2, channels, *_axes(draw_, rank, st.integers(5, 7))), 0


@st.composite
def transposed(draw_: st.DrawFn) -> Case:
    rank, groups = draw_(small), draw_(st.sampled_from([1, 1, 2]))
    stride, dilation = _axes(draw_, rank, small), _axes(draw_, rank, st.integers(1, 2))
    spare = [draw_(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    channels = groups * draw_(small)
    module = kind(
        channels, groups * draw_(small), _axes(draw_, rank, small), stride=stride, dilation=dilation,
        padding=_axes(draw_, rank, st.integers(0, 2)), output_padding=tuple(spare), groups=groups,
        bias=draw_(maybe),
    )  # fmt: skip
    return module, (2, channels, *_axes(draw_, rank, st.integers(5, 6))), 0


@st.composite
def batch_norms(draw_: st.DrawFn) -> Case:
    rank = draw_(st.integers(0, 3))
    kinds = [[nn.BatchNorm1d], [nn.BatchNorm1d], [nn.BatchNorm2d, nn.SyncBatchNorm], [nn.BatchNorm3d]]
    kind: Any = draw_(st.sampled_from(kinds[rank]))
    features, affine = draw_(small), draw_(maybe)
    module = kind(
        features, eps=draw_(epsilons), momentum=draw_(st.sampled_from([0.1, 0.01, 0.3])), affine=affine
    )
    return _perhaps_without_bias(draw_, module), (4, features, *_axes(draw_, rank, small)), draw_(means)


def _perhaps_without_bias(draw_: st.DrawFn, module: nn.Module) -> nn.Module:
    if draw_(maybe):
        module.register_parameter("bias", None)
    return module


@st.composite
def layer_norms(draw_: st.DrawFn) -> Case:
    shape = draw_(st.sampled_from([(5,), (1,), (3, 4), (2, 3, 4)]))
    affine = draw_(maybe)
    module = nn.LayerNorm(shape, eps=draw_(epsilons), elementwise_affine=affine, bias=draw_(maybe))
    return module, (3, 2, *shape), draw_(means)


@st.composite
def rms_norms(draw_: st.DrawFn) -> Case:
    shape = draw_(st.sampled_from([(5,), (3, 4)]))
    module = nn.RMSNorm(shape, eps=draw_(st.none() | epsilons), elementwise_affine=draw_(maybe))
    return module, (3, 2, *shape), 0


@st.composite
def group_norms(draw_: st.DrawFn) -> Case:
    groups, size = draw_(small), draw_(small)
    module = nn.GroupNorm(groups, groups * size, eps=draw_(epsilons), affine=draw_(maybe))
    return _perhaps_without_bias(draw_, module), (2, groups * size, 3, 2), draw_(means)


@st.composite
def instance_norms(draw_: st.DrawFn) -> Case:
    rank, features = draw_(small), draw_(small)
    kind: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]
    module = kind(features, eps=draw_(epsilons), affine=draw_(maybe))
    space = _axes(draw_, rank, st.integers(2, 3))
    return _perhaps_without_bias(draw_, module), (2, features, *space), draw_(means)


@st.composite
def embeddings(draw_: st.DrawFn) -> Case:
    rows = draw_(small)
    module = nn.Embedding(rows, draw_(small), padding_idx=draw_(st.none() | st.just(0)))
    return module, (2, 3), 0


@st.composite
def attentions(draw_: st.DrawFn) -> Case:
    heads, size = draw_(small), draw_(small)
    module = nn.MultiheadAttention(
        heads * size, heads, dropout=draw_(st.sampled_from([0.0, 0.5])), bias=draw_(maybe), batch_first=True
    )
    return module, (2, 4, heads * size), 0


@st.composite
def slopes(draw_: st.DrawFn) -> Case:
    count = draw_(small)
    return nn.PReLU(count), (2, count if count > 1 else 3, 4), 0


@st.composite
def dropouts(draw_: st.DrawFn) -> Case:
    kind: Any = draw_(st.sampled_from([nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]))
    rank = {nn.Dropout1d: 1, nn.Dropout3d: 3}.get(kind, 2)
    return kind(draw_(st.sampled_from([0.0, 0.25, 1.0]))), (2, 3, *[2] * rank), 0


@st.composite
def recurrent_layers(draw_: st.DrawFn) -> Case:
    width, kind = draw_(small), draw_(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    more = {"nonlinearity": draw_(st.sampled_from(["tanh", "relu"]))} if kind is nn.RNN else {}
    count = draw_(st.integers(1, 2))
    module = kind(
        width, draw_(small), num_layers=count, bias=draw_(maybe), bidirectional=draw_(maybe), batch_first=True,
        dropout=draw_(st.sampled_from([0.0, 0.5])) if count > 1 else 0.0, **more,
    )  # fmt: skip
    return module, (2, 4, width), 0


@st.composite
def cells(draw_: st.DrawFn) -> Case:
    width, kind = draw_(small), draw_(st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell]))
    more = {"nonlinearity": draw_(st.sampled_from(["tanh", "relu"]))} if kind is nn.RNNCell else {}
    return kind(width, draw_(small), bias=draw_(maybe), **more), (2, width), 0


LAYERS = {
    "recurrent layer": recurrent_layers(),
    "cell": cells(),
    "linear": linears(),
    "convolution": convolutions(),
    "transposed convolution": transposed(),
    "batch norm": batch_norms(),
    "layer norm": layer_norms(),
    "rms norm": rms_norms(),
    "group norm": group_norms(),
    "instance norm": instance_norms(),
    "embedding": embeddings(),
    "attention": attentions(),
    "prelu": slopes(),
    "dropout": dropouts(),
}

_CHANNELS_LAST_ALREADY = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase
)  # fmt: skip


def flax_axes(module: nn.Module, x: torch.Tensor) -> np.ndarray:
    """``(N, C, *space)`` to ``(N, *space, C)``, but for layers that read the last axis."""
    moved = x if isinstance(module, _CHANNELS_LAST_ALREADY) or x.ndim < 3 else x.movedim(1, -1)
    return moved.detach().contiguous().numpy()


def made(case: Case) -> tuple[nn.Module, torch.Tensor]:
    """The layer with weights that no default has, and its input."""
    module, shape, mean = case
    if isinstance(module, nn.Embedding):
        return randomise(module), torch.arange(math.prod(shape)).reshape(shape) % module.num_embeddings
    return randomise(module), draw(*shape) + mean


# --- running both ----------------------------------------------------------------------------------------


def torch_output(module: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        if isinstance(module, nn.MultiheadAttention):
            return flax_axes(module, module(x, x, x, need_weights=False)[0])
        if isinstance(module, nn.SyncBatchNorm) and module.training:  # which trains on a GPU only
            return flax_axes(module, nn.BatchNorm2d.forward(module, x))  # type: ignore[arg-type]
        if isinstance(module, nn.RNNCellBase):
            after = module(x, state(module))
            return (after[0] if isinstance(module, nn.LSTMCell) else after).numpy()
        y = module(x)
        return flax_axes(module, y[0] if isinstance(module, nn.RNNBase) else y)


def state(module: nn.RNNCellBase) -> Any:
    """What a cell carries: ``h``, in an LSTM ``(h, c)``."""
    h, c = (draw(2, module.hidden_size, seed=seed) for seed in (2, 3))
    return (h, c) if isinstance(module, nn.LSTMCell) else h


def flax_inputs(module: nn.Module, twin: Twin, x: torch.Tensor) -> tuple[Any, ...]:
    """What the twin is called with: the padded input, and in front of it what a cell carries."""
    given = jnp.asarray(flax_axes(module, x))
    if twin.pad is not None:
        given = jnp.pad(given, twin.pad.widths, mode=twin.pad.mode)
    if not isinstance(module, nn.RNNCellBase):
        return (given,)
    before = state(module)
    both = isinstance(before, tuple)
    return (before[1].numpy(), before[0].numpy()) if both else before.numpy(), given


def filled_twin(flavour: str, module: nn.Module, twin: Twin, xs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The linen module or None, and the weights: an nnx module or linen's variables."""
    model: Any = twin.linen() if flavour == "linen" else None
    empty = template(model or twin.nnx, *xs, **(mode(twin, False) if model else {}))
    if not module.state_dict():
        return model, {} if model else twin.nnx(nnx.Rngs(0))
    return model, to_flax(module, empty, rules=TWIN_RULES)


def mode(twin: Twin, train: bool) -> dict[str, object]:
    """How linen is told the mode in the call; an nnx module follows ``.train()`` and ``.eval()``."""
    if twin.in_linen().flax == "BatchNorm":
        return {"use_running_average": not train} | dict(twin.call)
    stochastic = twin.flax == "Dropout" or "dropout_rate" in twin.settings
    return {"deterministic": not train} if stochastic else {}


def flax_output(model: Any, filled: Any, twin: Twin, xs: tuple[Any, ...], train: bool) -> tuple[Any, Any]:
    """The output, and the statistics after the call."""
    if model is not None:

        def call(variables: Any, *xs: Any) -> Any:
            return model.apply(variables, *xs, mutable=["batch_stats"], **mode(twin, train))

        y, after = jax.jit(call)(filled, *xs)
        return output_of(y), after.get("batch_stats", {})
    (filled.train if train else filled.eval)()
    graph, state = nnx.split(filled)

    def step(state: Any, *xs: Any) -> Any:
        module = nnx.merge(graph, state)
        return module(*xs, **twin.call), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    y, after = jax.jit(step)(state, *xs)
    return output_of(y), after


def output_of(y: Any) -> Any:
    """The output; a cell gives what it carries in front of it."""
    return y[1] if isinstance(y, tuple) else y


def assert_close(ours: Any, want: Any) -> None:
    ours, want = np.asarray(ours, np.float64), np.asarray(want, np.float64)
    assert ours.shape == want.shape
    assert np.abs(ours - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-12)


def abstract(twin: Twin) -> Any:
    """The nnx module without values."""
    return nnx.eval_shape(lambda: twin.nnx(nnx.Rngs(0)))


def assert_audit_is_clean(flavour: str, module: nn.Module, twin: Twin, xs: tuple[Any, ...]) -> None:
    if not module.state_dict():
        return  # nothing that the plan could pair
    if flavour == "nnx":
        found = audit(module, abstract(twin), rules=TWIN_RULES)
    else:
        found = audit(module, twin.linen(), *xs, rules=TWIN_RULES, flax_kwargs=mode(twin, False))
    assert found.ok, found
    assert found.layers == 1 or twin.own or twin.flax == "Sequential"  # which are none of Flax's layers


@pytest.mark.every(4)
@both
@pytest.mark.parametrize("kind", LAYERS)
def test_the_twin_of_any_layer_evaluates_as_torch_does_and_has_its_settings(kind: str, flavour: str) -> None:
    @few
    @hypothesis.given(LAYERS[kind])
    def holds(case: Case) -> None:
        module, x = made(case)
        module.eval()
        try:
            want = torch_output(module, x)
        except RuntimeError:  # torch refuses a padding that is larger than the input
            hypothesis.reject()
        twin = twin_of(module)
        given = flax_inputs(module, twin, x)
        if flavour == "linen" and getattr(module, "num_layers", 1) > 1 and module.dropout:
            with pytest.raises(errors.SettingsError, match="tells its Dropout no mode"):
                twin.in_linen()
            return
        model, filled = filled_twin(flavour, module, twin, given)
        assert_close(flax_output(model, filled, twin, given, train=False)[0], want)
        assert_audit_is_clean(flavour, module, twin, given)

    holds()


@pytest.mark.every(2)
@both
@pytest.mark.parametrize("kind", ["batch norm", "convolution", "layer norm", "instance norm"])
def test_the_twin_of_a_layer_without_dropout_trains_as_torch_does(kind: str, flavour: str) -> None:
    @few
    @hypothesis.given(LAYERS[kind])
    def holds(case: Case) -> None:
        module, x = made(case)
        module.train()
        twin = twin_of(module, exact_statistics=True)
        given = flax_inputs(module, twin, x)
        model, filled = filled_twin(flavour, module, twin, given)
        try:
            want = torch_output(module, x)
        except RuntimeError:
            hypothesis.reject()
        y, statistics = flax_output(model, filled, twin, given, train=True)
        assert_close(y, want)
        for name, after in statistics.items():
            assert_close(after, getattr(module, f"running_{name}"))
        assert bool(statistics) == ("running_mean" in module.state_dict())
        assert_audit_is_clean(flavour, module, twin, given)

    holds()


# --- what a fresh twin starts from -----------------------------------------------------------------------

WIDE = [
    nn.Linear(64, 48),
    nn.Conv2d(32, 48, 3),
    nn.Conv2d(32, 64, 3, groups=4),
    nn.ConvTranspose2d(16, 48, 3),
    nn.ConvTranspose2d(64, 32, 3, groups=4),
    nn.Embedding(64, 48),
    nn.MultiheadAttention(48, 4),
    nn.MultiheadAttention(48, 4, kdim=24, vdim=24),
    nn.PReLU(),
    nn.PReLU(3),
    nn.LSTMCell(24, 48),
    nn.GRUCell(24, 48),
    nn.GRUCell(24, 48, bias=False),
    nn.RNNCell(24, 48),
    nn.LSTM(24, 48, batch_first=True, bidirectional=True),
    nn.GRU(24, 48, batch_first=True),
    nn.RNN(24, 48, batch_first=True),
]


@pytest.mark.every(3)
@both
@pytest.mark.parametrize("module", WIDE, ids=str)
def test_the_weights_of_a_fresh_twin_have_torch_s_scale(module: nn.Module, flavour: str) -> None:
    twin = twin_of(module)
    if flavour == "nnx":
        fresh = nnx.to_pure_dict(nnx.state(twin.nnx(nnx.Rngs(0)), nnx.Param))
    else:
        fresh = twin.linen().init(jax.random.key(0), *_examples(module))["params"]
    ours = {_scale(leaf) for path, leaf in jax.tree.leaves_with_path(fresh) if "bias" not in str(path)}
    want = {_scale(tensor.numpy()) for name, tensor in module.state_dict().items() if "bias" not in name}
    for side, other in ((ours, want), (want, ours)):
        for value in side:
            assert any(value == pytest.approx(one, rel=0.1) for one in other), (ours, want)


def _scale(weight: Any) -> float:
    """The standard deviation; the value itself of slopes, which are all the same."""
    return float(np.std(weight) if weight.size > 8 else np.mean(weight))


def _examples(module: Any) -> tuple[Any, ...]:
    """Inputs of the twin, by their shapes alone."""
    if isinstance(module, nn.Embedding):
        return (jnp.zeros((1,), jnp.int32),)
    if isinstance(module, nn.MultiheadAttention):
        return jnp.zeros((1, 2, 48)), jnp.zeros((1, 2, module.kdim))
    if isinstance(module, nn.RNNCellBase):
        carry = jnp.zeros((1, 48))
        return (carry, carry) if isinstance(module, nn.LSTMCell) else carry, jnp.zeros((1, 24))
    if isinstance(module, nn.RNNBase):
        return (jnp.zeros((1, 2, 24)),)
    if isinstance(module, nn.Linear):
        return (jnp.zeros((1, module.in_features)),)
    if isinstance(module, nn.PReLU):
        return (jnp.zeros((1, module.num_parameters)),)
    return (jnp.zeros((1, 5, 5, module.in_channels)),)


# --- as source ---------------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_twin_as_source_builds_what_the_twin_builds(kind: str) -> None:
    names = {
        "nnx": nnx,
        "linen": ln,
        "layers": layers,
        "jnp": jnp,
        "jax": jax,
        "initializers": nnx.initializers,
    }

    @few
    @hypothesis.given(LAYERS[kind], st.booleans())
    def holds(case: Case, exact: bool) -> None:
        twin = twin_of(case[0], exact_statistics=exact)
        built = nnx.eval_shape(lambda: eval(str(twin), names, {"rngs": nnx.Rngs(0)}))
        assert type(built) is type(abstract(twin))
        assert str(nnx.graphdef(built)) == str(nnx.graphdef(abstract(twin)))
        if "nnx.Dropout" not in str(twin) or twin.flax == "Dropout":  # a dropout in a Sequential
            assert str(eval(str(twin.in_linen()), names)) == str(twin.linen())

    holds()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            nn.Linear(3, 4),
            'nnx.Linear(3, 4, kernel_init=initializers.variance_scaling(1 / 3, "fan_in", "uniform"), rngs=rngs)',
        ),
        (nn.BatchNorm2d(4), "nnx.BatchNorm(4, momentum=0.9, use_fast_variance=False, rngs=rngs)"),
        (nn.LayerNorm(4), "nnx.LayerNorm(4, epsilon=1e-05, use_fast_variance=False, rngs=rngs)"),
        (nn.Dropout2d(0.1), "nnx.Dropout(0.1, broadcast_dims=(1, 2), rngs=rngs)"),
        (nn.PReLU(), "nnx.PReLU(negative_slope_init=0.25)"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_flax_s_defaults_are_left_out(module: nn.Module, source: str) -> None:
    assert str(twin_of(module)) == source


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (nn.Conv2d(4, 4, 3, stride=2, padding=1), {"strides": 2, "padding": 1}),
        (nn.Conv2d(4, 4, (3, 5), padding=(1, 2)), {"padding": (1, 2)}),
        (nn.Conv2d(4, 4, 3), {"padding": "VALID"}),
        (nn.Conv2d(4, 4, 4, padding="same"), {}),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), {"padding": "CIRCULAR"}),
    ],
    ids=str,
)
def test_a_convolution_says_as_little_as_it_can(module: nn.Module, settings: dict[str, object]) -> None:
    assert twin_of(module).settings == settings


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_what_no_word_of_flax_pads_is_padded_by_hand(mode: str) -> None:
    twin = twin_of(nn.Conv2d(4, 4, (3, 1), padding=(2, 1), padding_mode=mode))
    assert twin.settings == {"padding": "VALID"}
    how = {"circular": "wrap", "replicate": "edge"}.get(mode, mode)
    assert str(twin.pad) == f'jnp.pad(x, ((0, 0), (2, 2), (1, 1), (0, 0)), mode="{how}")'


# --- what has no twin, or not quite ------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Doubled(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def _untracked() -> nn.Module:
    module = nn.BatchNorm2d(3)
    module.track_running_stats = False
    return module


def _pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(3, 4), "weight", 1)


REFUSED = [
    (nn.Embedding(3, 4, max_norm=1.0), r"nn.Embedding has no Flax twin: max_norm=1 rescales rows"),
    (nn.BatchNorm1d(3, momentum=None), "momentum=None averages over all batches"),
    (_untracked(), "track_running_stats=False of a layer that has running statistics"),
    (nn.InstanceNorm2d(3, track_running_stats=True), "track_running_stats=True"),
    (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv=True"),
    (nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn=True"),
    (nn.MultiheadAttention(8, 2, kdim=3, vdim=4), "kdim=3 and vdim=4"),
    (nn.LSTM(3, 4, proj_size=2), "proj_size projects the hidden state"),
    (nn.Bilinear(2, 3, 4), "jnp.einsum"),
    (nn.EmbeddingBag(3, 4, mode="max"), "take the max over each bag by hand"),
    (nn.FeatureAlphaDropout(), "keeps mean and variance"),
    (nn.AlphaDropout(), "keeps mean and variance"),
    (Standardised(3, 4, 3), "Standardised has no Flax twin: it has a forward of its own"),
    (Doubled(3, 4), "a forward of its own, which need not compute what nn.Linear does"),
    (nn.LazyLinear(4), "knows its sizes after its first call"),
    (_pruned(), "'weight' is pruned"),
    (nn.ReLU(), "nn.ReLU has no Flax twin: no rule knows one"),
]


@pytest.mark.parametrize(("module", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_has_no_twin_says_why(module: nn.Module, words: str) -> None:
    with pytest.raises(errors.SettingsError, match=words):
        twin_of(module)


def test_a_patched_forward_has_no_twin_and_a_subclass_without_one_has_that_of_its_base() -> None:
    module = Renamed(3, 4)
    assert twin_of(module) == twin_of(nn.Linear(3, 4))
    module.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(errors.SettingsError, match="a forward of its own"):
        twin_of(module)


def test_every_rule_has_a_twin_or_says_why_it_has_none() -> None:
    refused = {type(module) for module, _ in REFUSED}
    made = {
        *(type(module) for module in WIDE),
        nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm2d,
        nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d,
        nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    }  # fmt: skip
    for rule in (*PLAIN, *WEIGHTLESS):
        assert rule.twin is not None, rule.name
        assert set(rule.types) <= made | refused, rule.name


def test_statistics_that_torch_does_not_keep_are_of_the_batch_in_every_call() -> None:
    module = nn.BatchNorm2d(3, track_running_stats=False).eval()
    randomise(module)
    x, twin = draw(4, 3, 2, 2), twin_of(module)
    given = flax_inputs(module, twin, x)
    for flavour in ("nnx", "linen"):
        model, filled = filled_twin(flavour, module, twin, given)
        assert_close(flax_output(model, filled, twin, given, train=False)[0], torch_output(module, x))


def test_what_differs_in_training_alone_is_noted() -> None:
    (note,) = twin_of(nn.Embedding(3, 4, padding_idx=0)).notes
    assert "padding_idx=0: torch gives this row no gradient" in note
    assert twin_of(nn.Embedding(3, 4)).notes == ()
    (note,) = twin_of(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))).notes
    assert "'weight' is computed by weight_norm in torch" in note
    (note,) = twin_of(nn.LSTM(3, 4)).notes
    assert "two biases" in note


def test_a_layer_of_another_dtype_has_a_twin_of_that_dtype() -> None:
    module = nn.Embedding(3, 4, dtype=torch.bfloat16)
    twin = twin_of(module)
    assert twin.settings == {"param_dtype": Symbol("jnp.bfloat16")}
    filled = to_flax(module, abstract(twin))
    assert filled(jnp.asarray([0])).dtype == jnp.bfloat16


@pytest.mark.usefixtures("x64_on")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_a_layer_of_64_bits_computes_in_64_bits(kind: Any) -> None:
    module = kind(3, 4, batch_first=True, dtype=torch.float64)
    x, twin = draw(2, 5, 3).double(), twin_of(module)
    y, _ = flax_output(*filled_twin("nnx", module, twin, (x.numpy(),)), twin, (x.numpy(),), train=False)
    assert y.dtype == np.float64
    assert np.abs(np.asarray(y) - module(x)[0].detach().numpy()).max() <= 1e-12


@both
@pytest.mark.parametrize("kind", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_dropout_of_channels_draws_once_for_all_of_space(kind: Any, flavour: str) -> None:
    twin = twin_of(kind(0.5))
    rank = int(kind.__name__[-2])
    x = np.ones((8, *[3] * rank, 8), np.float32)
    y = twin.nnx(nnx.Rngs(0))(x) if flavour == "nnx" else _stochastic(twin.linen(), x)
    shared = np.asarray(y).reshape(8, -1, 8)
    assert (shared == shared[:, :1]).all()
    assert 0.2 < (shared == 0).mean() < 0.8


def _stochastic(layer: Any, x: Any) -> Any:
    return layer.apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})


def test_attention_drops_weights_one_by_one_as_torch_does() -> None:
    assert twin_of(nn.MultiheadAttention(8, 2, dropout=0.5)).settings["broadcast_dropout"] is False


def test_a_twin_reads_no_values() -> None:
    with torch.device("meta"):
        assert twin_of(nn.Linear(3, 4)) == twin_of(nn.Linear(3, 4))


def test_a_twin_in_linen_s_names_makes_no_nnx_module() -> None:
    with pytest.raises(TypeError, match="no nnx module"):
        twin_of(nn.Linear(3, 4)).in_linen().nnx(nnx.Rngs(0))


def test_the_rules_import_flax_only_where_they_build() -> None:
    folder = Path(package.__file__ or "").parent
    for file in folder.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "flax" for name in names), file.name
