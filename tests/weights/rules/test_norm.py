"""Normalisation layers: evaluation, training, running statistics, and the axes of norms over several."""

from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.weights.twins import (
    Flax,
    as_is,
    assert_returns,
    assert_twins,
    difference,
    draw,
    last,
    randomise,
    template,
)
from torchjax_bridge import errors, to_flax, to_state_dict
from torchjax_bridge.weights import Entry, Identity, Permute, Rule, layers, plan

both = pytest.mark.parametrize("flavour", ["linen", "nnx"])


def norm(flavour: str, kind: str, features: int, **settings: Any) -> Flax:
    made = {"use_fast_variance": False, "epsilon": 1e-5} | settings
    if flavour == "linen":
        return getattr(ln, kind)(**made)
    return lambda rngs: getattr(nnx, kind)(features, rngs=rngs, **made)


# --- BatchNorm -----------------------------------------------------------------------------------------


def batch_norm(flavour: str, train: bool, module: Any = None, **settings: Any) -> Flax:
    affine = {"use_scale": module.affine, "use_bias": module.affine} if module is not None else {}
    made = {"momentum": 0.9, "use_running_average": not train} | affine | settings
    return norm(flavour, "BatchNorm", 4, **made)


@pytest.mark.every(3)
@both
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (6, 4, 5)),
        (nn.BatchNorm2d(4), (6, 4, 3, 2)),
        (nn.BatchNorm3d(4), (3, 4, 2, 3, 2)),
        (nn.SyncBatchNorm(4), (6, 4, 3, 2)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 2)),
    ],
    ids=["1d", "1d over length", "2d", "3d", "sync", "not affine"],
)
def test_batch_norm_evaluates_the_same_and_its_counter_stays_in_torch(
    flavour: str, module: nn.Module, shape: tuple[int, ...]
) -> None:
    assert_twins(module, batch_norm(flavour, False, module), draw(*shape), within=1e-6)
    assert plan(module, template(batch_norm(flavour, False, module), last(draw(*shape)))).torch_only == (
        "num_batches_tracked",
    )


def train(flavour: str, flax: Any, filled: Any, x: np.ndarray) -> tuple[Any, Any, Any]:
    """One training step of statistics: the output, the running mean and the running variance."""
    if flavour == "linen":
        step = jax.jit(lambda variables, x: flax.apply(variables, x, mutable="batch_stats"))
        y, state = step(filled, x)
        return y, state["batch_stats"]["mean"], state["batch_stats"]["var"]
    y = nnx.jit(lambda filled, x: filled(x))(filled, x)
    return y, filled.mean[...], filled.var[...]


@both
def test_batch_norm_in_training_gives_torch_s_output_and_mean_and_the_biased_variance(flavour: str) -> None:
    module, x = randomise(nn.BatchNorm2d(4)).train(), draw(6, 4, 3, 2)
    before = module.running_var.clone()
    flax = batch_norm(flavour, True)
    filled = to_flax(module, template(flax, last(x)))
    y, mean, var = train(flavour, flax, filled, last(x))
    assert difference(y, last(module(x))) <= 2e-6
    assert difference(mean, module.running_mean) <= 1e-7
    count = 6 * 3 * 2
    biased = before * 0.9 + (module.running_var - before * 0.9) * (count - 1) / count
    assert difference(var, biased) <= 2e-7
    assert difference(var, module.running_var) > 1e-3


@both
def test_our_batch_norm_trains_as_torch_s_does(flavour: str) -> None:
    module = randomise(nn.BatchNorm2d(4)).train()
    made: dict[str, Any] = {"momentum": 0.9, "use_fast_variance": False, "use_running_average": False}
    flax: Any = (
        layers.linen.BatchNorm(**made)
        if flavour == "linen"
        else lambda rngs: layers.nnx.BatchNorm(4, rngs=rngs, **made)
    )
    filled = to_flax(module, template(flax, last(draw(6, 4, 3, 2))))
    for step in range(3):
        x = draw(6, 4, 3, 2, seed=step)
        y, mean, var = train(flavour, flax, filled, last(x))
        assert difference(y, last(module(x))) <= 2e-6
        assert difference(mean, module.running_mean) <= 2e-7
        assert difference(var, module.running_var) <= 4e-7
        if flavour == "linen":
            filled = filled | {"batch_stats": {"mean": mean, "var": var}}


def test_our_batch_norm_counts_only_what_the_mask_lets_through() -> None:
    x, mask = jnp.asarray([[0.0], [2.0], [9.0]]), jnp.asarray([[True], [True], [False]])
    layer = layers.nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    nnx.jit(lambda layer, x: layer(x, mask=mask))(layer, x)
    assert layer.var[...] == 1.5  # half of 1, and half of the unbiased variance of 0 and 2


def test_our_batch_norm_counts_over_a_mapped_axis() -> None:
    x = draw(4, 3, 2).numpy()
    layer = layers.linen.BatchNorm(momentum=0.5, use_running_average=False, axis_name="batch")
    whole = layers.linen.BatchNorm(momentum=0.5, use_running_average=False)
    ones, zeros = jnp.ones(2), jnp.zeros(2)
    variables = {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}

    def step(layer, part):
        return layer.apply(variables, part, mutable="batch_stats")[1]["batch_stats"]["var"]

    apart = jax.jit(jax.vmap(lambda part: step(layer, part), axis_name="batch"))(x)[0]
    together = jax.jit(lambda x: step(whole, x))(x.reshape(12, 2))
    assert difference(apart, together) <= 5e-7


def test_our_batch_norm_refuses_a_single_value_as_torch_does() -> None:
    x = jnp.ones((1, 4))
    linen = layers.linen.BatchNorm(use_running_average=False)
    variables = linen.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        nn.BatchNorm1d(4)(torch.ones(1, 4))
    with pytest.raises(ValueError, match="no unbiased variance"):
        linen.apply(variables, x, mutable="batch_stats")
    with pytest.raises(ValueError, match="no unbiased variance"):
        layers.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(x)


@both
def test_batch_norm_without_statistics_fills_those_that_flax_never_reads(flavour: str) -> None:
    module = nn.BatchNorm2d(4, track_running_stats=False)
    flax = batch_norm(flavour, True)
    randomise(module)
    x = draw(6, 4, 3, 2)
    empty = template(flax, last(x))
    filled = to_flax(module, empty)
    assert_returns(module, filled)
    y, _, _ = train(flavour, flax, filled, last(x))
    assert difference(y, last(module.eval()(x))) <= 2e-6
    assert any("use_running_average=False" in note for note in plan(module, empty).notes)
    trained = to_flax(module, empty)
    train(
        flavour, flax, trained, last(x)
    )  # nnx writes statistics; torch has no place for them, and none is needed
    assert_returns(module, trained)


@pytest.mark.gpu
def test_statistics_without_source_are_made_on_the_device_of_the_weights() -> None:
    module = nn.BatchNorm2d(4, track_running_stats=False).cuda()
    filled = to_flax(module, template(batch_norm("nnx", True)))
    assert {leaf.device.platform for leaf in jax.tree.leaves(nnx.state(filled))} == {"gpu"}


def test_a_cumulative_average_is_noted() -> None:
    module = nn.BatchNorm1d(4, momentum=None)
    assert_twins(module, batch_norm("nnx", False), draw(6, 4), within=1e-6)
    notes = plan(module, template(batch_norm("nnx", False))).notes
    assert any("momentum=None averages over all batches" in note for note in notes)


def test_an_affine_torch_layer_and_a_bare_flax_one_do_not_pass_for_twins() -> None:
    bare = batch_norm("nnx", False, use_scale=False, use_bias=False)
    report = plan(nn.BatchNorm2d(4), template(bare)).report
    assert {fault.subject for fault in report} == {"weight", "bias"}
    report = plan(nn.BatchNorm2d(4, affine=False), template(batch_norm("nnx", False))).report
    assert {fault.subject for fault in report} == {"scale", "bias"}


# --- LayerNorm and RMSNorm -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("made", "settings"),
    [
        ({}, {}),
        ({"bias": False}, {"use_bias": False}),
        ({"eps": 1e-3}, {"epsilon": 1e-3}),
    ],
)
def test_layer_norm_computes_the_same(flavour: str, made: dict[str, Any], settings: dict[str, Any]) -> None:
    module = nn.LayerNorm(6, **made)
    flax = norm(flavour, "LayerNorm", 6, **settings)
    assert_twins(module, flax, draw(3, 5, 6) * 3 + 1, within=1.5e-6, axes=as_is)


@both
def test_rms_norm_computes_the_same_on_inputs_as_small_as_its_epsilon(flavour: str) -> None:
    settings = {"epsilon": float(torch.finfo(torch.float32).eps)}
    if flavour == "linen":
        flax: Flax = ln.RMSNorm(**settings)
    else:
        flax = lambda rngs: nnx.RMSNorm(6, rngs=rngs, **settings)  # noqa: E731
    assert_twins(nn.RMSNorm(6), flax, draw(3, 5, 6) * 1e-3, within=5e-7, axes=as_is)


class Swapped(nnx.Module):
    """An nnx norm over several axes: its constructor makes a flat scale, so one of the right shape is put in."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
        self.norm = nnx.LayerNorm(
            1, reduction_axes=axes, feature_axes=axes, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )
        self.norm.scale = nnx.Param(jnp.ones(shape))
        self.norm.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x):
        return self.norm(x)


def over_axes(flavour: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Flax:
    if flavour == "linen":
        return norm("linen", "LayerNorm", 0, reduction_axes=axes, feature_axes=axes)
    return lambda rngs: Swapped(rngs, shape, axes).norm


@both
def test_layer_norm_over_several_axes_lies_as_the_template_s_shape_says(flavour: str) -> None:
    x = draw(2, 3, 4, 5)
    same = over_axes(flavour, (4, 5), (-2, -1))
    assert_twins(nn.LayerNorm((4, 5)), same, x, within=1.5e-6, axes=as_is)
    channels_last = over_axes(flavour, (4, 5, 3), (1, 2, 3))
    module = nn.LayerNorm((3, 4, 5))
    assert_twins(module, channels_last, x, within=1.5e-6)
    notes = plan(module, template(channels_last, last(x))).notes
    assert any("(3, 4, 5) becomes (4, 5, 3), channels last" in note for note in notes)


@both
@pytest.mark.parametrize("moved", [True, False])
def test_equal_axes_are_refused_until_a_rule_says_which_way_they_lie(flavour: str, moved: bool) -> None:
    x, module = draw(2, 3, 3, 3), nn.LayerNorm((3, 3, 3))
    flax = over_axes(flavour, (3, 3, 3), (1, 2, 3))
    with pytest.raises(errors.PlanError, match=r"Permute\(\(1, 2, 0\)\)"):
        to_flax(module, template(flax, last(x)))
    layout = Permute((1, 2, 0)) if moved else Identity()
    rules = [Rule(nn.LayerNorm, [Entry("weight", "scale", layout), Entry("bias", "bias", layout)])]
    assert_twins(module, flax, x, within=1.5e-6, axes=last if moved else as_is, rules=rules, bare=False)


def test_a_flat_scale_does_not_tell_the_order_of_the_axes() -> None:
    flat = template(lambda rngs: nnx.LayerNorm(20, feature_axes=(-2, -1), rngs=rngs))
    with pytest.raises(errors.PlanError, match=r"norm.scale = nnx.Param\(jnp.ones\(\(4, 5\)\)\)"):
        to_flax(nn.LayerNorm((4, 5)), flat)


# --- GroupNorm and InstanceNorm --------------------------------------------------------------------------


@both
def test_group_norm_computes_the_same(flavour: str) -> None:
    flax = norm(flavour, "GroupNorm", 6, num_groups=3)
    assert_twins(nn.GroupNorm(3, 6), flax, draw(2, 6, 4, 3) * 2 + 1, within=1.5e-6)


@both
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.InstanceNorm1d, (2, 4, 9)), (nn.InstanceNorm2d, (2, 4, 5, 3)), (nn.InstanceNorm3d, (2, 4, 3, 2, 3))],
)
def test_instance_norm_computes_the_same(flavour: str, kind: Any, shape: tuple[int, ...]) -> None:
    assert_twins(kind(4, affine=True), norm(flavour, "InstanceNorm", 4), draw(*shape), within=1.5e-6)


@both
def test_instance_norm_with_statistics_evaluates_as_batch_norm(flavour: str) -> None:
    module = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    assert_twins(module, batch_norm(flavour, False), draw(2, 4, 5, 3), within=1e-6)
    flax = norm(flavour, "InstanceNorm", 4)
    with pytest.raises(errors.PlanError, match=r"use BatchNorm\(use_running_average=True\)"):
        to_flax(module, template(flax, last(draw(2, 4, 5, 3))))


def test_a_norm_without_parameters_has_nothing_to_convert() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2), nn.LayerNorm(2, elementwise_affine=False))

    def twin(rngs: nnx.Rngs) -> nnx.Module:
        linear = nnx.Linear(2, 2, rngs=rngs)
        return nnx.Sequential(
            linear,
            nnx.InstanceNorm(2, use_scale=False, use_bias=False, rngs=rngs),
            nnx.LayerNorm(2, use_scale=False, use_bias=False, rngs=rngs),
        )

    filled = to_flax(module, template(twin))
    assert sorted(to_state_dict(filled, module)) == ["0.bias", "0.weight"]
