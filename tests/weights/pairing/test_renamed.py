"""A tensor that is renamed on its own lies as its own layer's rule says, wherever it goes."""

import re
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import errors, parity, plan, to_flax, to_state_dict
from torchjax_bridge.weights import (
    Entry,
    Flatten,
    Identity,
    LayerType,
    PairingWarning,
    Permute,
    Rename,
    Rule,
    SettingsWarning,
)
from torchjax_bridge.weights.files import convert


class Torch(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Flax(nnx.Module):
    def __init__(self, layer: Any) -> None:
        self.head = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(x)


class Bare(nnx.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))


def _rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


LAYERS = {
    "Linear": (nn.Linear(4, 4), lambda: nnx.Linear(4, 4, rngs=_rngs())),
    "Conv1d": (nn.Conv1d(4, 4, 4), lambda: nnx.Conv(4, 4, (4,), padding="VALID", rngs=_rngs())),
    "Conv2d": (nn.Conv2d(3, 3, 3), lambda: nnx.Conv(3, 3, (3, 3), padding="VALID", rngs=_rngs())),
    "ConvTranspose2d": (
        nn.ConvTranspose2d(3, 3, 3),
        lambda: nnx.ConvTranspose(3, 3, (3, 3), padding="VALID", transpose_kernel=True, rngs=_rngs()),
    ),
    "pointwise": (nn.Conv2d(4, 4, 1), lambda: nnx.Linear(4, 4, rngs=_rngs())),
    "LayerNorm": (nn.LayerNorm(4), lambda: nnx.LayerNorm(4, epsilon=1e-5, rngs=_rngs())),
    "BatchNorm2d": (nn.BatchNorm2d(4), lambda: nnx.BatchNorm(4, momentum=0.9, rngs=_rngs())),
    "Embedding": (nn.Embedding(4, 4), lambda: nnx.Embed(4, 4, rngs=_rngs())),
}
NAMES = {"weight": ("kernel", "scale", "embedding"), "running_mean": ("mean",), "running_var": ("var",)}


def _one_by_one(module: nn.Module, twin: nnx.Module) -> list[Rename]:
    """Every tensor renamed on its own to the leaf of the same meaning."""
    leaves = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(twin.head, (nnx.Param, nnx.BatchStat)))}
    found = []
    for key in module.fc.state_dict():
        name = next((name for name in NAMES.get(key, ()) if name in leaves), key)
        found.append(Rename(f"fc.{key}", f"head.{name}"))
    return found


def _leaves(twin: Any) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(twin, (nnx.Param, nnx.BatchStat)))
    }


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("bare", "abstract"), [(False, False), (True, True)], ids=["module", "state_dict to abstract"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_tensors_renamed_one_by_one_are_laid_out_as_their_whole_layer_is(
    name: str, bare: bool, abstract: bool
) -> None:
    layer, make = LAYERS[name]
    module = Torch(layer)
    twin = nnx.eval_shape(lambda: Flax(make())) if abstract else Flax(make())
    source = module.state_dict() if bare else module
    said = [LayerType("fc", type(layer))] if bare else []
    rules = _one_by_one(module, Flax(make()))
    ours, whole = (to_flax(source, twin, rules=[*said, *how]) for how in (rules, [Rename("fc", "head")]))
    ours, whole = _leaves(ours), _leaves(whole)
    assert ours.keys() == whole.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], whole[path])
    back = to_state_dict(to_flax(source, twin, rules=[*said, *rules]), source, rules=[*said, *rules])
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_linens_kernel_is_transposed_for_a_renamed_weight_and_a_bare_one_is_asked_about() -> None:
    module = Torch(nn.Linear(4, 4))
    variables = {"params": {"head": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}}
    rules = [Rename("fc.weight", "head.kernel"), Rename("fc.bias", "head.bias")]
    filled = to_flax(module, variables, rules=rules)
    np.testing.assert_array_equal(filled["params"]["head"]["kernel"], module.fc.weight.detach().numpy().T)
    (fault,) = plan(module.state_dict(), variables, rules=rules).faults
    assert fault.kind == "ambiguous"
    assert 'LayerType("fc", nn.Linear)' in fault.message
    filled = to_flax(module.state_dict(), variables, rules=[*rules, LayerType("fc", nn.Linear)])
    np.testing.assert_array_equal(filled["params"]["head"]["kernel"], module.fc.weight.detach().numpy().T)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(3, 3, 3)])
def test_a_parameter_of_any_name_takes_the_layout_of_the_layer_and_says_that_it_did(layer: nn.Module) -> None:
    module = Torch(layer)
    shape = (4, 4) if isinstance(layer, nn.Linear) else (3, 3, 3, 3)
    axes = (1, 0) if isinstance(layer, nn.Linear) else (2, 3, 1, 0)
    twin = Bare(w=shape, b=shape[:1])
    rules = [Rename("fc.weight", "w"), Rename("fc.bias", "b")]
    with pytest.warns(PairingWarning, match="a name that does not show its layout"):
        filled = to_flax(module, twin, rules=rules)
    np.testing.assert_array_equal(filled.w[...], layer.weight.detach().permute(axes))
    said = [*rules, LayerType("fc", type(layer))]
    for source in (module, module.state_dict()):
        np.testing.assert_array_equal(
            to_flax(source, twin, rules=said).w[...], layer.weight.detach().permute(axes)
        )
    turned = Permute(tuple(reversed(range(layer.weight.ndim))))
    by_hand = Rule(type(layer), [Entry("weight", "kernel", turned), Entry("bias", "bias")])
    filled = to_flax(module, twin, rules=[*rules, by_hand])
    np.testing.assert_array_equal(filled.w[...], layer.weight.detach().permute(turned.axes))
    own = Rule(type(layer), [Entry("weight", "kernel", Identity()), Entry("bias", "bias")])
    np.testing.assert_array_equal(to_flax(module, twin, rules=[*rules, own]).w[...], layer.weight.detach())


def test_a_shape_that_only_torchs_layout_has_is_a_mismatch_that_names_both() -> None:
    rules = [Rename("fc.weight", "w"), Rename("fc.bias", "b")]
    with pytest.raises(errors.PlanError, match=r"'fc.weight' \(4, 3\) would be \(3, 4\).*'w' \(4, 3\)"):
        to_flax(Torch(nn.Linear(3, 4)), Bare(w=(4, 3), b=(4,)), rules=rules)


def test_a_bias_that_stays_in_place_and_a_weight_that_goes_elsewhere_each_find_theirs() -> None:
    module = Torch(nn.Linear(3, 4))
    within = {"params": {"fc": {"w": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}}
    apart = {"params": {"w": jnp.zeros((3, 4)), "fc": {"bias": jnp.zeros(4)}}}
    for template, place in ((within, "fc.w"), (apart, "w")):
        for source in (module, module.state_dict()):
            made = plan(source, template, rules=[Rename("fc.weight", place)])
            assert made.ok, made
            assert {str(move.layout) for move in made.moves} == {"permute(1, 0)", "as it is"}
    alone = plan(module, Flax(nnx.Linear(3, 4, rngs=_rngs())), rules=[Rename("fc.weight", "head.kernel")])
    assert "'fc.weight' is renamed on its own: rename the layer as a whole, Rename(\"fc\", ...)" in str(alone)


@pytest.mark.parametrize("bare", [False, True])
def test_a_pattern_for_all_tensors_of_a_layer_renames_the_layer(bare: bool) -> None:
    module = Torch(nn.MultiheadAttention(4, 2, batch_first=True))
    twin = Flax(nnx.MultiHeadAttention(2, 4, decode=False, rngs=_rngs()))
    source = module.state_dict() if bare else module
    ours, whole = (
        to_flax(source, twin, rules=[one]) for one in (Rename("fc.*", "head.*"), Rename("fc", "head"))
    )
    for path, value in _leaves(whole).items():
        np.testing.assert_array_equal(_leaves(ours)[path], value)


def test_what_becomes_one_leaf_with_others_cannot_be_renamed_on_its_own() -> None:
    module = Torch(nn.MultiheadAttention(4, 2))
    twin = Flax(nnx.MultiHeadAttention(2, 4, decode=False, rngs=_rngs()))
    made = plan(module, twin, rules=[Rename("fc.in_proj_weight", "head.query.kernel")])
    assert "'fc.in_proj_weight' of 'fc' (MultiheadAttention) cannot" in made.faults[0].message
    assert 'rename the whole layer, Rename("fc", ...)' in made.faults[0].message
    lstm = Torch(nn.LSTM(3, 4))
    cell = Flax(nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=_rngs())))
    assert not plan(lstm, cell, rules=[Rename("fc.weight_ih_l0", "head.cell.dense_i.kernel")]).ok


def test_a_tensor_is_not_renamed_into_a_layer_of_another_kind() -> None:
    rules = [Rename("fc.weight", "head.embedding"), Rename("fc.bias", "b")]
    for source in (Torch(nn.Linear(4, 4, bias=False)), Torch(nn.Conv2d(4, 4, (1, 1), bias=False))):
        with pytest.raises(errors.PlanError, match="cannot fill 'head'"):
            to_flax(source, Flax(nnx.Embed(4, 4, rngs=_rngs())), rules=rules[:1])


def test_a_parameter_of_no_layer_goes_as_it_is() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos, self.bias = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4))
            self.fc = nn.Linear(4, 4, bias=False)

    twin = nnx.Dict(fc=nnx.Linear(4, 4, rngs=_rngs()), emb=Bare(pos=(1, 4)))
    module = Loose()
    for source, doubt in ((module, pytest.warns(SettingsWarning)), (module.state_dict(), nullcontext())):
        with doubt:
            filled = to_flax(source, twin, rules=[Rename("bias", "fc.bias"), Rename("pos", "emb.pos")])
        np.testing.assert_array_equal(filled.emb.pos[...], module.pos.detach())
        np.testing.assert_array_equal(filled.fc.bias[...], module.bias.detach())
        np.testing.assert_array_equal(filled.fc.kernel[...], module.fc.weight.detach().T)


def test_the_order_of_flattened_features_is_asked_of_the_layer_itself() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(36, 36)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).flatten(1))

    class Twin(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=_rngs())
            self.head = nnx.Linear(36, 36, rngs=_rngs())

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.conv(x).reshape(x.shape[0], -1))

    module = Net()
    rules = [Rename("fc.weight", "head.kernel"), Rename("fc.bias", "head.bias")]
    (fault,) = plan(module, Twin(), rules=rules).faults
    assert 'Flatten("fc", (4, 3, 3))' in fault.message
    filled = to_flax(module, Twin(), rules=[*rules, Flatten("fc", (4, 3, 3))])
    x = torch.randn(2, 1, 5, 5)
    got = filled(jnp.asarray(x.permute(0, 2, 3, 1).numpy()))
    np.testing.assert_allclose(got, module(x).detach(), atol=1e-5)


def test_parity_names_the_renamed_weight_that_was_not_transposed() -> None:
    module, twin = Torch(nn.Linear(4, 4)), Flax(nnx.Linear(4, 4, rngs=_rngs()))
    rules = [Rename("fc.weight", "head.kernel"), Rename("fc.bias", "head.bias")]
    right = to_flax(module, twin, rules=rules)
    assert parity(module, right, torch.randn(5, 4), rules=rules).ok
    right.head.kernel[...] = jnp.asarray(module.fc.weight.detach().numpy())
    found = parity(module, right, torch.randn(5, 4), rules=rules)
    assert not found.ok
    assert re.search(r"transposed kernel: 'head.kernel' .* holds torch's 'fc.weight'", str(found)), found


@pytest.mark.parametrize("model", [False, True])
def test_a_file_is_converted_with_the_same_layouts(model: bool, tmp_path: Any) -> None:
    module, twin = Torch(nn.Linear(4, 4)), Flax(nnx.Linear(4, 4, rngs=_rngs()))
    torch.save(module.state_dict(), tmp_path / "m.pt")
    rules = [Rename("fc.weight", "head.kernel"), Rename("fc.bias", "head.bias")]
    options = {"model": module} if model else {}
    convert(tmp_path / "m.pt", tmp_path / "f.safetensors", to="flax", template=twin, rules=rules, **options)
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(
        load_file(tmp_path / "f.safetensors")["head.kernel"], module.fc.weight.detach().numpy().T
    )


def test_a_renamed_weight_in_each_of_many_blocks_is_stacked_for_a_scan() -> None:
    module = nn.ModuleDict({"blocks": nn.ModuleList(Torch(nn.Linear(4, 4)) for _ in range(3))})
    leaf = {"kernel": jnp.zeros((3, 4, 4)), "bias": jnp.zeros((3, 4))}
    rules = [
        Rename("blocks.*.fc.weight", "blocks.*.head.kernel"),
        Rename("blocks.*.fc.bias", "blocks.*.head.bias"),
    ]
    filled = to_flax(module, {"params": {"blocks": {"head": leaf}}}, rules=rules)
    for number, block in enumerate(module["blocks"]):
        np.testing.assert_array_equal(
            filled["params"]["blocks"]["head"]["kernel"][number], block.fc.weight.detach().T
        )
