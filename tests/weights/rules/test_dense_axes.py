"""Dense layers with several axes: heads, einsums, convolutions. Equal outputs, equal bits back."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from torchjax_bridge import audit, errors, plan, to_flax, to_state_dict
from torchjax_bridge.weights import Flatten, LayerType, PairingWarning, SettingsWarning

# What a torch Linear computes, with its input and its output in the shape that the Flax layer has.
Case = tuple[
    int, int, Callable[[nnx.Rngs], Any], Callable[..., linen.Module] | None, tuple[int, ...], tuple[int, ...]
]

CASES: dict[str, Case] = {
    "heads": (
        6,
        8,
        lambda rngs: nnx.LinearGeneral(6, (2, 4), rngs=rngs),
        lambda name: linen.DenseGeneral((2, 4), name=name),
        (6,),
        (2, 4),
    ),
    "heads, as many as inputs": (
        8,
        8,
        lambda rngs: nnx.LinearGeneral(8, (2, 4), rngs=rngs),
        lambda name: linen.DenseGeneral((2, 4), name=name),
        (8,),
        (2, 4),
    ),
    "heads without a bias": (
        8,
        8,
        lambda rngs: nnx.LinearGeneral(8, (4, 2), use_bias=False, rngs=rngs),
        lambda name: linen.DenseGeneral((4, 2), use_bias=False, name=name),
        (8,),
        (4, 2),
    ),
    "heads joined": (
        8,
        6,
        lambda rngs: nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs),
        lambda name: linen.DenseGeneral(6, axis=(-2, -1), name=name),
        (2, 4),
        (6,),
    ),
    "heads joined, as many as outputs": (
        8,
        8,
        lambda rngs: nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs),
        lambda name: linen.DenseGeneral(8, axis=(-2, -1), name=name),
        (2, 4),
        (8,),
    ),
    "heads to heads": (
        8,
        12,
        lambda rngs: nnx.LinearGeneral((2, 4), (3, 4), axis=(-2, -1), rngs=rngs),
        lambda name: linen.DenseGeneral((3, 4), axis=(-2, -1), name=name),
        (2, 4),
        (3, 4),
    ),
    "one head": (
        8,
        8,
        lambda rngs: nnx.LinearGeneral(8, (1, 8), rngs=rngs),
        lambda name: linen.DenseGeneral((1, 8), name=name),
        (8,),
        (1, 8),
    ),
    "einsum": (
        6,
        8,
        lambda rngs: nnx.Einsum("BTD,DNH->BTNH", (6, 2, 4), (2, 4), rngs=rngs),
        None,
        (6,),
        (2, 4),
    ),
    "einsum, heads first": (
        8,
        8,
        lambda rngs: nnx.Einsum("BTD,NDH->BTNH", (2, 8, 4), (2, 4), rngs=rngs),
        None,
        (8,),
        (2, 4),
    ),
    "einsum, outputs first": (
        8,
        8,
        lambda rngs: nnx.Einsum("...D,NHD->...NH", (2, 4, 8), (2, 4), rngs=rngs),
        None,
        (8,),
        (2, 4),
    ),
    "einsum, a bias of its own shape": (
        6,
        8,
        lambda rngs: nnx.Einsum("BTD,DNH->BTNH", (6, 2, 4), (8,), rngs=rngs),
        None,
        (6,),
        (2, 4),
    ),
    "einsum that joins heads": (
        8,
        8,
        lambda rngs: nnx.Einsum("BTNH,NHD->BTD", (2, 4, 8), (8,), rngs=rngs),
        None,
        (2, 4),
        (8,),
    ),
    "einsum that joins heads, outputs in the middle": (
        8,
        8,
        lambda rngs: nnx.Einsum("BTNH,NDH->BTD", (2, 8, 4), (8,), rngs=rngs),
        None,
        (2, 4),
        (8,),
    ),
    "einsum that joins heads, turned": (
        8,
        8,
        lambda rngs: nnx.Einsum("BTNH,HND->BTD", (4, 2, 8), (8,), rngs=rngs),
        None,
        (2, 4),
        (8,),
    ),
    "1x1 convolution": (
        6,
        8,
        lambda rngs: nnx.Conv(6, 8, (1, 1), rngs=rngs),
        lambda name: linen.Conv(8, (1, 1), name=name),
        (6,),
        (8,),
    ),
}


def _run(twin: Any, x: torch.Tensor) -> torch.Tensor:
    with jax.default_matmul_precision("highest"):
        return torch.from_numpy(np.array(twin(jnp.asarray(x.numpy()))))


@pytest.mark.every(3)
@pytest.mark.parametrize("name", CASES)
def test_a_dense_layer_of_several_axes_computes_what_torchs_does(name: str) -> None:
    width, out, make, _, given, wanted = CASES[name]
    template = make(nnx.Rngs(0))
    module = nn.Linear(width, out, bias=template.bias is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = to_flax(module, template)
        from_state = to_flax(module, nnx.state(template)) if "einsum" not in name else None
    x = torch.randn(2, 3, width)
    want = module(x).detach().reshape(2, 3, *wanted)
    torch.testing.assert_close(_run(twin, x.reshape(2, 3, *given)), want, atol=1e-5, rtol=1e-5)
    back = to_state_dict(twin, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    if from_state is not None:
        assert jax.tree.all(jax.tree.map(jnp.array_equal, from_state, nnx.state(twin)))
    assert audit(module, twin).ok


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
@pytest.mark.parametrize("named", [False, True])
def test_the_same_in_linen(name: str, named: bool) -> None:
    width, out, _, layer, given, wanted = CASES[name]
    assert layer is not None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return layer("fc" if named else None)(x)

    class TorchNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(width, out, bias=layer(None).use_bias)

    module, net, x = TorchNet(), Net(), torch.randn(2, 3, width)
    flax_x = jnp.asarray(x.reshape(2, 3, *given).numpy())
    variables = to_flax(module, net.init(jax.random.key(0), flax_x))
    want = module.fc(x).detach().reshape(2, 3, *wanted)
    got = _run(lambda x: net.apply(variables, x), x.reshape(2, 3, *given))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    back = to_state_dict(variables, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    assert audit(module, net, flax_x).ok


def test_the_einsum_of_linen_is_read_by_its_shapes_where_these_decide() -> None:
    class Net(linen.Module):
        shape: tuple[int, ...]
        equation: str
        use_bias: bool = True

        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Einsum(self.shape, self.equation, self.use_bias)(x)

    module, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(2, 3, 6)
    for shape, equation in [
        ((6, 2, 4), "BTD,DNH->BTNH"),
        ((2, 6, 4), "BTD,NDH->BTNH"),
        ((2, 4, 6), "BTD,NHD->BTNH"),
    ]:
        net = Net(shape, equation)
        variables = to_flax(module, net.init(jax.random.key(0), x.numpy()))
        got = _run(lambda x, net=net, variables=variables: net.apply(variables, x), x)
        torch.testing.assert_close(got, module(x).detach().reshape(2, 3, 2, 4), atol=1e-5, rtol=1e-5)
        assert audit(module, net, x.numpy()).ok
    square, x = nn.Sequential(nn.Linear(8, 8, bias=False)), torch.randn(2, 3, 8)
    net_x, turned = x.numpy(), Net((2, 4, 8), "BTD,NHD->BTNH", use_bias=False)
    with pytest.warns(PairingWarning, match="taken to be summed over the first axes"):
        to_flax(square, turned.init(jax.random.key(0), net_x))
    with pytest.warns(PairingWarning):
        (fault,) = audit(square, turned, net_x).faults
    assert fault.setting == "einsum_str"
    assert "sums over axes 0, 1" in fault.fix


REFUSED: list[tuple[Any, str]] = [
    (lambda rngs: nnx.Einsum("BTD,DNH->BTDNH", (8, 2, 4), (2, 4), rngs=rngs), "not that of a dense layer"),
    (lambda rngs: nnx.Einsum("BTD,BDH->BTH", (8, 8), (8,), rngs=rngs), "not that of a dense layer"),
    (lambda rngs: nnx.LinearGeneral(8, (3, 2), rngs=rngs), "does not divide into a kernel"),
    (
        lambda rngs: nnx.LinearGeneral((4, 2), 8, axis=(-1, -2), rngs=rngs),
        "another order than torch flattens",
    ),
    (lambda rngs: nnx.LinearGeneral(8, 8, batch_axis={0: 1}, rngs=rngs), "batch axes"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_no_dense_layer_is_refused(make: Any, words: str) -> None:
    with pytest.raises(errors.PlanError, match=words):
        to_flax(nn.Linear(8, 8), make(nnx.Rngs(0)))


def test_linens_axes_in_another_order_are_a_difference_of_settings() -> None:
    module, x = nn.Linear(8, 6), jnp.zeros((1, 2, 4))
    (fault,) = audit(module, linen.DenseGeneral(6, axis=(-1, -2)), jnp.zeros((1, 4, 2))).faults
    assert (fault.setting, fault.wanted, fault.effect) == ("axis", (-2, -1), "output")
    assert audit(module, linen.DenseGeneral(6, axis=(-2, -1)), x).ok


# --- a convolution over the whole map, or over patches -----------------------------------------------------


@pytest.mark.parametrize("flavour", ["nnx", "linen", "linen, named"])
def test_a_linear_behind_a_flatten_fills_a_convolution_over_the_whole_map(flavour: str) -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Conv(7, (4, 5), padding="VALID", name="fc" if "named" in flavour else None)(x)

    class TorchNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(60, 7)

    module, net = TorchNet(), Net()
    template = (
        nnx.Dict(fc=nnx.Conv(3, 7, (4, 5), padding="VALID", rngs=nnx.Rngs(0)))
        if flavour == "nnx"
        else net.init(jax.random.key(0), jnp.zeros((1, 4, 5, 3)))
    )
    with pytest.raises(errors.PlanError) as caught:
        to_flax(module, template)
    assert 'rules=[Flatten("fc", (3, 4, 5))]' in str(caught.value)
    image = torch.randn(2, 3, 4, 5)
    for rules, flat in (
        ([Flatten("fc", (3, 4, 5))], image.flatten(1)),
        ([Flatten("fc", None)], image.permute(0, 2, 3, 1).flatten(1)),
    ):
        twin = to_flax(module, template, rules=rules)
        run = (lambda x, t=twin: t.fc(x)) if flavour == "nnx" else (lambda x, t=twin: net.apply(t, x))
        got = _run(run, image.permute(0, 2, 3, 1).contiguous())
        torch.testing.assert_close(got[:, 0, 0], module.fc(flat).detach(), atol=1e-5, rtol=1e-5)
        back = to_state_dict(twin, module, rules=rules)
        assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    with pytest.raises(errors.PlanError, match=r"reads a map \(3, 4, 5\)"):
        to_flax(module, template, rules=[Flatten("fc", (5, 4, 3))])


def test_a_convolution_that_is_no_dense_layer_is_a_difference_of_settings() -> None:
    module = nn.Linear(6, 8)
    for settings, name in (
        ({"strides": 2}, "strides"),
        ({"padding": 1}, "padding"),
        ({"input_dilation": 2}, "input_dilation"),
    ):
        template = nnx.Conv(6, 8, (1, 1), rngs=nnx.Rngs(0), **settings)
        with pytest.warns(SettingsWarning, match=name):
            to_flax(module, template)
    whole, rules = nn.Linear(27, 8), [Flatten("", (3, 3, 3))]
    with pytest.warns(SettingsWarning, match="padding"):
        to_flax(whole, nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), rules=rules)
    patches = nnx.Conv(3, 8, (3, 3), strides=(3, 3), rngs=nnx.Rngs(0))  # as of a patch embedding
    assert audit(whole, to_flax(whole, patches, rules=rules), rules=rules).ok


# --- what shapes do not tell -----------------------------------------------------------------------------


def test_outputs_of_three_axes_are_warned_of_until_their_order_is_said() -> None:
    module, template = nn.Linear(8, 24), nnx.LinearGeneral(8, (3, 2, 4), rngs=nnx.Rngs(0))
    with pytest.warns(PairingWarning, match=r"order of Flax's axes \(3, 2, 4\)"):
        to_flax(module, template)
    twin = to_flax(module, template, rules=[Flatten("", None, output=True)])
    x = torch.randn(5, 8)
    torch.testing.assert_close(_run(twin, x), module(x).detach().reshape(5, 3, 2, 4), atol=1e-5, rtol=1e-5)


def _own(shape: Sequence[int]) -> Any:
    class Heads(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.zeros(shape))

    return Heads()


def test_a_square_kernel_of_heads_of_a_class_of_ones_own_is_warned_of() -> None:
    module = nn.Linear(8, 8, bias=False)
    with pytest.warns(PairingWarning, match="is square"):
        to_flax(module, _own((2, 4, 8)))
    heads_first = to_flax(nn.Linear(6, 8, bias=False), _own((2, 6, 4)))  # its shape says it
    assert heads_first.kernel.shape == (2, 6, 4)


def test_bare_weights_that_may_lie_input_first_are_asked_for() -> None:
    state = {"fc.weight": torch.randn(8, 8)}
    template = {"params": {"fc": {"kernel": jnp.zeros((8, 2, 4))}}}
    with pytest.raises(errors.PlanError, match="could be Linear or an input-major dense layer"):
        to_flax(state, template)
    kernel = to_flax(state, template, rules=[LayerType("fc", nn.Linear)])["params"]["fc"]["kernel"]
    assert np.array_equal(kernel.reshape(8, 8), state["fc.weight"].T)
    conv1d = {"fc.weight": torch.randn(6, 8), "fc.bias": torch.randn(8)}
    template = {"params": {"fc": {"kernel": jnp.zeros((6, 2, 4)), "bias": jnp.zeros((2, 4))}}}
    kernel = to_flax(conv1d, template)["params"]["fc"]["kernel"]
    assert np.array_equal(kernel.reshape(6, 8), conv1d["fc.weight"])


# --- a whole attention -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Separate projections, with as many heads of keys as ``groups``."""

    def __init__(
        self, width: int, heads: int, groups: int | None = None, names: str = "query key value out"
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups or heads, width // heads
        self.names = names.split()
        sizes = (width, self.groups * self.size, self.groups * self.size, width)
        for name, size in zip(self.names, sizes, strict=True):
            self.add_module(name, nn.Linear(width, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value, out = (getattr(self, name) for name in self.names)
        q = query(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.groups, self.size)).transpose(1, 2) for f in (key, value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups != self.heads)
        return out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_separate_projections_fill_flaxs_attention(flavour: str, bare: bool) -> None:
    module, x = Attention(8, 2), torch.randn(2, 5, 8)
    source = module.state_dict() if bare else module
    rules = [LayerType("*", nn.Linear)] if bare else []
    if flavour == "nnx":
        template = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        filled = to_flax(source, template, rules=rules)
        got = _run(filled, x)
    else:
        net = linen.MultiHeadDotProductAttention(2)
        filled = to_flax(source, net.init(jax.random.key(0), x.numpy()), rules=rules)
        got = _run(lambda x: net.apply(filled, x), x)
    torch.testing.assert_close(got, module(x).detach(), atol=1e-5, rtol=1e-5)
    back = to_state_dict(filled, source, rules=rules)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


class Grouped(nnx.Module):
    """Fewer heads of keys, as einsums."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.Einsum("BTD,DNH->BTNH", (8, 4, 2), (4, 2), rngs=rngs)
        self.key = nnx.Einsum("BTD,KDH->BTKH", (2, 8, 2), (2, 2), rngs=rngs)
        self.value = nnx.LinearGeneral(8, (2, 2), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (4, 2, 8), (8,), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(jax.nn.dot_product_attention(self.query(x), self.key(x), self.value(x)))


def test_fewer_heads_of_keys_fall_out_of_the_same_rules() -> None:
    module, x = Attention(8, 4, 2), torch.randn(2, 5, 8)
    twin = to_flax(module, Grouped(nnx.Rngs(0)))
    torch.testing.assert_close(_run(twin, x), module(x).detach(), atol=1e-5, rtol=1e-5)
    assert plan(module, twin).ok
    back = to_state_dict(twin, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
