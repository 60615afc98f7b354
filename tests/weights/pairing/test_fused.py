"""Layers that one side keeps as one: equal outputs in each order of their rows, equal bits back, no guess."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from torch import nn

from torchjax_bridge import audit, errors, parity, plan, to_flax, to_optax, to_state_dict
from torchjax_bridge.weights import Entry, Flatten, Fused, LayerType, Permute, Rename, Rule

WIDTH, HEADS = 8, 4


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of (batch, length, heads, head), with fewer heads of keys or not."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2).flatten(2)


class InputMajor(nn.Module):
    """A dense layer whose weight lies as Flax's kernel does."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class FusedInTorch(nn.Module):
    """One layer for queries, keys and values; ``order`` says how its rows are read."""

    def __init__(
        self, order: str, groups: int = HEADS, kind: Callable[[int, int], nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.order, self.groups, self.size = order, groups, WIDTH // HEADS
        self.qkv = kind(WIDTH, WIDTH + 2 * groups * self.size)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, key = self.qkv(x), self.groups * self.size
        if self.order == "blocks":
            q, k, v = (part.unflatten(-1, (-1, self.size)) for part in y.split([WIDTH, key, key], -1))
        else:
            turns = y.unflatten(-1, (self.groups, -1, self.size))  # (..., groups, rows of a group, head)
            q, k, v = turns.split([HEADS // self.groups, 1, 1], -2)
            q, k, v = q.flatten(-3, -2), k.flatten(-3, -2), v.flatten(-3, -2)
        return self.proj(_attend(q, k, v))


class Apart(nn.Module):
    """A layer for each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [f(x).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v)]
        return self.proj(_attend(*heads))


class FlaxApart(nnx.Module):
    """A layer for each, with fewer heads of keys and values or not; flat, with heads, or as einsums."""

    def __init__(self, kind: str, rngs: nnx.Rngs, groups: int = HEADS) -> None:
        size = WIDTH // HEADS
        for name, heads in (("query", HEADS), ("key", groups), ("value", groups)):
            layer: Any = {
                "flat": lambda heads=heads: nnx.Linear(WIDTH, heads * size, rngs=rngs),
                "heads": lambda heads=heads: nnx.LinearGeneral(WIDTH, (heads, size), rngs=rngs),
                "einsum": lambda heads=heads: nnx.Einsum(
                    "BTD,NDH->BTNH", (heads, WIDTH, size), (heads, size), rngs=rngs
                ),
            }[kind]()
            setattr(self, name, layer)
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        q, k, v = (f(x).reshape(*x.shape[:2], -1, WIDTH // HEADS) for f in (self.query, self.key, self.value))
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class FlaxFused(linen.Module):
    """One layer; ``order`` says how its outputs are read."""

    order: str

    @linen.compact
    def __call__(self, x: Any) -> Any:
        y = linen.Dense(3 * WIDTH, name="qkv")(x)
        if self.order == "blocks":
            q, k, v = jnp.moveaxis(y.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
        else:
            q, k, v = jnp.moveaxis(y.reshape(*x.shape[:2], HEADS, 3, -1), 3, 0)
        return linen.Dense(WIDTH, name="proj")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


def _same(module: nn.Module, run: Callable[[Any], Any], x: torch.Tensor) -> None:
    with jax.default_matmul_precision("highest"):
        got = torch.from_numpy(np.array(run(jnp.asarray(x.numpy()))))
    torch.testing.assert_close(got, module(x).detach(), atol=1e-5, rtol=1e-5)


def _bits_come_back(filled: Any, module: nn.Module, rules: Any, linear: str = "proj") -> None:
    state = module.state_dict()
    known = [*rules, LayerType(linear, nn.Linear)]  # what a bare state_dict does not say
    for template, given in ((module, rules), (state, known), (copy.deepcopy(module).to("meta"), rules)):
        back = to_state_dict(filled, template, rules=given)
        assert all(torch.equal(back[key], value) for key, value in state.items())


X = torch.randn(2, 5, WIDTH)
QKV = ("query", "key", "value")


@pytest.mark.every(3)
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", ["flat", "heads", "einsum"])
@pytest.mark.parametrize(("order", "groups"), [("blocks", 4), ("heads", 4), ("blocks", 2), ("heads", 2)])
def test_one_layer_in_torch_is_several_in_flax(order: str, groups: int, kind: str, bare: bool) -> None:
    module, template = FusedInTorch(order, groups), FlaxApart(kind, nnx.Rngs(0), groups)
    rules: list[Any] = [Fused("", "qkv", QKV, heads=groups if order == "heads" else None)]
    source = module.state_dict() if bare else module
    rules += [LayerType("proj", nn.Linear)] if bare else []
    twin = to_flax(source, template, rules=rules)
    _same(module, twin, X)
    _bits_come_back(twin, module, rules)


def test_the_wrong_order_computes_another_thing() -> None:
    module, template = FusedInTorch("blocks"), FlaxApart("heads", nnx.Rngs(0))
    twin = to_flax(module, template, rules=[Fused("", "qkv", QKV, heads=HEADS)])
    with pytest.raises(AssertionError):
        _same(module, twin, X)


@pytest.mark.parametrize("order", ["blocks", "heads"])
def test_several_layers_in_torch_are_one_in_flax(order: str) -> None:
    module, net = Apart(), FlaxFused(order)
    rules = [Fused("", ("q", "k", "v"), "qkv", heads=HEADS if order == "heads" else None)]
    variables = to_flax(module, net.init(jax.random.key(0), X.numpy()), rules=rules)
    _same(module, lambda x: net.apply(variables, x), X)
    assert audit(module, net, X.numpy(), rules=rules).ok
    _bits_come_back(variables, module, rules, "*")


@pytest.mark.parametrize("order", ["blocks", "heads"])
def test_columns_are_split_where_the_weight_lies_input_first(order: str) -> None:
    module, template = FusedInTorch(order, kind=InputMajor), FlaxApart("heads", nnx.Rngs(0))
    rules = [Fused("", "qkv", QKV, heads=HEADS if order == "heads" else None)]
    twin = to_flax(module, template, rules=rules)
    _same(module, twin, X)
    _bits_come_back(twin, module, rules)


def test_keys_and_values_alone_may_be_one_layer() -> None:
    class KeysAndValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_kv, self.to_out = (
                nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH),
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
            return self.to_out(_attend(q, k, v))

    module = KeysAndValues()
    template = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    rules = [
        Fused("", "to_kv", ("key", "value")),
        Rename("to_q", "query"),
        Rename("to_out", "out"),
    ]
    twin = to_flax(module, template, rules=rules)
    _same(module, twin, X)
    _bits_come_back(twin, module, rules, "to_q")


@pytest.mark.parametrize("one", [False, True])
def test_the_packed_weights_of_torchs_attention_fill_layers_of_other_names(one: bool) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    class Holder(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return FlaxFused("blocks", name="attn")(x)

    module, renamed = Packed(), Rename("attn.out_proj", "attn.proj")
    if one:
        net, rules = Holder(), [Fused("attn", "in_proj", "qkv"), renamed]
        variables = to_flax(module, net.init(jax.random.key(0), X.numpy()), rules=rules)
        _same(module, lambda x: net.apply(variables, x), X)
    else:
        template, rules = (
            nnx.Dict(attn=FlaxApart("heads", nnx.Rngs(0))),
            [Fused("attn", "in_proj", QKV), renamed],
        )
        with pytest.raises(errors.PlanError, match=r'Fused\("attn", "in_proj", <names>\)'):
            to_flax(nn.ModuleDict({"attn": module.attn}), nnx.Dict(attn=nnx.Dict(q=template.attn.query)))
        variables = to_flax(module, template, rules=rules)
        _same(module, variables.attn, X)
    _bits_come_back(variables, module, rules, "attn.out_proj")


def test_a_pattern_speaks_of_every_block_and_of_a_scan_over_them() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": FusedInTorch("heads")}) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block["attn"](x)
            return x

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attn = FlaxApart("heads", rngs)

        def __call__(self, x: Any) -> Any:
            return x + self.attn(x)

    module, rules = Blocks(), [Fused("blocks.*.attn", "qkv", QKV, heads=HEADS)]
    apart = to_flax(module, nnx.Dict(blocks=nnx.List([Block(nnx.Rngs(0)) for _ in range(3)])), rules=rules)
    with jax.default_matmul_precision("highest"):
        y = jnp.asarray(X.numpy())
        for block in apart.blocks:
            y = block(y)
    torch.testing.assert_close(torch.from_numpy(np.array(y)), module(X).detach(), atol=1e-5, rtol=1e-5)
    stacked = nnx.Dict(blocks=nnx.vmap(Block)(nnx.Rngs(0).split(3)))
    filled = to_flax(module, stacked, rules=rules)
    for place, block in enumerate(apart.blocks):
        assert np.array_equal(filled.blocks.attn.key.kernel[place], block.attn.key.kernel)
    _bits_come_back(filled, module, rules, "blocks.*.attn.proj")


def test_a_match_of_a_part_is_never_taken_for_that_of_another() -> None:
    # The parts are made for the matching alone; remembered by their ids, one of eight plans mixed them up.
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attn = FlaxApart("heads", rngs)

    layers = nn.ModuleList([nn.ModuleDict({"attn": FusedInTorch("heads")}) for _ in range(3)])
    module = nn.ModuleDict({"blocks": layers})
    template = nnx.Dict(blocks=nnx.vmap(Block)(nnx.Rngs(0).split(3)))
    rules = [Fused("blocks.*.attn", "qkv", QKV, heads=HEADS)]
    assert [plan(module, template, rules=rules).report.faults for _ in range(25)] == [()] * 25


# --- what is not said ----------------------------------------------------------------------------------------


def test_the_order_is_asked_for_and_no_line_with_a_guess_is_printed() -> None:
    fused = str(plan(FusedInTorch("blocks"), FlaxApart("heads", nnx.Rngs(0))).report)
    assert "'qkv' has as many rows in torch as 'query', 'key', 'value' have together in Flax" in fused
    assert 'Fused("", "qkv", (<first>, <second>, <third>))' in fused
    assert "heads=<number of heads>" in fused
    assert "unexpected" not in fused
    assert "missing" not in fused
    variables = FlaxFused("blocks").init(jax.random.key(0), X.numpy())
    apart = str(plan(Apart(), variables).report)
    assert "'qkv' has as many rows in Flax as 'q', 'k', 'v' have together in torch" in apart
    assert 'Fused("", (<first>, <second>, <third>), "qkv")' in apart


def test_one_line_asks_for_all_blocks() -> None:
    module = nn.ModuleDict({"blocks": nn.ModuleList([FusedInTorch("blocks") for _ in range(12)])})
    template = nnx.Dict(blocks=nnx.List([FlaxApart("heads", nnx.Rngs(0)) for _ in range(12)]))
    (line,) = str(plan(module, template).report).splitlines()
    assert 'rules=[Fused("blocks.*", "qkv", (<first>, <second>, <third>)), ...] matches all of them' in line


WRONG: list[tuple[Any, str]] = [
    (Fused("attn", "qkv", QKV), "Fused.*names no module of the torch side"),
    (Fused("", "qvk", QKV), "torch has no 'qvk' there; did you mean 'qkv'"),
    (Fused("", "qkv", ("query", "key", "valu")), "Flax has no 'valu' there; did you mean 'value'"),
    (Fused("", "qkv", ("query", "key")), "does not hold the rows of"),
    (Fused("", "qkv", QKV, heads=3), "do not divide into 3 heads"),
]


@pytest.mark.parametrize(("rule", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_rule_that_cannot_be_followed_is_one_fault(rule: Fused, words: str) -> None:
    with pytest.raises(errors.PlanError, match=words) as caught:
        to_flax(FusedInTorch("blocks"), FlaxApart("heads", nnx.Rngs(0)), rules=[rule])
    if "names no module" not in words:
        assert "1 fault\n" in str(caught.value)


def test_layers_that_do_not_go_together_are_refused() -> None:
    variables, rules = (
        FlaxFused("blocks").init(jax.random.key(0), X.numpy()),
        [Fused("", ("q", "k", "v"), "qkv")],
    )
    module = Apart()
    module.k = nn.Linear(WIDTH, WIDTH, bias=False)
    with pytest.raises(errors.PlanError, match=r"'q' \(Linear\) has a bias and 'k' \(Linear\) has none"):
        to_flax(module, variables, rules=rules)
    module.k = nn.Conv1d(WIDTH, WIDTH, 1)
    with pytest.raises(errors.PlanError, match="'k' is no dense layer"):
        to_flax(module, variables, rules=rules)
    module.k = InputMajor(WIDTH, WIDTH)
    with pytest.raises(errors.PlanError, match=r'LayerType\("k", nn\.Linear\)'):
        to_flax(module, variables, rules=rules)
    with pytest.raises(errors.PlanError, match="is not known to be a Linear"):
        to_flax(Apart().state_dict(), variables, rules=rules)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fused("a", "qkv", ("q",)),
        lambda: Fused("a", ("q", "k"), ("a", "b")),
        lambda: Fused("a", "qkv", ("q", "q")),
        lambda: Fused("a", "qkv", ("q", 3)),  # type: ignore[arg-type]
        lambda: Fused("a", "", ("q", "k")),
        lambda: Fused("a", "qkv", "qkv", heads=2),
        lambda: Fused("a", "qkv", ("q", "k"), heads=0),
        lambda: Fused("a", "qkv", ("q", "k"), heads=True),
        lambda: Fused(3, "qkv", ("q", "k")),  # type: ignore[arg-type]
    ],
)
def test_a_rule_of_the_wrong_parts_is_refused_where_it_is_written(make: Callable[[], Any]) -> None:
    with pytest.raises(errors.PlanError, match="Fused"):
        make()


# --- with other rules, optimizers and parity ---------------------------------------------------------------


def test_a_kernel_with_an_axis_for_the_three_is_filled_once_its_order_is_said() -> None:
    module = FusedInTorch("blocks")
    template = nnx.Dict(
        qkv=nnx.LinearGeneral(WIDTH, (3, HEADS, WIDTH // HEADS), rngs=nnx.Rngs(0)),
        proj=nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)),
    )
    for rule in (Fused("", "qkv", "qkv"), Flatten("qkv", None, output=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            filled = to_flax(module, template, rules=[rule])
        kernel = np.array(filled.qkv.kernel[...])
        rows = module.qkv.weight.detach().T.reshape(WIDTH, 3, HEADS, -1)
        assert np.array_equal(kernel, rows)


def test_a_flattened_input_of_fused_layers_is_laid_out_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ab = nn.Linear(12, 10)

    template = nnx.Dict(a=nnx.Linear(12, 4, rngs=nnx.Rngs(0)), b=nnx.Linear(12, 6, rngs=nnx.Rngs(0)))
    module, image = Net(), torch.randn(3, 3, 2, 2)
    twin = to_flax(module, template, rules=[Fused("", "ab", ("a", "b")), Flatten("ab", (3, 2, 2))])
    last = jnp.asarray(image.permute(0, 2, 3, 1).reshape(3, 12).numpy())
    got = np.concatenate([twin.a(last), twin.b(last)], -1)
    np.testing.assert_allclose(got, module.ab(image.flatten(1)).detach(), atol=1e-5)


def test_the_optimizers_moments_are_split_as_the_weights_are() -> None:
    module, rules = FusedInTorch("heads"), [Fused("", "qkv", QKV, heads=HEADS)]
    twin = to_flax(module, FlaxApart("heads", nnx.Rngs(0)), rules=rules)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(X).square().sum().backward()
    optimizer.step()
    tx = optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init(nnx.state(twin, nnx.Param))
    state = to_optax(optimizer, opt_state, module=module, template=twin, rules=rules)
    weights = to_flax(
        {name: optimizer.state[value]["momentum_buffer"] for name, value in module.named_parameters()},
        FlaxApart("heads", nnx.Rngs(0)),
        rules=[*rules, LayerType("proj", nn.Linear)],
    )
    traces = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "ndim", 0) == 3]
    wanted = [layer.kernel[...] for layer in (weights.key, weights.query, weights.value)]
    assert all(any(np.array_equal(one, trace) for trace in traces) for one in wanted)


def test_a_rule_of_ones_own_says_how_the_rest_of_the_module_lies() -> None:
    class Scaled(FusedInTorch):
        def __init__(self) -> None:
            super().__init__("blocks")
            self.gain = nn.Parameter(torch.rand(WIDTH))

    template = FlaxApart("heads", nnx.Rngs(0))
    template.scale = nnx.Param(jnp.zeros(WIDTH))
    dense = [Entry("proj.weight", "proj.kernel", Permute((1, 0))), Entry("proj.bias", "proj.bias")]
    rules = [Fused("", "qkv", QKV), Rule(Scaled, [Entry("gain", "scale"), *dense])]
    module = Scaled()
    twin = to_flax(module, template, rules=rules)
    assert np.array_equal(twin.scale[...], module.gain.detach())
    _same(module, twin, X)


@pytest.mark.parametrize("order", ["blocks", "heads"])
def test_parity_compares_what_both_sides_compute(order: str) -> None:
    heads = HEADS if order == "heads" else None
    for module, template, rules in (
        (FusedInTorch(order), FlaxApart("heads", nnx.Rngs(0)), [Fused("", "qkv", QKV, heads)]),
        (Apart(), FlaxFused(order), [Fused("", ("q", "k", "v"), "qkv", heads)]),
    ):
        if isinstance(template, nnx.Module):
            twin: Any = to_flax(module, template, rules=rules)
        else:
            start = template.init(jax.random.key(0), X.numpy())
            twin = template, to_flax(module, start, rules=rules)
        found = parity(module, twin, X, rules=rules)
        assert found.ok
        assert not found.notes
