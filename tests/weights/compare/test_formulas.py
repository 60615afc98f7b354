"""What two models compute between layers is named where both formulas are found, and nothing else is named."""

from collections.abc import Callable
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from tests.marking import slow_but
from torchjax_bridge import parity, to_flax
from torchjax_bridge.weights import Flatten

pytestmark = pytest.mark.filterwarnings("ignore::torchjax_bridge.weights.SettingsWarning")

RULES = [Flatten("gate", None), Flatten("head", None)]


class Net(nn.Module):
    """A stem, two branches, a gate and a head; each test joins them in its own way."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.join = forward
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.wide = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.gate, self.last, self.end = nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 16, 1)
        self.part = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(self, x)


def _parts(conv: Any, norm: Any, dense: Any) -> dict[str, Any]:
    return {
        "stem": conv(3, 8, 3, 1, 1), "norm": norm(8), "body": conv(8, 8, 3, 1, 1), "wide": conv(8, 16, 3, 2, 1),
        "gate": dense(8, 8), "last": conv(8, 8, 1, 1, 0), "end": conv(16, 16, 1, 1, 0),
        "part": conv(4, 4, 1, 1, 0), "head": dense(8, 5),
    }  # fmt: skip


class NnxNet(nnx.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        rngs = nnx.Rngs(0)
        parts = _parts(
            lambda i, o, k, s, p: nnx.Conv(i, o, (k, k), strides=s, padding=p, rngs=rngs),
            lambda c: nnx.BatchNorm(
                c, epsilon=1e-5, momentum=0.9, use_running_average=True, use_fast_variance=False, rngs=rngs
            ),
            lambda i, o: nnx.Linear(i, o, rngs=rngs),
        )
        for name, part in parts.items():
            setattr(self, name, part)
        self.join = forward

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.join(self, x)


class LinenNet(ln.Module):
    join: Callable[..., Any]

    def setup(self) -> None:
        parts = _parts(
            lambda i, o, k, s, p: ln.Conv(o, (k, k), strides=s, padding=p),
            lambda c: ln.BatchNorm(True, epsilon=1e-5, momentum=0.9, use_fast_variance=False),
            lambda i, o: ln.Dense(o),
        )
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            y, h = self.norm(self.stem(x)), self.part(x[..., :1].repeat(4, -1))
            self.body(y), self.last(y), self.head(self.gate(y.mean((1, 2)))), self.end(self.wide(y)), h
        return self.join(self, x)


def _twin(flavour: str, module: Net, forward: Callable[..., Any]) -> Any:
    if flavour == "nnx":
        return to_flax(module, nnx.eval_shape(lambda: NnxNet(forward)), rules=RULES)
    linen = LinenNet(forward)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return linen, to_flax(module, shapes, rules=RULES)


# --- how it is joined: in torch, in Flax, and what is to be found for each wrong one ------------------------


def _shortcut(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.stem(x))
    return m.last(m.body(y.relu()) + y.relu())


def _flax_shortcut(term: Callable[..., Any], behind: Callable[..., Any] = lambda x: x) -> Callable[..., Any]:
    def forward(m: Any, x: jax.Array) -> jax.Array:
        y = m.norm(m.stem(x))
        return m.last(behind(m.body(jax.nn.relu(y)) + term(y)))

    return forward


def _activated(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.stem(x))
    return m.last(F.relu(m.body(y.relu()) + y))


def _started(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.stem(x)
    z = m.norm(y).relu()
    return m.body(z) + m.last(z)


def _flax_started(start: Callable[..., Any]) -> Callable[..., Any]:
    def forward(m: Any, x: jax.Array) -> jax.Array:
        y = m.stem(x)
        z = jax.nn.relu(m.norm(y))
        return m.body(z) + m.last(start(y, z))

    return forward


def _gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.stem(x)).relu()
    return m.last(y * m.gate(y.mean((2, 3))).sigmoid()[:, :, None, None])


def _flax_gate(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(m: Any, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(m.norm(m.stem(x)))
        return m.last(y * function(m.gate(y.mean((1, 2))))[:, None, None])

    return forward


def _pool(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(m.norm(m.stem(x)).relu().mean((2, 3)))


def _flax_pool(pool: Callable[..., Any]) -> Callable[..., Any]:
    return lambda m, x: m.head(pool(jax.nn.relu(m.norm(m.stem(x)))))


def _option_a(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.stem(x)).relu()
    return m.end(F.relu(m.wide(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))))


def _flax_option_a(pads: tuple[int, int], mean: bool = False) -> Callable[..., Any]:
    def forward(m: Any, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(m.norm(m.stem(x)))
        less = ln.avg_pool(y, (2, 2), (2, 2)) if mean else y[:, ::2, ::2]
        return m.end(jax.nn.relu(m.wide(y) + jnp.pad(less, ((0, 0), (0, 0), (0, 0), pads))))

    return forward


def _halves(m: Any, x: torch.Tensor) -> torch.Tensor:
    one, other = m.norm(m.stem(x)).chunk(2, 1)
    return m.last(torch.cat([one, m.part(other)], 1))


def _flax_halves(taken: int, order: tuple[int, int] = (0, 1)) -> Callable[..., Any]:
    def forward(m: Any, x: jax.Array) -> jax.Array:
        parts = jnp.split(m.norm(m.stem(x)), 2, -1)
        both = [parts[1 - taken], m.part(parts[taken])]
        return m.last(jnp.concatenate([both[place] for place in order], -1))

    return forward


def _scaled(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.stem(x))
    return m.last(m.body(y) + 3 * y)


def _flax_scaled(factor: float) -> Callable[..., Any]:
    def forward(m: Any, x: jax.Array) -> jax.Array:
        y = m.norm(m.stem(x))
        return m.last(m.body(y) + factor * y)

    return forward


def _leaky(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.last(F.leaky_relu(m.norm(m.stem(x)), 0.3))


def _flax_leaky(slope: float) -> Callable[..., Any]:
    return lambda m, x: m.last(jax.nn.leaky_relu(m.norm(m.stem(x)), slope))


Case = tuple[Callable[..., Any], Callable[..., Any], str, str]
relu = jax.nn.relu
CASES: dict[str, Case] = {
    "shortcut": (_shortcut, _flax_shortcut(relu), "", ""),
    "shortcut in front of its activation": (
        _shortcut, _flax_shortcut(lambda y: y), "shortcut", "the input of 'body', Flax the output of 'norm'",
    ),
    "shortcut with another activation": (_shortcut, _flax_shortcut(jax.nn.silu), "shortcut", "Flax silu of"),
    "activated sum": (_activated, _flax_shortcut(lambda y: y, relu), "", ""),
    "no shortcut": (_activated, _flax_shortcut(lambda y: 0, relu), "residual", "Flax nothing"),
    "shortcut behind its activation": (_activated, _flax_shortcut(relu, relu), "shortcut", "Flax the input of"),
    "branch": (_started, _flax_started(lambda y, z: z), "", ""),
    "branch in front": (_started, _flax_started(lambda y, z: y), "shortcut", "Flax the input of 'norm'"),
    "branch of the activated": (_started, _flax_started(lambda y, z: relu(y)), "shortcut", "Flax relu of the"),
    "scaled": (_scaled, _flax_scaled(3), "", ""),
    "not scaled": (_scaled, _flax_scaled(1), "scale", "torch has 2 times the input of 'body' more than Flax"),
    "slope": (_leaky, _flax_leaky(0.3), "", ""),
    "another slope": (_leaky, _flax_leaky(0.25), "activation", "slope=0.3), Flax leaky_relu(negative_slope=0.25"),
    "gate": (_gate, _flax_gate(jax.nn.sigmoid), "", ""),
    "no sigmoid": (_gate, _flax_gate(lambda g: g), "gate", "by sigmoid of the output of 'gate' in torch"),
    "hard sigmoid": (_gate, _flax_gate(jax.nn.hard_sigmoid), "gate", "by hard_sigmoid"),
    "pool": (_pool, _flax_pool(lambda y: y.mean((1, 2))), "", ""),
    "max for mean": (_pool, _flax_pool(lambda y: y.max((1, 2))), "pooling", "the mean of the positions of relu of"),
    "first for mean": (_pool, _flax_pool(lambda y: y[:, 0, 0]), "pooling", "Flax the first"),
    "option A": (_option_a, _flax_option_a((4, 4)), "", ""),
    "option A behind": (_option_a, _flax_option_a((0, 8)), "shortcut", "8 channels of zeros behind"),
    "option A by means": (_option_a, _flax_option_a((4, 4), True), "shortcut", "the mean of every window"),
    "halves": (_halves, _flax_halves(1), "", ""),
    "halves exchanged": (_halves, _flax_halves(0), "channels", "channel 4 of the output of 'norm' in"),
    "order of a concatenation": (_halves, _flax_halves(1, (1, 0)), "channels", "same channels in another order"),
}  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("flavour", slow_but(["nnx"], ["nnx", "linen"]))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_formulas_that_differ_are_both_named(flavour: str, case: Case) -> None:
    ours, theirs, kind, says = case
    module = Net(ours).eval()
    nn.init.normal_(module.norm.weight)
    found = parity(module, _twin(flavour, module, theirs), torch.randn(4, 3, 8, 8), rules=RULES)
    assert found.ok is (not kind), str(found)
    if kind:
        assert found.cause is not None
        assert (found.cause.kind, found.cause.proved) == (kind, True), str(found)
        assert says in found.cause.message


def test_a_formula_that_is_none_of_these_is_not_named() -> None:
    module = Net(_shortcut).eval()
    for wrong in (lambda y: relu(y) ** 1.1, lambda y: relu(y) + 0.01 * y**2, lambda y: jnp.sin(y)):
        cause = parity(
            module, _twin("nnx", module, _flax_shortcut(wrong)), torch.randn(4, 3, 8, 8), rules=RULES
        ).cause
        assert cause is not None
        assert (cause.kind, cause.proved) == ("unknown", False)


# --- a pooling that Flax makes at every position -----------------------------------------------------------


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_a_pooling_whose_strides_were_left_out_is_named_though_shapes_differ(flavour: str, pool: str) -> None:
    ours, theirs = getattr(F, f"{pool}_pool2d"), getattr(ln, f"{pool}_pool")
    module = Net(lambda m, x: m.last(ours(m.norm(m.stem(x)).relu(), 2))).eval()
    for strides, kind in (((2, 2), ""), ((1, 1), "pooling")):

        def forward(m: Any, x: jax.Array, strides: Any = strides) -> jax.Array:
            return m.last(theirs(relu(m.norm(m.stem(x))), (2, 2), strides=strides))

        found = parity(module, _twin(flavour, module, forward), torch.randn(2, 3, 8, 8), rules=RULES)
        assert found.ok is (not kind), str(found)
        if kind:
            assert found.cause is not None
            assert (found.cause.kind, found.cause.proved) == (kind, True), str(found)
            assert "strides of 1, which is Flax's default" in found.cause.message
            assert found.cause.fix == "pool with strides=(2, 2)"


# --- sequences -------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.position = nn.Parameter(torch.randn(1, 7, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.position[:, : x.shape[1]]
        return self.head(self.norm(x)[:, 0])


class NnxTokens(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((1, 7, 8)))
        self.way = "right"

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        if self.way != "position":
            x = x + self.position[:, : x.shape[1]]
        x = self.norm(x)
        return self.head(x.mean(1) if self.way == "mean" else x[:, -1] if self.way == "last" else x[:, 0])


def test_a_table_of_positions_that_is_left_out_and_another_token_are_named() -> None:
    module = Tokens()
    for way, kind, says in (
        ("right", "", ""),
        ("position", "parameter", "torch adds its 'position', and Flax does not"),
        ("mean", "pooling", "torch takes the first of the positions of the output of 'norm', Flax the mean"),
        ("last", "pooling", "Flax the last"),
    ):
        twin = to_flax(module, nnx.eval_shape(NnxTokens))
        twin.way = way
        found = parity(module, twin, torch.randn(3, 5, 6))
        assert found.ok is (not kind), str(found)
        if kind:
            assert found.cause is not None
            assert (found.cause.kind, found.cause.proved) == (kind, True), str(found)
            assert says in found.cause.message


# --- an attention written by hand ------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, *, fused: bool, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal, self.fused = causal, fused
        for name, width in {"qkv": 24}.items() if fused else {"q": 8, "k": 8, "v": 8}.items():
            setattr(self, name, nn.Linear(8, width))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(n, length, 2, 4).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, length, 8))


class NnxAttention(nnx.Module):
    def __init__(self, *, fused: bool) -> None:
        rngs = nnx.Rngs(0)
        for name, width in {"qkv": 24}.items() if fused else {"q": 8, "k": 8, "v": 8}.items():
            setattr(self, name, nnx.Linear(8, width, rngs=rngs))
        self.out, self.way, self.fused = nnx.Linear(8, 8, rngs=rngs), "right", fused

    def __call__(self, x: jax.Array) -> jax.Array:
        n, length, _ = x.shape
        heads = 4 if self.way == "heads" else 2
        parts = jnp.split(self.qkv(x), 3, -1) if self.fused else [self.q(x), self.k(x), self.v(x)]
        if self.way == "each head":
            parts = [*jnp.moveaxis(self.qkv(x).reshape(n, length, 2, 3, 4), 3, 0)]
        if self.way == "order":
            parts = [parts[0], parts[2], parts[1]]
        q, k, v = (part.reshape(n, length, heads, -1).swapaxes(1, 2) for part in parts)
        scores = q @ k.swapaxes(-1, -2) * {"scale": 1, "dim": 8**-0.5}.get(self.way, q.shape[-1] ** -0.5)
        if self.way == "causal":
            scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        y = jax.nn.softmax(scores, -2 if self.way == "axis" else -1) @ v
        if self.way == "strange":
            y = y**2
        return self.out((y if self.way == "merge" else y.swapaxes(1, 2)).reshape(n, length, 8))


@pytest.mark.every(3)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("right", ""),
        ("order", "Flax takes as query, value, key what is query, key, value in torch"),
        ("scale", "torch multiplies the scores by head_dim ** -0.5, Flax by 1"),
        ("dim", "Flax by dim ** -0.5"),
        ("axis", "Flax over the queries"),
        ("heads", "torch has 2 heads, Flax 4"),
        ("causal", "Flax hides later positions"),
        ("merge", "Flax merges the heads without moving them back"),
        ("each head", "torch parts the features as q, k, v, Flax as heads first"),
    ],
)
def test_an_attention_by_hand_that_is_computed_otherwise_is_named(fused: bool, way: str, says: str) -> None:
    if way == "each head" and not fused:
        pytest.skip("there is nothing to part")
    module = Attention(fused=fused)
    for name, parameter in module.named_parameters():
        if "out" not in name:
            parameter.data.mul_(3)
    twin = to_flax(module, nnx.eval_shape(lambda: NnxAttention(fused=fused)))
    twin.way = way
    found = parity(module, twin, torch.randn(3, 5, 8))
    assert found.ok is (not says), str(found)
    if says:
        assert found.cause is not None
        assert (found.cause.kind, found.cause.proved) == ("attention", True), str(found)
        assert says in found.cause.message
        twin.way = "strange"
        cause = parity(module, twin, torch.randn(3, 5, 8)).cause
        assert cause is not None
        assert not cause.proved


def test_a_mask_that_an_attention_by_hand_lacks_is_named() -> None:
    module = Attention(fused=True, causal=True)
    twin = to_flax(module, nnx.eval_shape(lambda: NnxAttention(fused=True)))
    cause = parity(module, twin, torch.randn(3, 5, 8)).cause
    assert cause is not None
    assert (cause.kind, cause.proved) == ("attention", True)
    assert "torch hides later positions, and Flax does not" in cause.message
    twin.way = "causal"
    assert parity(module, twin, torch.randn(3, 5, 8)).ok
