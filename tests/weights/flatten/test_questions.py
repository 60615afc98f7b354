"""Flattened maps, and maps made of flat vectors: asked for wherever shapes leave a doubt, and exact once said."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import errors, plan, to_flax, to_state_dict
from torchjax_bridge.weights import Flatten, LayerType, PairingWarning, layers


class Torch(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Flax(nnx.Module):
    def __init__(self, **parts: nnx.Module) -> None:
        for name, part in parts.items():
            setattr(self, name, part)


def _twin(part: nn.Module) -> Any:
    """The Flax layer for a torch layer, with settings for parity."""
    rngs = nnx.Rngs(0)
    match part:
        case nn.Conv2d():
            return nnx.Conv(part.in_channels, part.out_channels, part.kernel_size, padding="VALID", rngs=rngs)
        case nn.ConvTranspose2d():
            sizes = part.in_channels, part.out_channels, part.kernel_size
            return nnx.ConvTranspose(*sizes, padding="VALID", transpose_kernel=True, rngs=rngs)
        case nn.Linear():
            return nnx.Linear(part.in_features, part.out_features, rngs=rngs)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return nnx.BatchNorm(part.num_features, use_running_average=True, momentum=0.9, rngs=rngs)
        case nn.GroupNorm():
            return nnx.GroupNorm(
                part.num_channels, part.num_groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs
            )
        case nn.LayerNorm():
            return nnx.LayerNorm(part.normalized_shape[0], epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        case nn.PReLU():
            return layers.nnx.PReLU(part.num_parameters)
        case nn.LSTM():
            return nnx.RNN(nnx.OptimizedLSTMCell(part.input_size, part.hidden_size, rngs=rngs), rngs=rngs)
        case nn.MultiheadAttention():
            sizes = part.num_heads, part.embed_dim
            return nnx.MultiHeadAttention(*sizes, in_kv_features=part.kdim, decode=False, rngs=rngs)
        case nn.Bilinear():
            return Flax(
                weight=nnx.Param(jnp.zeros(part.weight.shape)), bias=nnx.Param(jnp.zeros(part.bias.shape))
            )
        case nn.Sequential():
            return nnx.Sequential(*map(_twin, part))
    return lambda x: x


def _pair(**parts: nn.Module) -> tuple[Torch, Any]:
    """A torch model, and its twin on shapes."""
    module = Torch(**parts).eval()
    return module, nnx.eval_shape(lambda: Flax(**{name: _twin(part) for name, part in parts.items()}))


def _asked(module: Any, template: Any, *rules: Any) -> list[str]:
    return [fault.path for fault in plan(module, template, rules=rules).faults]


@pytest.mark.parametrize(
    ("parts", "asked"),
    [
        ({"conv": nn.Conv2d(3, 16, 3), "fc": nn.Linear(64, 64), "fc2": nn.Linear(64, 10)}, ["fc", "fc2"]),
        ({"conv": nn.Conv2d(3, 16, 3), "down": nn.Linear(64, 6), "up": nn.Linear(6, 64)}, ["down", "up"]),
        ({"conv": nn.Conv2d(3, 16, 3), "down": nn.Linear(64, 7), "up": nn.Linear(7, 64)}, ["down"]),
        ({"conv": nn.Conv2d(3, 16, 3), "fc": nn.Linear(16, 64), "fc2": nn.Linear(64, 64)}, []),
        ({"conv": nn.Conv2d(3, 16, 3), "fc": nn.Linear(64, 10), "fc2": nn.Linear(10, 64)}, ["fc", "fc2"]),
        ({"conv": nn.Conv2d(3, 16, 3), "fc": nn.Linear(64, 10), "fc2": nn.Linear(10, 5)}, ["fc"]),
        ({"conv": nn.Conv2d(3, 16, 3), "rnn": nn.LSTM(64, 8), "fc": nn.Linear(8, 5)}, ["rnn"]),
        ({"conv": nn.Conv2d(3, 16, 3), "rnn": nn.LSTM(16, 8), "fc": nn.Linear(8, 5)}, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bare", [False, True])
def test_layers_that_only_give_each_other_their_width_do_not_explain_it(
    parts: dict[str, nn.Module], asked: list[str], bare: bool
) -> None:
    module, template = _pair(**parts)
    assert _asked(module.state_dict() if bare else module, template) == asked


def test_what_was_said_of_one_layer_of_a_circle_explains_the_others() -> None:
    module, template = _pair(conv=nn.Conv2d(3, 16, 3), fc=nn.Linear(64, 64), fc2=nn.Linear(64, 10))
    assert _asked(module, template, Flatten("fc", (16, 2, 2))) == []


def _draw(layer: nn.Module) -> None:
    """Another positive number for every feature, so that their order shows."""
    for tensor in layer.state_dict().values():
        if tensor.ndim:
            tensor.copy_(torch.rand(64) + 0.5)


BETWEEN = [nn.BatchNorm1d(64), nn.LayerNorm(64), nn.PReLU(64)]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda layer: type(layer).__name__)
def test_a_layer_between_a_flatten_and_its_linear_is_asked_for_and_follows_the_flatten(
    between: nn.Module,
) -> None:
    _draw(between)
    module, template = _pair(conv=nn.Conv2d(3, 16, 3), norm=between, fc=nn.Linear(64, 5))
    assert _asked(module, template) == ["norm", "fc"]
    assert _asked(module, template, Flatten("fc", (16, 2, 2))) == ["norm"]
    rules = [Flatten("norm", (16, 2, 2)), Flatten("fc", (16, 2, 2))]
    twin = to_flax(module, template, rules=rules)
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        expected = module.fc(module.norm(module.conv(x).flatten(1)))
    flat = twin.conv(jnp.asarray(x.permute(0, 2, 3, 1).numpy())).reshape(3, -1)
    np.testing.assert_allclose(twin.fc(twin.norm(flat)), expected, atol=1e-5)
    _assert_comes_back(module, twin, rules)


def test_an_lstm_that_reads_columns_of_a_map_follows_the_flatten() -> None:
    module, template = _pair(conv=nn.Conv2d(3, 8, 3), rnn=nn.LSTM(8 * 4, 6, batch_first=True))
    assert _asked(module, template) == ["rnn"]
    rules = [Flatten("rnn", (8, 4))]
    twin = to_flax(module, template, rules=rules)
    x = torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        maps = module.conv(x)  # (N, C, H, W): a step for every column
        expected, _ = module.rnn(maps.permute(0, 3, 1, 2).flatten(2))
    ours = twin.conv(jnp.asarray(x.permute(0, 2, 3, 1).numpy()))
    steps = ours.transpose(0, 2, 1, 3).reshape(2, 5, -1)
    np.testing.assert_allclose(twin.rnn(steps), expected, atol=1e-5)
    _assert_comes_back(module, twin, rules)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_map_made_of_a_linear_s_output_is_asked_for_and_follows_the_view(encoder: bool) -> None:
    parts: dict[str, nn.Module] = {"fc": nn.Linear(5, 16 * 4), "up": nn.ConvTranspose2d(16, 3, 2)}
    rules = [Flatten("fc", (16, 2, 2), output=True)]
    if encoder:  # whose last Linear takes as many inputs as the first of the decoder gives
        parts = {"conv": nn.Conv2d(3, 16, 2), "down": nn.Linear(64, 5), **parts}
        rules = [Flatten("down", (16, 2, 2)), *rules]
    module, template = _pair(**parts)
    assert "fc" in _asked(module, template, *rules[:-1])
    assert _asked(module, template, *rules[:-1], Flatten("fc", None, output=True)) == []
    twin = to_flax(module, template, rules=rules)
    noise = torch.randn(3, 5)
    with torch.no_grad():
        expected = module.up(module.fc(noise).view(3, 16, 2, 2)).permute(0, 2, 3, 1)
    got = twin.up(twin.fc(jnp.asarray(noise.numpy())).reshape(3, 2, 2, 16))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    _assert_comes_back(module, twin, rules)


@pytest.mark.parametrize("between", BETWEEN, ids=lambda layer: type(layer).__name__)
def test_a_layer_between_a_linear_and_the_map_made_of_it_is_asked_for_and_follows_the_view(
    between: nn.Module,
) -> None:
    _draw(between)
    module, template = _pair(fc=nn.Linear(5, 64), norm=between, up=nn.ConvTranspose2d(16, 3, 2))
    rules = [Flatten("fc", (16, 2, 2), output=True)]
    assert _asked(module, template, *rules) == ["norm"]
    assert _asked(module, template, Flatten("fc", None, output=True)) == []
    rules = [*rules, Flatten("norm", (16, 2, 2))]
    twin = to_flax(module, template, rules=rules)
    noise = torch.randn(3, 5)
    with torch.no_grad():
        expected = module.up(module.norm(module.fc(noise)).view(3, 16, 2, 2)).permute(0, 2, 3, 1)
    got = twin.up(twin.norm(twin.fc(jnp.asarray(noise.numpy()))).reshape(3, 2, 2, 16))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    _assert_comes_back(module, twin, rules)


CONV = nn.Conv2d(3, 16, 3)
FIXED = [
    ({"net": nn.MultiheadAttention(64, 4), "fc": nn.Linear(64, 5)}, ["net", "fc"]),
    ({"net": nn.MultiheadAttention(16, 4, kdim=64, vdim=64)}, ["net"]),
    ({"net": nn.MultiheadAttention(16, 4), "fc": nn.Linear(16, 5)}, []),
    ({"lift": nn.Linear(16, 64), "net": nn.MultiheadAttention(64, 4)}, []),
    ({"net": nn.Bilinear(64, 16, 5)}, ["net"]),
    ({"net": nn.Bilinear(16, 64, 5)}, ["net"]),
    ({"net": nn.Bilinear(16, 16, 5), "fc": nn.Linear(5, 5)}, []),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "asked"), FIXED)
@pytest.mark.parametrize("bare", [False, True])
def test_an_attention_or_a_bilinear_layer_over_a_flattened_map_is_asked_for(
    parts: dict[str, nn.Module], asked: list[str], bare: bool
) -> None:
    module, template = _pair(conv=CONV, **parts)
    given = [LayerType("net", type(module.net))] if bare else []
    source = module.state_dict() if bare else module
    assert _asked(source, template, *given) == asked
    assert _asked(source, template, *given, Flatten("net", None)) == []
    if asked:
        said = plan(source, template, rules=[*given, Flatten("net", (16, 2, 2))]).faults
        assert any(fault.kind == "rules" and "in torch's order only" in fault.message for fault in said)


def test_a_layer_that_may_read_a_map_is_asked_about_in_a_live_model_whatever_gives_as_much() -> None:
    parts = {"conv": CONV, "side": nn.Linear(5, 64), "fc": nn.Linear(64, 10)}
    module, template = _pair(**parts)
    assert _asked(module, template) == ["fc"]
    assert _asked(module.state_dict(), template) == []  # whose widths alone decide
    assert _asked(module, template, Flatten("fc", (16, 2, 2))) == []
    assert _asked(*_pair(conv=CONV, fc=nn.Linear(16, 10))) == []  # pooled to a point


class Activated(nn.BatchNorm2d):
    """As libraries of vision models have it."""


def test_a_norm_of_maps_reads_channels_also_as_a_class_of_its_own() -> None:
    parts = {"conv": nn.Conv2d(3, 8, 3), "norm": Activated(16), "fc": nn.Linear(16, 10)}  # of two maps of 8
    assert _asked(*_pair(**parts)) == []


@pytest.mark.parametrize("last", [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)])
def test_the_channels_of_a_map_that_goes_into_a_convolution_explain_no_layer_by_being_defined_last(
    last: nn.Module,
) -> None:
    parts = {
        "next": nn.Conv2d(64, 16, 3),
        "last": last,
        "fc": nn.Linear(64, 10),
    }  # 16 maps of 2 by 2, flattened
    assert _asked(*_pair(**parts)) == ["fc"]
    assert (
        _asked(*_pair(**{**parts, "next": nn.Conv2d(64, 24, 3)})) == []
    )  # no map of 24 channels has 64 numbers


LIFT = nn.Linear(5, 64)


@pytest.mark.parametrize(
    ("parts", "asked"),
    [
        ({"lift": LIFT, "up": nn.ConvTranspose2d(16, 8, 2)}, True),
        ({"lift": LIFT, "conv": nn.Conv2d(16, 8, 2)}, True),  # which no convolution gives 16 channels
        ({"conv": CONV, "mid": nn.Conv2d(16, 8, 2), "lift": LIFT}, False),
        ({"conv": CONV, "mid": nn.Conv2d(16, 8, 2), "lift": LIFT, "up": nn.Upsample()}, True),
        ({"conv": CONV, "lift": LIFT, "last": nn.Conv2d(16, 3, 2)}, True),  # which gives an image
        ({"conv": CONV, "lift": LIFT, "apart": nn.Unflatten(1, (4, 4, 4))}, True),
        ({"conv": CONV, "lift": LIFT, "apart": nn.Unflatten(1, (4, 4))}, False),
    ],
)
def test_a_linear_is_asked_about_where_a_map_may_be_made_of_as_many_features(
    parts: dict[str, nn.Module], asked: bool
) -> None:
    module, template = _pair(**parts)
    assert _asked(module, template) == ["lift"] * asked
    assert _asked(module, template, Flatten("lift", None, output=True)) == []


@pytest.mark.parametrize("width", [1, 2, 5, 97])
def test_a_prime_number_of_inputs_is_no_flattened_map(width: int) -> None:
    assert _asked(*_pair(conv=nn.Conv2d(3, 16, 3), fc=nn.Linear(width, 10))) == []
    assert _asked(*_pair(conv=nn.Conv2d(3, 16, 3), fc=nn.Linear(width + 3, 10))) == ["fc"] * (width != 2)


def test_groups_of_flattened_features_have_no_layout_and_are_asked_for() -> None:
    module, template = _pair(conv=nn.Conv2d(3, 16, 3), norm=nn.GroupNorm(4, 64), fc=nn.Linear(64, 5))
    flatten = Flatten("fc", (16, 2, 2))
    with pytest.raises(errors.PlanError, match=r"'norm' \(GroupNorm\) takes 64 features.*no layout"):
        to_flax(module, template, rules=[flatten])
    assert _asked(module, template, flatten, Flatten("norm", (16, 2, 2))) == ["norm", "norm"]
    assert _asked(module, template, Flatten("fc", None), Flatten("norm", None)) == []
    maps = {"conv": nn.Conv2d(3, 16, 3), "norm": nn.GroupNorm(4, 64), "two": nn.Conv2d(64, 4, 3)}
    assert _asked(*_pair(**maps, fc=nn.Linear(64, 5)), flatten) == []


def test_a_sequential_shows_a_flatten_and_an_unflatten_whatever_the_widths() -> None:
    coincidence = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(16, 10))
    module, template = _pair(net=coincidence)
    assert _asked(module, template) == ["net.3"]
    assert _asked(module, template, Flatten("net.3", (4, 2, 2))) == []
    pooled = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    assert _asked(*_pair(net=pooled)) == []
    made = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2))
    )
    assert _asked(*_pair(net=made)) == ["net.2"]
    assert _asked(*_pair(net=made), Flatten("net.2", (4, 2, 2), output=True)) == []


def test_a_flatten_in_a_model_that_shows_no_maps_is_assumed_and_warned_of() -> None:
    module, template = _pair(net=nn.Sequential(nn.Flatten(), nn.Linear(48, 5)))
    with pytest.warns(PairingWarning, match=r"'net\.0' \(Flatten\): an nn\.Flatten.*one channel"):
        to_flax(module, template)
    assert not plan(module, template, rules=[Flatten("net.1", None)]).assumed
    assert plan(*_pair(flat=nn.Flatten(), fc=nn.Linear(48, 5))).assumed
    assert not plan(*_pair(flat=nn.Flatten(2), fc=nn.Linear(48, 5))).assumed
    assert _asked(*_pair(unfold=nn.Unfold(2), fc=nn.Linear(12, 5))) == ["fc"]
    pooled, template = _pair(net=nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 5)))
    assert _asked(pooled, template) == ["net.2"]


@pytest.mark.parametrize("features", [(2, 2, 16), (2, 16, 2), (4, 16)])
def test_features_with_the_channels_last_are_refused_with_torch_s_order(features: tuple[int, ...]) -> None:
    module, template = _pair(conv=nn.Conv2d(3, 16, 3), fc=nn.Linear(64, 5))
    with pytest.raises(errors.PlanError, match=r"no layer has maps of [24] channels.*as torch has it"):
        to_flax(module, template, rules=[Flatten("fc", features)])
    assert _asked(module, template, Flatten("fc", (16, 2, 2))) == []
    assert _asked(module, template, Flatten("fc", (32, 2))) == []  # a concatenation could be


@pytest.mark.parametrize("features", ["16", (64,), (16, 2.0, 2), (0, 2), 64])
def test_features_that_are_no_sizes_are_refused_at_once(features: Any) -> None:
    with pytest.raises(errors.PlanError, match=r"takes the \(C, H, W\)"):
        Flatten("fc", features)


def test_a_layer_type_that_is_no_class_is_refused_at_once() -> None:
    with pytest.raises(errors.PlanError, match="takes a torch class such as"):
        LayerType("fc", nn.Linear(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [nn.Embedding(4, 6), nn.GroupNorm(2, 6), nn.LayerNorm((2, 3))])
def test_a_flatten_that_would_do_nothing_is_refused(part: nn.Module) -> None:
    template = nnx.State({})
    faults = plan(Torch(part=part), template, rules=[Flatten("part", (2, 3))]).faults
    assert any(fault.kind in ("rules", "mismatch") and fault.path == "part" for fault in faults)


def _assert_comes_back(module: nn.Module, twin: Any, rules: list[Flatten]) -> None:
    back = to_state_dict(twin, module, rules=rules)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    jax.block_until_ready(jax.tree.leaves(nnx.state(twin)))


def test_the_map_that_is_proposed_is_the_last_in_front_of_the_layer_and_has_an_order_to_lose() -> None:
    decoder = nn.Sequential(nn.ConvTranspose2d(16, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 1, 3))
    module, template = _pair(
        conv=nn.Conv2d(3, 4, 3), conv2=nn.Conv2d(4, 16, 3), mean=nn.Linear(256, 6), decoder=decoder
    )
    (fault,) = plan(module, template).faults
    assert 'Flatten("mean", (16, 4, 4))' in fault.message
    module, template = _pair(conv=nn.Conv2d(3, 16, 3), conv2=nn.Conv2d(16, 1, 3), mean=nn.Linear(256, 6))
    (fault,) = plan(module, template).faults
    assert 'Flatten("mean", (C, ...))' in fault.message


def test_a_norm_without_a_class_is_not_asked_about_beside_a_convolution_that_takes_as_much() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3)

    class NnxLayer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(12, rngs=rngs)
            self.conv = nnx.Conv(12, 4, (3, 3), padding="VALID", rngs=rngs)

    module = nn.Sequential(nn.Conv2d(3, 8, 3), Layer())  # whose 12 channels are 8 and 4 more, concatenated
    rngs = nnx.Rngs(0)
    template = nnx.Sequential(nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=rngs), NnxLayer(rngs))
    assert _asked(module.state_dict(), template) == []
    fitting, flat = _pair(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm1d(12), fc=nn.Linear(12, 2))
    assert _asked(fitting.state_dict(), flat) == ["norm", "fc"]


class _Heads(Torch):
    """Two heads beside a convolution: the second reads its flattened map, as wide as what the first one gives."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.conv(x)
        return self.gate(h.mean((2, 3))), self.head(_flat(h))


def _flat(h: torch.Tensor) -> torch.Tensor:
    return h.view(len(h), -1)


class _Hidden(Torch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gate(self.conv(x).mean((2, 3))))


@pytest.mark.parametrize(("kind", "asked"), [(_Heads, ["head"]), (_Hidden, [])])
def test_what_a_layer_gives_explains_no_other_whose_module_flattens_a_map(
    kind: type[Torch], asked: list[str]
) -> None:
    parts = {"conv": nn.Conv2d(3, 32, 3), "gate": nn.Linear(32, 512), "head": nn.Linear(512, 5)}
    template = Flax(**{name: _twin(part) for name, part in parts.items()})
    assert _asked(kind(**parts), template) == asked
