"""weight_norm and spectral_norm, as old hooks and as parametrizations: folded, or in linen's wrappers."""

import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.weights.twins import (
    Flax,
    as_is,
    assert_returns,
    assert_twins,
    difference,
    draw,
    last,
    randomise,
    run,
    template,
)
from torchjax_bridge import errors, to_flax, to_state_dict
from torchjax_bridge.weights import Flatten, plan


def old_weight_norm(module: nn.Module, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module, **settings)


WEIGHT: dict[str, Callable[..., nn.Module]] = {
    "hook": old_weight_norm,
    "parametrization": parametrizations.weight_norm,
}
SPECTRAL: dict[str, Callable[..., nn.Module]] = {
    "hook": torch.nn.utils.spectral_norm,
    "parametrization": parametrizations.spectral_norm,
}
WAYS = {**{("weight", k): v for k, v in WEIGHT.items()}, **{("spectral", k): v for k, v in SPECTRAL.items()}}
ways = pytest.mark.parametrize("way", list(WAYS.values()), ids=["-".join(name) for name in WAYS])


def linear(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(5, 3, rngs=rngs)


# --- folded ------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@ways
@pytest.mark.parametrize("flax", [ln.Dense(3), linear], ids=["linen", "nnx"])
def test_a_linear_layer_gets_the_weight_of_evaluation_and_its_parts_come_back(way: Any, flax: Flax) -> None:
    assert_twins(way(nn.Linear(5, 3)), flax, draw(4, 5), within=1e-6, axes=as_is, warm=9)


@ways
def test_so_does_a_convolution(way: Any) -> None:
    flax = ln.Conv(6, (3, 3), padding="VALID")
    assert_twins(way(nn.Conv2d(4, 6, 3)), flax, draw(2, 4, 6, 5), within=2e-6, warm=9)


@pytest.mark.every(2)
@ways
@pytest.mark.parametrize("swapped", [True, False])
def test_so_does_a_transposed_convolution(way: Any, swapped: bool) -> None:
    flax = ln.ConvTranspose(6, (3, 3), padding=[(2, 2), (2, 2)], transpose_kernel=swapped)
    assert_twins(way(nn.ConvTranspose2d(4, 6, 3)), flax, draw(2, 4, 5, 4), within=2e-6, warm=9)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_the_axis_of_the_length_is_read_off_its_shape(dim: int | None) -> None:
    module = WEIGHT["parametrization"](nn.Linear(5, 3), dim=dim)
    assert_twins(module, linear, draw(4, 5), within=1e-6, axes=as_is)


@pytest.mark.parametrize("spelling", list(SPECTRAL))
def test_another_axis_of_spectral_norm_is_read_off_the_module(spelling: str) -> None:
    module = SPECTRAL[spelling](nn.Linear(5, 5), dim=1)
    flax = lambda rngs: nnx.Linear(5, 5, rngs=rngs)  # noqa: E731
    assert_twins(module, flax, draw(4, 5), within=2e-6, axes=as_is, bare=False)


def test_a_kernel_among_others_may_be_computed() -> None:
    lstm = WEIGHT["parametrization"](nn.LSTM(3, 4, batch_first=True), "weight_hh_l0")
    flax = lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=rngs), rngs=rngs)  # noqa: E731
    assert_twins(lstm, flax, draw(2, 5, 3), within=5e-7, axes=as_is, call=lambda x: lstm(x)[0])
    embedding = WEIGHT["hook"](nn.Embedding(6, 3))
    ids = torch.tensor([[0, 5, 2]])
    assert_twins(embedding, lambda rngs: nnx.Embed(6, 3, rngs=rngs), ids, within=2e-7, axes=as_is)


@pytest.mark.parametrize("way", list(WEIGHT.values()), ids=list(WEIGHT))
def test_a_weight_changed_in_flax_comes_back_as_parts_that_fold_to_it(way: Any) -> None:
    module = randomise(way(nn.Linear(5, 3)))
    filled = to_flax(module, template(linear))
    filled.kernel[...] = filled.kernel[...] * 2 + 1
    module.load_state_dict(to_state_dict(filled, module))
    x = draw(4, 5)
    assert difference(filled(x.numpy()), module(x).detach()) <= 2e-6
    notes = plan(module, template(linear)).notes
    assert any("g v / |v| (lossy)" in note for note in notes)


@pytest.mark.parametrize("way", list(SPECTRAL.values()), ids=list(SPECTRAL))
def test_a_changed_weight_comes_back_to_spectral_norm_only_with_singular_value_one(way: Any) -> None:
    module = randomise(way(nn.Linear(5, 3))).eval()
    filled = to_flax(module, template(linear))
    rotation = jnp.asarray([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    u, s, v = jnp.linalg.svd(filled.kernel[...], full_matrices=False)
    filled.kernel[...] = (u * (s / s[0])) @ v @ rotation
    x = draw(4, 5)
    module.load_state_dict(to_state_dict(filled, module))
    assert difference(filled(x.numpy()), module(x).detach()) <= 2e-6
    filled.kernel[...] = filled.kernel[...] * 3
    with pytest.raises(errors.PlanError, match="the largest singular value of the weight is 3,"):
        to_state_dict(filled, module)


@ways
@pytest.mark.parametrize("dim", [0, 1])
def test_a_template_without_values_gets_the_weight_and_what_it_is_computed_from(way: Any, dim: int) -> None:
    module = randomise(way(nn.Linear(5, 3), dim=dim)).train()
    for _ in range(60):  # until the vectors of spectral_norm have converged
        module(draw(2, 5))
    filled = to_flax(module.eval(), template(linear))
    with torch.device("meta"):
        empty = way(nn.Linear(5, 3), dim=dim)
    fresh = way(nn.Linear(5, 3), dim=dim).eval()
    fresh.load_state_dict(to_state_dict(filled, empty))
    x = draw(4, 5)
    assert difference(filled(x.numpy()), fresh(x).detach()) <= 1e-6


@pytest.mark.parametrize("way", list(WEIGHT.values()), ids=list(WEIGHT))
def test_a_weight_that_weight_norm_has_not_made_comes_back_to_the_bit_zeros_too(way: Any) -> None:
    filled = linear(nnx.Rngs(0))
    filled.kernel[...] = filled.kernel[...].at[:, 1].set(0)
    module = way(nn.Linear(5, 3))
    module.load_state_dict(to_state_dict(filled, module))
    module(draw(1, 5))  # an old hook computes the weight when it is called
    assert torch.equal(module.weight.detach(), torch.from_numpy(jax.device_get(filled.kernel[...]).T.copy()))


# --- linen's wrappers --------------------------------------------------------------------------------


class Wrapped(ln.Module):
    """Wrappers where linen numbers them: their parts lie beside the layers."""

    wrap: Any

    @ln.compact
    def __call__(self, x, **settings):
        x = self.wrap(ln.Conv(6, (3, 3), padding="VALID"))(x, **settings)
        return self.wrap(ln.Dense(4))(x, **settings)


class Named(ln.Module):
    """Wrappers under names: their parts lie above the layers."""

    wrap: Any

    def setup(self) -> None:
        self.conv = self.wrap(ln.Conv(6, (3, 3), padding="VALID"))
        self.dense = self.wrap(ln.Dense(4))

    def __call__(self, x, **settings):
        return self.dense(self.conv(x, **settings), **settings)


def pair(way: Any) -> tuple[nn.Module, Any]:
    module = nn.ModuleDict({"conv": way(nn.Conv2d(4, 6, 3)), "dense": way(nn.Linear(6, 4))})
    return module, lambda x: module["dense"](module["conv"](x).movedim(1, -1)).movedim(-1, 1)


@pytest.mark.every(2)
@pytest.mark.parametrize("way", list(WEIGHT.values()), ids=list(WEIGHT))
@pytest.mark.parametrize("kind", [Wrapped, Named])
def test_linen_s_weight_norm_keeps_the_length_as_torch_does(way: Any, kind: Any) -> None:
    module, call = pair(way)
    filled = assert_twins(module, kind(ln.WeightNorm), draw(2, 4, 5, 5), within=3e-6, call=call)
    assert not plan(module, filled).notes  # nothing is folded, nothing lost


@pytest.mark.every(2)
@pytest.mark.parametrize("way", list(SPECTRAL.values()), ids=list(SPECTRAL))
@pytest.mark.parametrize("kind", [Wrapped, Named])
def test_linen_s_spectral_norm_agrees_as_far_as_u_has_converged(way: Any, kind: Any) -> None:
    module, call = pair(way)
    randomise(module).train()
    flax, x = kind(ln.SpectralNorm), draw(2, 4, 5, 5)
    with torch.no_grad():
        for _ in range(200):
            call(x)
    empty = template(flax, last(x), update_stats=False)
    filled = to_flax(module, empty)
    assert_returns(module, filled)
    assert any("as far as u has converged" in note for note in plan(module, empty).notes)
    with torch.no_grad():
        want = last(call(x))
    step = jax.jit(lambda variables, x: flax.apply(variables, x, update_stats=True, mutable="batch_stats"))
    y, state = step(filled, last(x))
    assert difference(y, want) <= 2e-5
    trained = to_state_dict(filled | state, module.eval())
    before = module.state_dict()
    assert all(difference(trained[key], before[key]) <= 1e-5 for key in before)
    module.load_state_dict(trained)
    with torch.no_grad():
        assert difference(run(flax, filled | state, last(x), update_stats=False), last(call(x))) <= 2e-5


def test_a_length_along_another_axis_has_no_place_in_linen_s_weight_norm() -> None:
    module = nn.ModuleDict({"dense": WEIGHT["parametrization"](nn.Linear(4, 4), dim=1)})

    class One(ln.Module):
        def setup(self) -> None:
            self.dense = ln.WeightNorm(ln.Dense(4))

        def __call__(self, x):
            return self.dense(x)

    with pytest.raises(errors.PlanError, match="are not one a feature of Flax's WeightNorm"):
        to_flax(module, template(One(), jnp.ones((1, 4))))


def test_a_plain_layer_does_not_fill_a_wrapper() -> None:
    module = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "dense": nn.Linear(6, 4)})
    report = plan(module, template(Named(ln.WeightNorm), last(draw(2, 4, 5, 5)))).report
    assert {fault.subject.rpartition("/")[2] for fault in report if fault.kind == "missing"} >= {"scale"}


@pytest.mark.parametrize("name", ["fc", "other"])
def test_nnx_s_spectral_norm_is_refused(name: str) -> None:
    way = SPECTRAL["hook"]

    class Holder(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            setattr(self, name, nnx.SpectralNorm(linear(rngs), rngs=rngs))

    with pytest.raises(errors.PlanError, match=r"nnx\.SpectralNorm writes over the kernel it holds"):
        to_flax(nn.ModuleDict({"fc": way(nn.Linear(5, 3))}), template(Holder))
    with pytest.raises(errors.PlanError):
        to_flax(nn.ModuleDict({"fc": nn.Linear(5, 3)}), template(Holder))
    with pytest.raises(errors.PlanError):
        to_flax(nn.ModuleDict({"fc": way(nn.Linear(5, 3))}), nnx.state(template(Holder)))


class NnxNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **settings: Any) -> None:
        self.fc = nnx.WeightNorm(nnx.Linear(5, 3, rngs=rngs), rngs=rngs, **settings)
        self.conv = nnx.WeightNorm(nnx.Conv(4, 6, (3, 2), padding="VALID", rngs=rngs), rngs=rngs, **settings)


@pytest.mark.every(3)
@pytest.mark.parametrize("spelling", WEIGHT)
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", ["module", "abstract", "state"])
def test_nnx_s_weight_norm_holds_both_parts(spelling: str, bare: bool, kind: str) -> None:
    way = WEIGHT[spelling]
    module = nn.ModuleDict({"fc": way(nn.Linear(5, 3)), "conv": way(nn.Conv2d(4, 6, (3, 2)))})
    randomise(module)
    source = module.state_dict() if bare else module
    rules, plain = [Flatten("fc", None)], NnxNormed(nnx.Rngs(0))
    given = {"module": plain, "abstract": template(NnxNormed), "state": nnx.state(plain)}[kind]
    filled = to_flax(source, given, rules=rules)
    back = to_state_dict(filled, source, rules=rules)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    if kind == "state":
        nnx.update(plain, filled)
        filled = plain
    x, image = draw(2, 5), draw(2, 4, 6, 6)
    for _ in range(3):  # each call writes over the kernels
        with jax.default_matmul_precision("highest"):
            y, z = filled.fc(jnp.asarray(x.numpy())), filled.conv(jnp.asarray(last(image)))
        assert jnp.allclose(y, module["fc"](x).detach().numpy(), atol=1e-5)
        assert jnp.allclose(z, last(module["conv"](image).detach()), atol=1e-4)
    again = to_state_dict(filled, module, rules=rules)
    module.load_state_dict(again)
    assert torch.allclose(module["fc"](x), torch.tensor(jnp.asarray(y).tolist()), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_axes": None},
        {"use_scale": False},
        {"variable_filter": lambda path, variable: True},
    ],
)
def test_nnx_s_weight_norm_of_other_settings_is_refused(settings: Any) -> None:
    way = WEIGHT["parametrization"]
    module = nn.ModuleDict({"fc": way(nn.Linear(5, 3)), "conv": way(nn.Conv2d(4, 6, (3, 2)))})
    with pytest.raises(errors.PlanError, match="feature_axes=-1, use_scale=True"):
        to_flax(module, NnxNormed(nnx.Rngs(0), **settings), rules=[Flatten("fc", None)])


def test_a_plain_layer_does_not_fill_nnx_s_weight_norm() -> None:
    module = nn.ModuleDict({"fc": nn.Linear(5, 3), "conv": nn.Conv2d(4, 6, (3, 2))})
    with pytest.raises(errors.PlanError):
        to_flax(module, NnxNormed(nnx.Rngs(0)), rules=[Flatten("fc", None)])


# --- everything else ---------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_other_parametrizations_are_refused_with_the_way_to_keep_their_result() -> None:
    module = nn.Linear(5, 3)
    parametrize.register_parametrization(module, "weight", Doubled())
    with pytest.raises(
        errors.PlanError, match="'weight' is computed by Doubled, which has no counterpart; keep"
    ):
        to_flax(module, template(linear))
    with pytest.raises(errors.PlanError):
        to_flax(module.state_dict(), template(linear))
    parametrize.remove_parametrizations(module, "weight")
    assert_twins(module, linear, draw(4, 5), within=5e-7, axes=as_is)


def test_one_parametrization_over_another_is_refused() -> None:
    module = parametrizations.weight_norm(parametrizations.spectral_norm(nn.Linear(5, 3)))
    with pytest.raises(errors.PlanError, match="computed by _SpectralNorm, _WeightNorm"):
        to_flax(module, template(linear))


def test_a_pruned_weight_is_refused_with_the_way_to_keep_its_result() -> None:
    module = prune.l1_unstructured(nn.Linear(5, 3), "weight", 0.5)
    with pytest.raises(errors.PlanError, match=r'prune\.remove\(layer, "weight"\) first'):
        to_flax(module, template(linear))
    assert_twins(prune.remove(module, "weight"), linear, draw(4, 5), within=5e-7, axes=as_is)


@ways
def test_the_order_behind_a_flatten_has_to_be_said_all_the_same(way: Any) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), way(nn.Linear(12, 4)))

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Conv(2, 3, (1, 1), rngs=rngs), nnx.Linear(12, 4, rngs=rngs)])

        def __call__(self, x):
            x = self.layers[0](x)
            return self.layers[1](x.reshape(len(x), -1))

    with pytest.raises(errors.PlanError, match=r'Flatten\("2", \(3, 2, 2\)\)'):
        to_flax(module, template(Net))
    x = draw(2, 2, 2, 2)
    assert_twins(module, Net, x, within=2e-6, rules=[Flatten("2", (3, 2, 2))], warm=9)
