"""Mistakes that parity names by what it knows of a class: a carry, a mask, the epsilon of an own norm.

And by the order of its calls, where nothing else is found.
"""

from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import audit, parity, to_flax
from torchjax_bridge.weights import LayerType, SettingsWarning

# --- the carry of an LSTM --------------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.cell(x, (h, c))[0]


class NnxCell(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cell = nnx.OptimizedLSTMCell(4, 4, rngs=rngs)
        self.turned = False

    def __call__(self, x: jax.Array, h: jax.Array, c: jax.Array) -> jax.Array:
        return self.cell((h, c) if self.turned else (c, h), x)[1]


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cell = nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs), rngs=rngs)
        self.turned = False

    def __call__(self, x: jax.Array, h: jax.Array, c: jax.Array) -> jax.Array:
        return self.cell(x, initial_carry=(h, c) if self.turned else (c, h))


class LinenCell(ln.Module):
    turned: bool

    @ln.compact
    def __call__(self, x: jax.Array, h: jax.Array, c: jax.Array) -> jax.Array:
        return ln.LSTMCell(4, name="cell")((h, c) if self.turned else (c, h), x)[1]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.cell(x, (h[None], c[None]))[0]


@pytest.mark.parametrize("flavour", ["nnx", "nnx layer", "linen"])
def test_a_state_in_torch_s_order_is_found_by_running_the_cell_with_the_two_exchanged(flavour: str) -> None:
    torch.manual_seed(0)
    state = [torch.randn(3, 4) for _ in range(2)]
    module = Layer() if flavour == "nnx layer" else Cell()
    inputs = [torch.randn(3, 5, 4) if flavour == "nnx layer" else torch.randn(3, 4), *state]
    for turned in (False, True):
        model: Any
        if flavour == "linen":
            linen = LinenCell(turned)
            shapes = jax.eval_shape(linen.init, jax.random.key(0), *[jnp.zeros((3, 4))] * 3)
            model = linen, to_flax(module, shapes)
        else:
            kind = NnxCell if flavour == "nnx" else NnxLayer
            model = to_flax(module, nnx.eval_shape(lambda kind=kind: kind(nnx.Rngs(0))))
            model.turned = turned
        found = parity(module, model, *inputs)
        assert found.ok is not turned
        if turned:
            assert found.cause is not None
            assert (found.cause.kind, found.cause.proved) == ("carry", True), str(found)
            assert "give it (c, h)" in found.cause.fix


# --- a norm of one's own -----------------------------------------------------------------------------------


class Rms(nn.Module):
    def __init__(self, name: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)
        self.name = name
        setattr(self, name, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(self, self.name)) * self.weight


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Twin(nnx.Module):
    def __init__(self, epsilon: float) -> None:
        self.norm = nnx.RMSNorm(6, epsilon=epsilon, use_fast_variance=False, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


RULES = [LayerType("norm", nn.RMSNorm)]


@pytest.mark.parametrize("name", ["eps", "variance_epsilon"])
def test_the_epsilon_of_a_norm_of_one_s_own_is_compared_once_its_class_is_said(name: str) -> None:
    module, x = Model(Rms(name, 1e-5)), torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) / 100
    assert audit(module, Twin(1e-5), rules=RULES).ok
    (fault,) = audit(module, Twin(1e-3), rules=RULES).faults
    assert (fault.setting, fault.torch_name, fault.wanted, fault.effect) == ("epsilon", name, 1e-5, "output")
    with pytest.warns(SettingsWarning, match=f"{name}=1e-05 in torch, epsilon=0.001 in Flax"):
        twin = to_flax(module, Twin(1e-3), rules=RULES)
    cause = parity(module, twin, x, rules=RULES).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("epsilon", True)


def test_settings_that_were_not_compared_are_not_said_to_agree() -> None:
    module, x = (
        Model(Rms("hidden", 1e-5)),
        torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) / 100,
    )
    assert audit(module, Twin(1e-3), rules=RULES).ok
    cause = parity(module, to_flax(module, Twin(1e-3), rules=RULES), x, rules=RULES).cause
    assert cause is not None
    assert cause.kind == "unknown"
    assert cause.message.endswith("; its input and its weights agree")


# --- the order of calls ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.norm, self.mix, self.first = nn.LayerNorm(6), nn.Linear(6, 6), first
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x)) if self.first else self.norm(x + self.mix(x))


class NnxBlock(nnx.Module):
    def __init__(self, *, first: bool) -> None:
        rngs = nnx.Rngs(0)
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.mix, self.first = nnx.Linear(6, 6, rngs=rngs), first

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mix(self.norm(x)) if self.first else self.norm(x + self.mix(x))


@pytest.mark.parametrize("first", [False, True])
def test_a_norm_on_the_wrong_side_of_its_layer_is_the_order_of_calls(first: bool) -> None:
    torch.manual_seed(0)
    module, x = Block(first=first), torch.randn(3, 6)
    assert parity(module, to_flax(module, NnxBlock(first=first)), x).ok
    cause = parity(module, to_flax(module, NnxBlock(first=not first)), x).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("call order", False)
    one, other = (
        ("'mix' (Linear)", "'norm' (LayerNorm)") if first else ("'norm' (LayerNorm)", "'mix' (Linear)")
    )
    assert f"torch runs {one} after {other}, and Flax before it" in cause.message


# --- the mask of an attention ------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(
        self, x: torch.Tensor, padding: torch.Tensor, causal: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not self.attn.batch_first:
            x = x.swapaxes(0, 1)
        y = self.attn(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]
        return y if self.attn.batch_first else y.swapaxes(0, 1)


class NnxAttention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.way = "right"

    def __call__(self, x: jax.Array, padding: jax.Array, causal: jax.Array | None = None) -> jax.Array:
        mask = ~padding[:, None, None] if causal is None else ~padding[:, None, None] & ~causal
        return self.attn(x, mask={"right": mask, "turned": ~mask, "none": None}[self.way])


class LinenAttention(ln.Module):
    way: str

    @ln.compact
    def __call__(self, x: jax.Array, padding: jax.Array, causal: jax.Array | None = None) -> jax.Array:
        mask = ~padding[:, None, None] if causal is None else ~padding[:, None, None] & ~causal
        mask = {"right": mask, "turned": ~mask, "none": None}[self.way]
        return ln.MultiHeadDotProductAttention(2, name="attn")(x, mask=mask)


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize(("batch_first", "causal"), [(True, False), (True, True), (False, True)])
def test_a_mask_that_is_missing_or_turned_round_is_proved_by_torch_s(
    flavour: str, batch_first: bool, causal: bool
) -> None:
    torch.manual_seed(0)
    module, x = Attention(batch_first=batch_first).eval(), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    inputs = [x, padding, *([torch.ones(5, 5, dtype=torch.bool).triu(1)] if causal else [])]
    for way, words in (("right", ""), ("none", "mask in torch and none"), ("turned", "another mask in Flax")):
        model: Any
        if flavour == "linen":
            linen = LinenAttention(way)
            shapes = jax.eval_shape(
                linen.init, jax.random.key(0), jnp.zeros((3, 5, 8)), jnp.zeros((3, 5), bool)
            )
            model = linen, to_flax(module, shapes)
        else:
            model = to_flax(module, nnx.eval_shape(lambda: NnxAttention(nnx.Rngs(0))))
            model.way = way
        found = parity(module, model, *inputs)
        assert found.ok == (way == "right"), str(found)
        if words:
            assert found.cause is not None
            assert (found.cause.kind, found.cause.proved) == ("mask", True), str(found)
            assert words in found.cause.message


def test_a_mask_that_torch_has_not_is_found() -> None:
    class Plain(Attention):
        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    module, x = Plain(batch_first=True).eval(), torch.randn(2, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[4], [3]])
    cause = parity(module, to_flax(module, NnxAttention(nnx.Rngs(0))), x, padding).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("mask", True)
    assert cause.fix == "leave the mask out in Flax"


# --- images in a model without convolutions ----------------------------------------------------------------


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.view(len(x), -1))


class NnxFlat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(48, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x.reshape(len(x), -1))


def test_images_that_no_layer_shows_to_be_images_are_noted_and_tried_as_the_caller_says() -> None:
    torch.manual_seed(0)
    module, x = Flat(), torch.randn(2, 3, 4, 4)
    twin = to_flax(module, NnxFlat(nnx.Rngs(0)))
    found = parity(module, twin, x)
    assert found.ok
    assert any(
        "input 0 (2, 3, 4, 4) went into Flax as it is: pass channels_last=True" in n for n in found.notes
    )
    moved = parity(module, twin, x, channels_last=True)
    assert moved.cause is not None
    assert moved.cause.kind == "flatten order"
    assert not any("as it is" in note for note in moved.notes)
    assert not parity(module, twin, torch.randn(2, 1, 6, 8)).notes  # one channel has no order


# --- a norm over a whole map -------------------------------------------------------------------------------


class OverMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.LayerNorm((4, 3, 5))
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class LinenOverMaps(ln.Module):
    epsilon: float

    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = (-3, -2, -1)
        settings = {"reduction_axes": axes, "feature_axes": axes, "use_fast_variance": False}
        return ln.LayerNorm(epsilon=self.epsilon, **settings, name="norm")(ln.Conv(4, (1, 1), name="conv")(x))


def test_a_norm_over_channels_and_space_is_compared_with_its_channels_last() -> None:
    torch.manual_seed(0)
    module, x = OverMaps(), torch.randn(2, 2, 3, 5) / 50
    shapes = jax.eval_shape(LinenOverMaps(1e-5).init, jax.random.key(0), jnp.zeros((1, 3, 5, 2)))
    variables = to_flax(module, shapes)
    found = parity(module, (LinenOverMaps(1e-5), variables), x)
    assert found.ok, str(found)
    assert all(row.ok for row in found.rows)
    cause = parity(module, (LinenOverMaps(1e-2), variables), x).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("epsilon", True)
