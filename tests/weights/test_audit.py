"""The audit: each setting that differs is found, with both values, and the fix that it names mends it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from tests.weights import models
from torchjax_bridge import audit, errors, parity, to_flax
from torchjax_bridge.weights import Audit, Flatten, SettingsWarning, layers
from torchjax_bridge.weights.settings._conv import _transposed_pads_of_word

FLATTEN = [Flatten("fc1", (4, 2, 2))]


def _nnx(kind: str, sizes: tuple[int, ...]) -> Callable[..., nnx.Module]:
    cls = getattr(
        nnx, {"Dense": "Linear", "MultiHeadDotProductAttention": "MultiHeadAttention"}.get(kind, kind)
    )

    def build(**settings: Any) -> nnx.Module:
        arguments: tuple[Any, ...] = sizes
        if kind in ("Conv", "ConvTranspose"):
            arguments = (*sizes[:2], sizes[2:])
        elif kind == "MultiHeadDotProductAttention":
            arguments = (settings.pop("num_heads"), sizes[0])
            settings["decode"] = settings.get("decode", False)
        return nnx.eval_shape(lambda: cls(*arguments, **settings, rngs=nnx.Rngs(0)))

    return build


def _linen(kind: str, sizes: tuple[int, ...]) -> Callable[..., ln.Module]:
    arguments: tuple[Any, ...] = ()
    if kind in ("Conv", "ConvTranspose"):
        arguments = (sizes[1], sizes[2:])
    elif kind == "Embed":
        arguments = sizes
    return partial(getattr(ln, kind), *arguments)


def _example(kind: str, sizes: tuple[int, ...]) -> jax.Array:
    if kind in ("Conv", "ConvTranspose"):
        return jnp.zeros((1, *(9 for _ in sizes[2:]), sizes[0]))
    if kind == "Embed":
        return jnp.zeros((1, 3), jnp.int32)
    return jnp.zeros((1, 5, 5, sizes[0]) if kind != "MultiHeadDotProductAttention" else (1, 5, sizes[0]))


def _audit(
    flavour: str, module: nn.Module, kind: str, sizes: tuple[int, ...], settings: dict[str, Any]
) -> Audit:
    if flavour == "nnx":
        return audit(module, _nnx(kind, sizes)(**settings))
    return audit(module, _linen(kind, sizes)(**settings), _example(kind, sizes))


BATCH = {"use_running_average": True, "epsilon": 1e-5, "momentum": 0.9}
EXACT = {"epsilon": 1e-5, "use_fast_variance": False}
CONV = {"padding": ((1, 1), (1, 1)), "strides": (2, 2)}
SAME = {"padding": "SAME"}

# torch layer, Flax class, sizes, settings that agree, one that does not, how torch calls it, what it changes
ROWS = {
    "conv-same-stride": (
        nn.Conv2d(3, 4, 3, stride=2, padding=1), "Conv", (3, 4, 3, 3), CONV, SAME, "padding", "output",
    ),
    "conv-same-for-none": (
        nn.Conv2d(3, 4, 3), "Conv", (3, 4, 3, 3), {"padding": "VALID"}, SAME, "padding", "output",
    ),
    "conv-same-for-even": (
        nn.Conv1d(3, 4, 4, padding=2), "Conv", (3, 4, 4), {"padding": 2}, SAME, "padding", "output",
    ),
    "conv-strides": (
        nn.Conv2d(3, 4, 3, stride=2, padding=1), "Conv", (3, 4, 3, 3), CONV, {"strides": 1}, "stride", "output",
    ),
    "conv-dilation": (
        nn.Conv2d(3, 4, 3, padding=1, dilation=2), "Conv", (3, 4, 3, 3),
        {"padding": 1, "kernel_dilation": 2}, {"kernel_dilation": (2, 1)}, "dilation", "output",
    ),
    "conv-input-dilation": (
        nn.Conv1d(3, 4, 3), "Conv", (3, 4, 3), {"padding": 0}, {"input_dilation": 2},
        "input_dilation", "output",
    ),
    "conv-circular": (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "Conv", (3, 4, 3, 3),
        {"padding": "CIRCULAR"}, {"padding": 1}, "padding", "output",
    ),
    "conv-dtype": (
        nn.Conv2d(3, 4, 3), "Conv", (3, 4, 3, 3), {"padding": 0}, {"dtype": jnp.bfloat16}, "dtype", "output",
    ),
    "transposed-same": (
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), "ConvTranspose", (3, 4, 3, 3),
        {"padding": ((1, 2), (1, 2)), "strides": (2, 2)}, {"padding": "VALID"}, "padding", "output",
    ),
    "batch-norm-epsilon": (
        nn.BatchNorm2d(4).eval(), "BatchNorm", (4,), BATCH, {"epsilon": 1e-3}, "eps", "output",
    ),
    "batch-norm-momentum": (
        nn.BatchNorm2d(4).eval(), "BatchNorm", (4,), BATCH, {"momentum": 0.99}, "momentum", "training",
    ),
    "batch-norm-fast-variance": (
        nn.BatchNorm2d(4, track_running_stats=True).train(), "BatchNorm", (4,),
        {**BATCH, "use_running_average": False, "use_fast_variance": False}, {"use_fast_variance": True},
        "the variance", "rounding",
    ),
    "batch-norm-without-statistics": (
        nn.BatchNorm2d(4, track_running_stats=False).eval(), "BatchNorm", (4,),
        {**BATCH, "use_running_average": False, "use_fast_variance": False}, {"use_running_average": True},
        "track_running_stats", "output",
    ),
    "batch-norm-axis": (
        nn.BatchNorm2d(5).eval(), "BatchNorm", (5,), BATCH, {"axis": 1}, "the axis of channels", "output",
    ),
    "layer-norm-epsilon": (
        nn.LayerNorm(4), "LayerNorm", (4,), EXACT, {"epsilon": 1e-6}, "eps", "output",
    ),
    "layer-norm-fast-variance": (
        nn.LayerNorm(4), "LayerNorm", (4,), EXACT, {"use_fast_variance": True}, "the variance", "rounding",
    ),
    "layer-norm-axes": (
        nn.LayerNorm(4), "LayerNorm", (4,), EXACT, {"reduction_axes": (-2, -1)}, "normalized_shape", "output",
    ),
    "rms-norm-epsilon": (
        nn.RMSNorm(4), "RMSNorm", (4,), {"epsilon": torch.finfo(torch.float32).eps}, {"epsilon": 1e-6},
        "eps", "output",
    ),
    "group-norm-groups": (
        nn.GroupNorm(2, 8), "GroupNorm", (8,), {**EXACT, "num_groups": 2}, {"num_groups": 4},
        "num_groups", "output",
    ),
    "embed-dtype": (
        nn.Embedding(5, 4), "Embed", (5, 4), {}, {"dtype": jnp.float16}, "dtype", "output",
    ),
    "attention-dropout": (
        nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), "MultiHeadDotProductAttention", (8,),
        {"num_heads": 2, "dropout_rate": 0.1, "deterministic": False}, {"dropout_rate": 0.2}, "dropout", "training",
    ),
}  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_setting_that_differs_is_found_with_both_values_and_its_fix_mends_it(
    flavour: str, row: Any
) -> None:
    module, kind, sizes, right, wrong, torch_name, effect = row
    assert _audit(flavour, module, kind, sizes, right).ok
    found = _audit(flavour, module, kind, sizes, {**right, **wrong})
    (fault,) = found.faults
    ((setting, value),) = wrong.items()
    assert (fault.setting, fault.torch_name, fault.effect) == (setting, torch_name, effect)
    shown = jnp.dtype(value).name if setting == "dtype" else value
    assert fault.flax_value == shown
    assert f"{setting}={shown!r} in Flax; type " in str(fault)
    fix = fault.fix.split(", where")[0]
    mended = {**right, **wrong, **eval(f"dict({fix})", {"jnp": jnp})}
    assert _audit(flavour, module, kind, sizes, mended).ok


# --- the same thing said otherwise ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "padding"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), "SAME"),
        (nn.Conv2d(3, 4, 3, padding="same"), "SAME"),
        (nn.Conv2d(3, 4, 4, padding="same"), "SAME"),
        (nn.Conv2d(3, 4, 4, padding="same"), ((1, 2), (1, 2))),
        (nn.Conv2d(3, 4, 3, padding="valid"), 0),
        (nn.Conv2d(3, 4, 1, stride=2), "SAME"),
        (nn.Conv2d(3, 4, (5, 3), padding=(2, 1)), (2, 1)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), "VALID"),
        (nn.Conv2d(3, 4, 3, padding=0, padding_mode="circular"), "VALID"),
    ],
    ids=str,
)
def test_paddings_that_mean_the_same_are_no_difference(module: nn.Conv2d, padding: Any) -> None:
    settings = {"padding": padding, "strides": module.stride}
    assert _audit("nnx", module, "Conv", (3, 4, *module.kernel_size), settings).ok


@pytest.mark.parametrize("word", ["SAME", "SAME_LOWER"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "unless"),
    [
        (4, 4, 0, 1, "size % 4 is 0"),
        (3, 4, 0, 1, "size % 4 is 0 or 3"),
        (3, 2, 1, 1, "size % 2 is 1"),
        (7, 2, 3, 1, "size % 2 is 1"),
        (2, 3, 0, 2, "size % 3 is 0"),
        (5, 2, 1, 1, ""),
        (4, 2, 0, 1, ""),
    ],
)
def test_a_padding_in_words_is_reported_with_the_sizes_for_which_it_is_torch_s(
    word: str, kernel: int, stride: int, padding: int, dilation: int, unless: str
) -> None:
    module = nn.Conv1d(3, 4, kernel, stride, padding, dilation)
    settings = {"padding": word, "strides": stride, "kernel_dilation": dilation}
    (fault,) = _audit("nnx", module, "Conv", (3, 4, kernel), settings).faults
    assert (fault.setting, fault.effect, fault.unless) == ("padding", "output", unless)
    reach = dilation * (kernel - 1) + 1
    alike = {
        size % stride
        for size in range(20, 20 + stride)
        if jax.lax.padtype_to_pads((size,), (reach,), (stride,), word) == [(padding, padding)]
    }
    assert alike == {
        place for place in range(stride) if str(place) in unless.partition(" is ")[2].split(" or ")
    }
    assert str(fault).count(f"(changes outputs unless {unless}) @") == bool(unless)


def test_a_patch_embedding_says_of_every_axis_for_which_sizes_same_is_torch_s() -> None:
    module = nn.Conv2d(3, 4, (4, 2), (4, 2))
    settings = {"padding": "SAME", "strides": (4, 2)}
    found = _audit("linen", module, "Conv", (3, 4, 4, 2), settings)
    assert "output unless size % 4 is 0 and size % 2 is 0" in str(found)
    twice = nn.Conv2d(3, 4, 4, 4)
    (fault,) = _audit("nnx", twice, "Conv", (3, 4, 4, 4), {"padding": "SAME", "strides": 4}).faults
    assert fault.unless == "size % 4 is 0"
    (*_, fault) = _audit("nnx", twice, "Conv", (3, 4, 4, 4), {"padding": "SAME", "strides": 2}).faults
    assert (fault.setting, fault.unless) == ("padding", "")  # another stride altogether


@pytest.mark.parametrize(("padding", "alike"), [(0, True), (4, True), (2, False), ("same", False)])
def test_a_causal_convolution_is_one_that_torch_pads_or_cuts_by_hand(padding: Any, alike: bool) -> None:
    module = nn.Conv1d(3, 4, 3, dilation=2, padding=padding)
    settings = {"padding": "CAUSAL", "kernel_dilation": 2}
    assert _audit("nnx", module, "Conv", (3, 4, 3), settings).ok == alike


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("size", "stride"), [(3, 2), (2, 2), (2, 3), (4, 1)])
def test_the_words_of_a_transposed_convolution_are_read_as_jax_reads_them(
    padding: str, size: int, stride: int
) -> None:
    x, kernel = jnp.arange(1.0, 6.0).reshape(1, 5, 1), jnp.arange(1.0, 1.0 + size).reshape(size, 1, 1)
    run = partial(jax.lax.conv_transpose, x, kernel, (stride,))
    numbers = _transposed_pads_of_word(padding, size, stride)
    dimensions = ("NHC", "HIO", "NHC")
    want = run(padding=padding, dimension_numbers=dimensions)
    assert jnp.array_equal(run(padding=(numbers,), dimension_numbers=dimensions), want)


# --- modes ---------------------------------------------------------------------------------------------


def test_an_nnx_norm_that_follows_train_and_eval_gives_no_alarm() -> None:
    settings = {"epsilon": 1e-5, "momentum": 0.9}
    assert _audit("nnx", nn.BatchNorm2d(4).eval(), "BatchNorm", (4,), settings).ok


@pytest.mark.parametrize(
    ("training", "fixed", "effect"),
    [(False, False, "output"), (True, True, "training"), (False, True, None), (True, None, None)],
)
def test_a_linen_norm_whose_constructor_fixes_the_mode_is_compared_with_torchs(
    training: bool, fixed: bool | None, effect: str | None
) -> None:
    module = nn.BatchNorm2d(4).train(training)
    layer = ln.BatchNorm(fixed, epsilon=1e-5, momentum=0.9, use_fast_variance=False)
    kwargs = {"use_running_average": not training} if fixed is None else {}
    found = audit(module, layer, jnp.zeros((1, 5, 5, 4)), flax_kwargs=kwargs)
    assert [(fault.setting, fault.effect) for fault in found.faults] == (
        [("use_running_average", effect)] if effect else []
    )


# --- layers without weights ----------------------------------------------------------------------------


def _act(activation: nn.Module, function: Any, flavour: str, *, attribute: bool) -> Audit:
    """A Linear and an activation: in a Sequential, or as attributes of a module."""
    if attribute:

        class Torch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.act = nn.Linear(3, 3), activation

        class Nnx(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.fc, self.act = nnx.Linear(3, 3, rngs=rngs), function

        class Linen(ln.Module):
            act: Callable[..., Any]

            @ln.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return self.act(ln.Dense(3, name="fc")(x))

        module, linen = Torch(), Linen(function)
        template = Nnx(nnx.Rngs(0))
    else:
        module = nn.Sequential(nn.Linear(3, 3), activation)
        linen = ln.Sequential([ln.Dense(3), function])
        template = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), function)
    return audit(module, template) if flavour == "nnx" else audit(module, linen, jnp.zeros((1, 3)))


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("attribute", [False, True], ids=["in a Sequential", "as an attribute"])
@pytest.mark.parametrize(
    ("activation", "function", "setting"),
    [
        (nn.GELU(), jax.nn.gelu, "approximate"),
        (nn.GELU(), partial(jax.nn.gelu, approximate=False), None),
        (nn.GELU("tanh"), jax.nn.gelu, None),
        (nn.GELU("tanh"), partial(jax.nn.gelu, approximate=False), "approximate"),
        (nn.LeakyReLU(0.2), nnx.leaky_relu, "negative_slope"),
        (nn.LeakyReLU(0.2), partial(nnx.leaky_relu, negative_slope=0.2), None),
        (nn.SiLU(), nnx.swish, None),
        (nn.ReLU(), ln.silu, "activation"),
        (nn.ReLU(), lambda x: x, None),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_an_activation_of_another_flavour_is_found_where_it_can_be_seen(
    flavour: str, attribute: bool, activation: nn.Module, function: Any, setting: str | None
) -> None:
    found = _act(activation, function, flavour, attribute=attribute)
    assert [fault.setting for fault in found.faults] == ([setting] if setting else [])
    if setting:
        fix = eval(found.faults[0].fix, {"jax": jax, "partial": partial})
        assert _act(activation, fix, flavour, attribute=attribute).ok


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.drop, self.last = nn.Dropout(0.1), nn.Dropout2d(0.5)


@pytest.mark.parametrize("names", [("drop", "last"), ("first", "second")])
def test_dropouts_are_compared_by_name_or_in_order(names: tuple[str, str]) -> None:
    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, *rates: float) -> None:
            self.fc = nnx.Linear(3, 3, rngs=rngs)
            setattr(self, names[0], nnx.Dropout(rates[0], rngs=rngs))
            setattr(self, names[1], nnx.Dropout(rates[1], broadcast_dims=(1, 2), rngs=rngs))

    class Linen(ln.Module):
        rates: tuple[float, ...]

        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = ln.Dropout(self.rates[0], name=names[0])(ln.Dense(3, name="fc")(x), deterministic=True)
            return ln.Dropout(self.rates[1], broadcast_dims=(1, 2), name=names[1])(x, deterministic=True)

    for rates, want in (((0.1, 0.5), []), ((0.1, 0.2), [("last", 0.5, 0.2)])):
        for found in (
            audit(Dropping(), Nnx(nnx.Rngs(0), *rates)),
            audit(Dropping(), Linen(rates), jnp.zeros((1, 2, 2, 3))),
        ):
            assert [(f.torch_path, f.torch_value, f.flax_value) for f in found.faults] == want


# --- whole models --------------------------------------------------------------------------------------


def test_a_network_that_is_set_up_alike_has_no_faults() -> None:
    found = audit(models.net(), models.abstract_nnx_net(), rules=FLATTEN)
    assert found.ok, str(found)
    assert found.layers == 11
    assert "11 layers compared, 0 settings differ" in str(found)


def test_linen_layers_are_found_at_any_depth_and_every_fault_is_listed() -> None:
    image = jnp.zeros(models.IMAGE)
    found = audit(models.net(), models.LinenNet(), image, rules=FLATTEN)
    assert [(f.torch_path, f.flax_path, f.setting) for f in found.faults] == [
        (f"blocks.{block}.{norm}", f"blocks_{block}.{norm}", "momentum")
        for block in range(2)
        for norm in ("bn1", "bn2")
    ]
    variables = models.abstract_linen_variables()
    assert audit(models.net(), (models.LinenNet(), variables), image, rules=FLATTEN) == found
    with pytest.raises(errors.SettingsError, match="4 settings differ") as caught:
        audit(models.net(), models.LinenNet(), image, rules=FLATTEN, strict=True)
    assert str(caught.value).count("momentum=0.1 in torch, momentum=0.99 in Flax; type BatchNorm(..., ") == 4


def test_the_layers_of_a_scan_are_each_compared() -> None:
    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.blocks = nnx.vmap(lambda key: nnx.LayerNorm(4, epsilon=1e-5, rngs=nnx.Rngs(key)))(
                jax.random.split(rngs.params(), 3)
            )

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.LayerNorm(4, eps=eps) for eps in (1e-5, 1e-3, 1e-5))

    found = audit(Torch(), Nnx(nnx.Rngs(0)))
    output = [fault for fault in found.faults if fault.effect == "output"]
    assert [(fault.torch_path, fault.torch_value) for fault in output] == [("blocks.1", 1e-3)]


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_the_functions_of_a_cell_are_compared_inside_its_rnn(flavour: str) -> None:
    module = nn.RNN(3, 4, nonlinearity="relu", batch_first=True)

    def rnn(function: Any) -> nnx.RNN:
        cell = nnx.SimpleCell(3, 4, activation_fn=function, rngs=nnx.Rngs(0))
        return nnx.RNN(cell, rngs=nnx.Rngs(0))

    for function, want in ((jnp.tanh, ["activation_fn"]), (jax.nn.relu, [])):
        if flavour == "nnx":
            found = audit(module, nnx.eval_shape(partial(rnn, function)))
        else:
            found = audit(module, ln.RNN(ln.SimpleCell(4, activation_fn=function)), jnp.zeros((1, 5, 3)))
        assert [fault.setting for fault in found.faults] == want


@pytest.mark.parametrize("reverse", [True, False])
def test_a_recurrent_layer_that_runs_backwards_is_not_one_of_torch_s_that_runs_forwards(
    reverse: bool,
) -> None:
    def rnn(reverse: bool = False) -> nnx.RNN:
        cell = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
        return nnx.RNN(cell, reverse=reverse, rngs=nnx.Rngs(0))

    found = audit(nn.LSTM(3, 4), nnx.eval_shape(lambda: rnn(reverse)))
    assert [(fault.setting, fault.effect) for fault in found.faults] == [("reverse", "output")] * reverse
    both = nnx.eval_shape(lambda: nnx.Bidirectional(rnn(), rnn(reverse), rngs=nnx.Rngs(0)))
    assert audit(nn.LSTM(3, 4, bidirectional=True), both).ok


class NnxTwoLayers(nnx.Module):
    def __init__(self, rate: float | None, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(
            [nnx.RNN(nnx.OptimizedLSTMCell(size, 4, rngs=rngs), rngs=rngs) for size in (3, 4)]
        )
        if rate is not None:
            self.drop = nnx.Dropout(rate, rngs=rngs)


class LinenTwoLayers(ln.Module):
    rate: float | None

    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ln.RNN(ln.OptimizedLSTMCell(4))(x)
        if self.rate is not None:
            x = ln.Dropout(self.rate, deterministic=True)(x)
        return ln.RNN(ln.OptimizedLSTMCell(4))(x)


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_dropout_between_recurrent_layers_is_compared(flavour: str, rate: float) -> None:
    module = nn.LSTM(3, 4, num_layers=2, batch_first=True, dropout=rate)

    def faults(other: float | None) -> list[Any]:
        if flavour == "nnx":
            return list(audit(module, nnx.eval_shape(lambda: NnxTwoLayers(other, nnx.Rngs(0)))).faults)
        return list(audit(module, LinenTwoLayers(other), jnp.zeros((1, 5, 3))).faults)

    assert faults(rate) == []
    (fault,) = faults(0.1)
    assert (fault.in_torch, fault.in_flax, fault.to_type, fault.effect) == (
        f"dropout={rate}",
        "rate=0.1",
        f"Dropout(..., rate={rate})",
        "training",
    )
    lost = faults(None)
    assert [fault.to_type for fault in lost] == ["Dropout(0.3) between the layers of cells"] * (rate > 0)


def test_a_dropout_beside_the_recurrent_layers_counts_unless_it_is_another_torch_layers() -> None:
    class Torch(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.3)
            for name, part in parts.items():
                setattr(self, name, part)

    class Nnx(nnx.Module):
        def __init__(self) -> None:
            self.lstm = NnxTwoLayers(None, nnx.Rngs(0))
            self.drop = nnx.Dropout(0.3, rngs=nnx.Rngs(0))

    assert audit(Torch(), nnx.eval_shape(Nnx)).ok
    assert [f.torch_path for f in audit(Torch(drop=nn.Dropout(0.3)), nnx.eval_shape(Nnx)).faults] == ["lstm"]


def test_a_layer_inside_linens_weight_norm_is_compared() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3, padding=1)))

    class Linen(ln.Module):
        padding: Any

        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.WeightNorm(ln.Conv(4, (3,), padding=self.padding), name="conv")(x)

    x = jnp.zeros((1, 9, 3))
    assert audit(module, Linen(1), x).ok
    assert [fault.setting for fault in audit(module, Linen("VALID"), x).faults] == ["padding"]


def test_our_own_layers_are_compared_as_the_ones_they_are_derived_from() -> None:
    ours = nnx.eval_shape(lambda: layers.nnx.BatchNorm(4, epsilon=1e-3, momentum=0.9, rngs=nnx.Rngs(0)))
    assert [fault.setting for fault in audit(nn.BatchNorm2d(4).eval(), ours).faults] == ["epsilon"]


# --- converting ----------------------------------------------------------------------------------------


def test_converting_warns_of_settings_that_change_outputs_and_of_no_others() -> None:
    def layer(**settings: Any) -> nnx.BatchNorm:
        return nnx.eval_shape(lambda: nnx.BatchNorm(4, **settings, rngs=nnx.Rngs(0)))

    module = nn.BatchNorm2d(4).eval()
    with pytest.warns(
        SettingsWarning, match=r"1 setting differs\n  eps=1e-05 in torch, epsilon=0\.001 in"
    ) as caught:
        to_flax(module, layer(epsilon=1e-3, momentum=0.99))
    assert caught[0].filename == __file__
    to_flax(module, layer(epsilon=1e-5, momentum=0.99))  # changes training only
    to_flax(module.state_dict(), layer(epsilon=1e-3))  # keys say nothing about settings


# --- what cannot be audited ----------------------------------------------------------------------------


def test_what_is_no_live_model_is_refused() -> None:
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(errors.SettingsError, match="pass the live nn"):
        audit(nn.Linear(2, 2).state_dict(), layer)
    with pytest.raises(errors.SettingsError, match="no live Flax model"):
        audit(nn.Linear(2, 2), nnx.state(layer))
    with pytest.raises(errors.SettingsError, match="pass example inputs"):
        audit(nn.Linear(2, 2), ln.Dense(2))
    with pytest.raises(errors.PlanError):
        audit(nn.Linear(2, 2), nnx.Conv(1, 1, (3, 3), rngs=nnx.Rngs(0)))


def test_what_could_not_be_paired_is_said() -> None:
    found = audit(models.net(), models.abstract_nnx_net())
    assert found.ok
    assert "not paired: ambiguous: 'fc1' (Linear) takes 16 inputs in a model with feature maps" in str(found)


# --- padding by hand -------------------------------------------------------------------------------------


class _PadsByHand(nnx.Module):
    def __init__(self) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, padding="VALID", rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))


class _Padded(nn.Module):
    def __init__(self, *, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.conv = nn.Conv2d(3, 4, 3, 2, padding=0 if by_hand else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)) if self.by_hand else x)


def test_a_padding_by_hand_is_named_as_what_makes_the_difference_none() -> None:
    module = _Padded(by_hand=False)
    says = r"changes outputs unless the Flax model pads its input by hand, by \(\(1, 1\), \(1, 1\)\)"
    with pytest.warns(SettingsWarning, match=says):
        twin = to_flax(module, _PadsByHand())
    assert parity(module, twin, torch.randn(2, 3, 8, 8)).ok
    module, same = (
        _Padded(by_hand=True),
        nnx.Conv(3, 4, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=nnx.Rngs(0)),
    )
    (fault,) = audit(module.conv, same).faults
    assert fault.unless == "torch pads its input by hand, by ((0, 1), (0, 1))"
    (fault,) = audit(
        nn.Conv2d(3, 4, 3, padding=2), nnx.Conv(3, 4, (3, 3), padding=1, rngs=nnx.Rngs(0))
    ).faults
    assert fault.unless == ""
