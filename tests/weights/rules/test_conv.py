"""Convolutions and transposed convolutions, with every setting that moves a number."""

from typing import Any

import flax.linen as ln
import jax.numpy as jnp
import pytest
from flax import nnx
from torch import nn

from tests.weights.twins import Flax, assert_returns, assert_twins, draw, randomise, template
from torchjax_bridge import errors, to_flax
from torchjax_bridge.weights import Entry, Flip, LayerType, PairingWarning, Permute, Rule, plan, then

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SPACE = ((9,), (9, 8), (5, 6, 5))


def settings(conv: Any) -> dict[str, Any]:
    """What a Flax convolution needs to compute what this torch convolution does."""
    padding: Any = conv.padding.upper() if isinstance(conv.padding, str) else [(p, p) for p in conv.padding]
    if conv.padding_mode != "zeros":
        padding = {"circular": "CIRCULAR", "reflect": "REFLECT"}[conv.padding_mode]
    return {
        "kernel_size": conv.kernel_size,
        "strides": conv.stride,
        "padding": padding,
        "kernel_dilation": conv.dilation,
        "feature_group_count": conv.groups,
        "use_bias": conv.bias is not None,
    }


def convolution(flavour: str, conv: Any, **changes: Any) -> Flax:
    made = settings(conv) | changes
    if flavour == "linen":
        return ln.Conv(conv.out_channels, **made)
    return lambda rngs: nnx.Conv(conv.in_channels, conv.out_channels, rngs=rngs, **made)


both = pytest.mark.parametrize("flavour", ["linen", "nnx"])


@pytest.mark.every(3)
@both
@pytest.mark.parametrize(
    ("rank", "made"),
    [
        (1, {"kernel_size": 3, "padding": 1}),
        (1, {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2, "bias": False}),
        (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (2, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
        (2, {"kernel_size": 3, "groups": 2, "padding": 1}),
        (2, {"kernel_size": 3, "groups": 4}),
        (2, {"kernel_size": (4, 3), "padding": "same", "dilation": 2}),
        (2, {"kernel_size": 3, "padding": "valid"}),
        (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
        (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
        (3, {"kernel_size": 3, "padding": 1}),
        (3, {"kernel_size": (2, 3, 1), "stride": 2, "groups": 2, "padding": (0, 1, 0)}),
    ],
)
def test_a_convolution_computes_the_same(flavour: str, rank: int, made: dict[str, Any]) -> None:
    conv = CONV[rank - 1](4, 8, **made)
    assert_twins(conv, convolution(flavour, conv), draw(2, 4, *SPACE[rank - 1]), within=3e-6)


class Padded(ln.Module):
    """A convolution over an input padded by hand, which is every ``padding_mode`` of torch."""

    conv: ln.Conv
    mode: str

    def __call__(self, x):
        return self.conv(jnp.pad(x, ((0, 0), (2, 2), (1, 1), (0, 0)), mode=self.mode))


@pytest.mark.parametrize(
    ("mode", "pad"), [("circular", "wrap"), ("reflect", "reflect"), ("replicate", "edge")]
)
def test_a_padding_mode_that_changes_the_size_is_a_pad_before_the_convolution(mode: str, pad: str) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode=mode, stride=2)
    twin = ln.Conv(8, (3, 3), strides=(2, 2), padding="VALID")
    holder = nn.ModuleDict({"conv": conv})
    assert_twins(holder, Padded(twin, pad), draw(2, 4, 9, 8), within=3e-6, call=conv)


def test_same_padding_of_a_strided_convolution_is_another_layer() -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    with pytest.raises(AssertionError):
        assert_twins(conv, convolution("linen", conv, padding="SAME"), draw(2, 4, 8, 8), within=1e-1)


def test_a_bare_square_kernel_is_taken_for_a_convolution_and_the_plan_says_so() -> None:
    class Named(ln.Module):
        def setup(self) -> None:
            self.conv = ln.Conv(4, (3, 3))

        def __call__(self, x):
            return self.conv(x)

    module = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)})
    empty = template(Named(), jnp.ones((1, 5, 5, 4)))
    assert plan(module.state_dict(), empty).assumed == (
        "'conv': taken for a convolution, and could be a transposed one",
    )
    with pytest.warns(PairingWarning, match="LayerType"):
        to_flax(module.state_dict(), empty)
    assert not plan(module.state_dict(), empty, rules=[LayerType("conv", nn.Conv2d)]).assumed
    assert not plan(module, empty).assumed


# --- transposed ----------------------------------------------------------------------------------------


def padding(conv: Any) -> list[tuple[int, int]]:
    """The padding of a transposed convolution, as Flax wants it."""
    return [
        (d * (k - 1) - p, d * (k - 1) - p + more)
        for k, p, d, more in zip(
            conv.kernel_size, conv.padding, conv.dilation, conv.output_padding, strict=True
        )
    ]


def transposed(flavour: str, conv: Any, swapped: bool) -> Flax:
    made: dict[str, Any] = {
        "kernel_size": conv.kernel_size,
        "strides": conv.stride,
        "padding": padding(conv),
        "kernel_dilation": conv.dilation,
        "use_bias": conv.bias is not None,
        "transpose_kernel": swapped,
    }
    if flavour == "linen":
        return ln.ConvTranspose(conv.out_channels, **made)
    return lambda rngs: nnx.ConvTranspose(conv.in_channels, conv.out_channels, rngs=rngs, **made)


def dilated(flavour: str, conv: Any) -> Flax:
    """The same as a convolution over an input with zeros between its elements."""
    return convolution(flavour, conv, strides=1, input_dilation=conv.stride, padding=padding(conv))


@pytest.mark.every(3)
@both
@pytest.mark.parametrize("swapped", [True, False], ids=["transpose_kernel", "plain"])
@pytest.mark.parametrize(
    ("rank", "made"),
    [
        (1, {"kernel_size": 4, "stride": 2, "padding": 1, "output_padding": 1}),
        (2, {"kernel_size": 3}),
        (2, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}),
        (2, {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2, "bias": False}),
        (2, {"kernel_size": 2, "stride": 4}),
        (3, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    ],
)
def test_a_transposed_convolution_computes_the_same(
    flavour: str, swapped: bool, rank: int, made: dict[str, Any]
) -> None:
    conv = TRANSPOSED[rank - 1](4, 6, **made)
    x = draw(2, 4, *(size - 4 for size in SPACE[rank - 1]))
    assert_twins(conv, transposed(flavour, conv, swapped), x, within=3e-6)


@pytest.mark.every(3)
@both
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "made",
    [
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)},
        {"kernel_size": 3, "dilation": 2, "padding": 1},
    ],
    ids=["stride", "dilation"],
)
def test_a_transposed_convolution_with_groups_is_a_convolution_over_a_dilated_input(
    flavour: str, groups: int, made: dict[str, Any]
) -> None:
    conv = nn.ConvTranspose2d(4, 8, groups=groups, **made)
    assert_twins(conv, dilated(flavour, conv), draw(2, 4, 5, 4), within=3e-6, bare=False)


def test_groups_of_a_transposed_convolution_are_refused_in_flax_s_own_one() -> None:
    conv = nn.ConvTranspose2d(4, 8, 3, groups=2)
    twin = template(lambda rngs: nnx.ConvTranspose(4, 8, (3, 3), rngs=rngs))
    with pytest.raises(errors.PlanError, match=r"has no groups. Use Conv\(strides=1, input_dilation=stride"):
        to_flax(conv, twin)


@pytest.mark.parametrize("swapped", [True, False])
def test_nnx_says_itself_whether_a_square_kernel_is_swapped(swapped: bool) -> None:
    conv = nn.ConvTranspose2d(4, 4, 3)
    assert_twins(conv, transposed("nnx", conv, swapped), draw(2, 4, 5, 4), within=3e-6)


@pytest.mark.parametrize("swapped", [True, False])
def test_a_square_kernel_of_linen_is_refused_until_a_rule_says_whether_it_is_swapped(swapped: bool) -> None:
    conv = randomise(nn.ConvTranspose2d(4, 4, 3))
    flax = transposed("linen", conv, swapped)
    with pytest.raises(errors.PlanError) as caught:
        to_flax(conv, template(flax, jnp.ones((1, 5, 5, 4))))
    layouts = {
        True: (Permute((2, 3, 1, 0)), "Permute((2, 3, 1, 0))"),
        False: (then(Flip((2, 3)), Permute((2, 3, 0, 1))), "then(Flip((2, 3)), Permute((2, 3, 0, 1)))"),
    }
    layout, text = layouts[swapped]
    assert text in str(caught.value)
    entries = [Entry("weight", "kernel", layout), Entry("bias", "bias", optional=True)]
    rules = [Rule(nn.ConvTranspose2d, entries)]
    assert_twins(conv, flax, draw(2, 4, 5, 4), within=3e-6, bare=False, rules=rules)


def test_a_view_of_a_convolution_is_shared_and_a_turned_kernel_is_not() -> None:
    conv = randomise(nn.Conv2d(16, 4, 3))
    filled = to_flax(conv, template(convolution("linen", conv), jnp.ones((1, 5, 5, 16))), copy=False)
    assert filled["params"]["kernel"].unsafe_buffer_pointer() == conv.weight.data_ptr()
    assert_returns(conv, filled)
    turned = nn.ConvTranspose2d(4, 6, 3)
    with pytest.raises(errors.ShareError, match="its layout needs a copy"):
        to_flax(turned, template(transposed("linen", turned, False), jnp.ones((1, 5, 5, 4))), copy=False)


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3, groups=2)])
def test_kernels_of_one_shape_and_other_groups_are_refused(conv: nn.Module) -> None:
    template = nnx.eval_shape(lambda: nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(errors.PlanError, match="groups=2 in torch, feature_group_count=1 in Flax"):
        to_flax(conv, template)


# --- a dense layer at every position ---------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("flavour", ["linen", "nnx"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_with_a_kernel_of_1_fills_a_dense_layer(flavour: str, rank: int, bias: bool) -> None:
    def dense(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(4, 6, use_bias=bias, rngs=rngs)

    twin = ln.Dense(6, use_bias=bias) if flavour == "linen" else dense
    assert not plan(CONV[rank - 1](4, 4, 1), nnx.Linear(4, 4, rngs=nnx.Rngs(0))).assumed
    assert plan(CONV[rank - 1](4, 4, 1).state_dict(), nnx.Linear(4, 4, rngs=nnx.Rngs(0))).assumed
    assert_twins(CONV[rank - 1](4, 6, 1, bias=bias), twin, draw(2, 4, *SPACE[rank - 1]), within=1e-6)


@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}])
def test_a_convolution_that_reads_its_neighbours_or_skips_some_fills_no_dense_layer(change: Any) -> None:
    module = nn.Conv2d(**({"in_channels": 4, "out_channels": 4, "kernel_size": 1} | change))
    with pytest.raises(errors.PlanError, match="only where that has a kernel of 1, stride 1, no padding"):
        to_flax(module, nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
