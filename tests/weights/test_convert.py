"""Weights cross: the same outputs on the other side, and the same bits when they come back."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import core, nnx
from flax import linen as ln
from torch import nn

from tests.weights import models
from torchjax_bridge import errors, plan, to_flax, to_state_dict
from torchjax_bridge.weights import Flatten, PairingWarning, PartialWarning

RULES = [Flatten("fc1", (4, 2, 2))]

TEMPLATES = {
    "nnx": models.nnx_net,
    "nnx abstract": models.abstract_nnx_net,
    "linen": models.linen_variables,
    "linen abstract": models.abstract_linen_variables,
}
SOURCES: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda module: module,
    "state_dict": lambda module: module.state_dict(),
    "DataParallel": nn.DataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "module. keys": lambda module: {f"module.{k}": v for k, v in module.state_dict().items()},
    "_orig_mod. keys": lambda module: {f"_orig_mod.{k}": v for k, v in module.state_dict().items()},
    "both prefixes": lambda module: {f"module._orig_mod.{k}": v for k, v in module.state_dict().items()},
    "compiled child": lambda module: {
        k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in module.state_dict().items()
    },
}


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 8)


def _run(twin: Any, images: torch.Tensor) -> np.ndarray:
    x = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
    return np.asarray(models.LinenNet().apply(twin, x) if isinstance(twin, dict) else twin(x))


@pytest.mark.every(2)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_twin_computes_what_torch_computes(template: str, images: torch.Tensor) -> None:
    module = models.net()
    twin = to_flax(module, TEMPLATES[template](), rules=RULES)
    np.testing.assert_allclose(_run(twin, images), module(images).detach().numpy(), atol=3e-6)


@pytest.mark.every(3)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_spelling_of_the_source_crosses_and_comes_back_bit_for_bit(template: str, source: str) -> None:
    module = models.net()
    given = SOURCES[source](module)
    # Bare square kernels, into scopes of no class: a convolution is the usual answer.
    doubt = isinstance(given, dict) and template.startswith("linen")
    with pytest.warns(PairingWarning, match="taken for a convolution") if doubt else nullcontext():
        twin = to_flax(given, TEMPLATES[template](), rules=RULES)
    with pytest.warns(PairingWarning, match="taken for a convolution") if doubt else nullcontext():
        back = to_state_dict(twin, given, rules=RULES)
    original = given if isinstance(given, dict) else given.state_dict()
    assert list(back) == list(original)
    for key, value in original.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(
            back[key].view(torch.uint8) if value.ndim else back[key],
            value.view(torch.uint8) if value.ndim else value,
        ), key
    fresh = SOURCES[source](models.Net())
    if isinstance(fresh, nn.Module):
        fresh.load_state_dict(back)


def test_odd_bits_survive_the_journey() -> None:
    module = models.net()
    with torch.no_grad():
        bits = module.fc1.weight.view(torch.int32)
        bits.view(-1)[:4] = torch.tensor([0x7FC12345, -0x80000000, 1, -0x3EDCBA])
    twin = to_flax(module, models.nnx_net(), rules=RULES)
    back = to_state_dict(twin, module, rules=RULES)
    assert torch.equal(back["fc1.weight"].view(torch.int32), bits)


def test_the_result_is_of_the_templates_kind() -> None:
    module = models.net()
    assert type(to_flax(module, models.nnx_net(), rules=RULES)) is models.NnxNet
    state = to_flax(module, nnx.state(models.nnx_net()), rules=RULES)
    assert type(state) is nnx.State
    variables = models.linen_variables()
    assert type(to_flax(module, variables, rules=RULES)) is dict
    frozen = to_flax(module, core.freeze(variables), rules=RULES)
    assert type(frozen) is core.FrozenDict
    assert jax.tree.structure(core.unfreeze(frozen)) == jax.tree.structure(variables)


def test_the_template_is_left_as_it_was() -> None:
    template = models.nnx_net()
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(template, nnx.Param))]
    twin = to_flax(models.net(), template, rules=RULES)
    twin.fc2.kernel[...] = jnp.zeros_like(twin.fc2.kernel[...])
    after = [np.asarray(x) for x in jax.tree.leaves(nnx.state(template, nnx.Param))]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    variables = models.linen_variables()
    kept = jax.tree.map(np.asarray, variables)
    to_flax(models.net(), variables, rules=RULES)
    jax.tree.map(np.testing.assert_array_equal, kept, variables)


def test_random_streams_go_on_from_a_concrete_template_and_start_anew_from_an_abstract_one() -> None:
    template = models.nnx_net()
    template.dropout.rngs()  # the stream has advanced
    twin = to_flax(models.net(), template, rules=RULES)
    assert int(twin.dropout.rngs.count[...]) == int(template.dropout.rngs.count[...]) == 1
    abstract = to_flax(models.net(), models.abstract_nnx_net(), rules=RULES)
    assert int(abstract.dropout.rngs.count[...]) == 0
    dropped = nnx.Dropout(0.5, rngs=abstract.dropout.rngs)(jnp.ones(100))
    assert 0 < int((dropped == 0).sum()) < 100


def test_each_random_stream_of_an_abstract_template_starts_with_a_key_of_its_own() -> None:
    def build(rngs: nnx.Rngs) -> nnx.Sequential:
        drops = [nnx.Dropout(0.5, rngs=rngs) for _ in range(2)]
        return nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), *drops)

    template = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    twins = [to_flax(nn.Sequential(nn.Linear(2, 2)), template) for _ in range(2)]
    dropped = [[layer(jnp.ones(64)) for layer in twin.layers[1:]] for twin in twins]
    assert (dropped[0][0] != dropped[0][1]).any()
    assert (dropped[0][0] == dropped[1][0]).all()  # the same in every run


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["nnx", "linen"])
def test_copies_never_alias_the_model_and_are_row_major(template: str) -> None:
    module = models.net()
    twin = to_flax(module, TEMPLATES[template](), rules=RULES)
    leaves = jax.tree.leaves(nnx.state(twin, nnx.Param) if template == "nnx" else twin)
    before = [np.array(leaf) for leaf in leaves]
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    for leaf, old in zip(leaves, before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), old)
        assert np.asarray(leaf).flags.c_contiguous


def test_views_move_no_byte_and_follow_the_model() -> None:
    module = models.net()
    twin = to_flax(module, models.nnx_net(), rules=[Flatten("fc1", None)], copy=False)
    assert twin.stem.kernel[...].unsafe_buffer_pointer() == module.stem.weight.data_ptr()
    assert twin.fc1.kernel[...].unsafe_buffer_pointer() == module.fc1.weight.data_ptr()
    back = to_state_dict(twin, module, rules=[Flatten("fc1", None)], copy=False)
    assert back["stem.weight"].data_ptr() == module.stem.weight.data_ptr()
    assert back["stem.weight"].shape == module.stem.weight.shape


def test_a_layout_that_needs_a_copy_refuses_to_share() -> None:
    with pytest.raises(errors.ShareError, match=r"fc1\.kernel.*needs a copy.*copy=None"):
        to_flax(models.net(), models.nnx_net(), rules=RULES, copy=False)
    shared = to_flax(models.net(), models.nnx_net(), rules=RULES, copy=None)
    assert shared.fc1.kernel[...].shape == (16, 6)


def test_the_way_back_gives_memory_of_its_own() -> None:
    module = models.net()
    twin = to_flax(module, models.nnx_net(), rules=RULES)
    kernel = np.array(twin.fc2.kernel[...])
    back = to_state_dict(twin, module, rules=RULES)
    for value in back.values():
        assert value.is_contiguous()
        value.zero_()
    np.testing.assert_array_equal(np.asarray(twin.fc2.kernel[...]), kernel)
    assert int(module.blocks[0].bn1.num_batches_tracked) == 7


def test_large_leaves_get_aligned_memory_of_their_own() -> None:
    module = nn.Linear(700, 800)
    twin = to_flax(module, nnx.Linear(700, 800, rngs=nnx.Rngs(0)))
    array = twin.kernel[...]
    assert array.unsafe_buffer_pointer() % 64 == 0
    np.testing.assert_array_equal(np.asarray(array), module.weight.detach().numpy().T)
    del module
    assert array.shape == (700, 800)


# --- dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_dtype_and_bits(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 4).to(dtype)
    twin = to_flax(module, nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    assert str(twin.kernel[...].dtype) == str(dtype).removeprefix("torch.")
    back = to_state_dict(twin, module)
    assert torch.equal(back["weight"], module.weight)
    assert back["weight"].dtype is dtype


def test_float64_weights_are_refused_with_x64_off_all_at_once_and_cross_with_it_on(x64_off: None) -> None:
    module = nn.Linear(3, 4).double()
    template = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(errors.PlanError) as caught:
        to_flax(module, template)
    assert str(caught.value).count("needs x64, which is off") == 2
    with jax.enable_x64(True):
        twin = to_flax(module, template)
        assert twin.kernel[...].dtype == jnp.float64
        assert torch.equal(to_state_dict(twin, module)["weight"], module.weight)


# --- what one side alone has -----------------------------------------------------------------------------


def test_strict_false_leaves_out_what_has_no_place_and_keeps_what_has_no_source() -> None:
    module = models.net()
    state = module.state_dict()
    del state["fc2.bias"]
    state["extra.weight"] = torch.ones(2, 2)
    template = models.nnx_net()
    template.fc2.bias[...] = jnp.arange(5.0)
    with pytest.raises(errors.PlanError) as caught:
        to_flax(state, template, rules=RULES)
    assert "extra.weight" in str(caught.value)
    assert "fc2.bias" in str(caught.value)
    with pytest.warns(PartialWarning, match=r"extra\.weight"):
        twin = to_flax(state, template, rules=RULES, strict=False)
    np.testing.assert_array_equal(np.asarray(twin.fc2.bias[...]), np.arange(5.0))
    np.testing.assert_array_equal(np.asarray(twin.fc2.kernel[...]), state["fc2.weight"].numpy().T)


def test_strict_false_cannot_keep_what_an_abstract_template_does_not_have() -> None:
    state = models.net().state_dict()
    del state["fc2.bias"]
    with pytest.raises(errors.PlanError, match="no value to keep"):
        to_flax(state, models.abstract_nnx_net(), rules=RULES, strict=False)


def test_strict_false_still_raises_for_a_mismatch() -> None:
    state = models.net().state_dict()
    state["fc2.weight"] = torch.zeros(7, 6)
    with pytest.raises(errors.PlanError, match=r"fc2\.weight"):
        to_flax(state, models.nnx_net(), rules=RULES, strict=False)


def test_the_way_back_reports_a_key_without_source_and_a_leaf_without_place() -> None:
    module = models.net()
    variables = to_flax(module, models.linen_variables(), rules=RULES)
    del variables["params"]["fc2"]["bias"]
    variables["params"]["extra"] = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(errors.PlanError) as caught:
        to_state_dict(variables, module, rules=RULES)
    assert "fc2.bias" in str(caught.value)
    assert "params.extra.kernel" in str(caught.value)
    with pytest.warns(PartialWarning, match=r"params\.extra\.kernel"):
        back = to_state_dict(variables, module, rules=RULES, strict=False)
    assert torch.equal(back["fc2.bias"], module.fc2.bias)


def test_an_abstract_source_has_nothing_to_give() -> None:
    with pytest.raises(errors.PlanError, match="no values"):
        to_state_dict(models.abstract_nnx_net(), models.net(), rules=RULES)


def test_a_template_on_the_meta_device_is_filled_too() -> None:
    module = models.net()
    twin = to_flax(module, models.nnx_net(), rules=RULES)
    with torch.device("meta"):
        template = models.Net()
    back = to_state_dict(twin, template, rules=RULES)
    assert torch.equal(back["fc1.weight"], module.fc1.weight)
    assert int(back["blocks.0.bn1.num_batches_tracked"]) == 0
    loaded = models.Net()
    loaded.load_state_dict(back)


def test_numpy_leaves_of_a_restored_checkpoint_come_back_too() -> None:
    module = models.net()
    variables = jax.tree.map(np.asarray, to_flax(module, models.linen_variables(), rules=RULES))
    back = to_state_dict(variables, module, rules=RULES)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_the_string_keys_of_a_restored_nnx_state_are_understood() -> None:
    module = models.net()
    state = nnx.to_pure_dict(to_flax(module, nnx.state(models.nnx_net()), rules=RULES))
    state["blocks"] = {str(key): value for key, value in state["blocks"].items()}
    restored = nnx.State(state)
    back = to_state_dict(restored, module, rules=RULES)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


# --- ties --------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


class NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, tie: bool) -> None:
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)
        if tie:
            self.second.kernel = self.first.kernel


@pytest.mark.parametrize("tie", [True, False])
def test_tied_tensors_become_one_leaf_or_two_as_the_template_wants(tie: bool) -> None:
    module = Tied()
    twin = to_flax(module, NnxTied(nnx.Rngs(0), tie=tie))
    np.testing.assert_array_equal(np.asarray(twin.first.kernel[...]), module.first.weight.detach().numpy().T)
    np.testing.assert_array_equal(np.asarray(twin.second.kernel[...]), np.asarray(twin.first.kernel[...]))
    assert (twin.second.kernel is twin.first.kernel) == tie
    back = to_state_dict(twin, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_the_second_name_of_a_tied_tensor_is_known_by_its_values_where_no_module_says_so() -> None:
    class Nnx(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(6, 4, rngs=nnx.Rngs(0))

    embed = torch.randn(6, 4)
    template = nnx.eval_shape(Nnx)
    copied = {"embed.weight": embed, "lm_head.weight": embed.clone()}
    hint = r"'lm_head\.weight' .*same values as 'embed\.weight'.*pass the nn\.Module, or leave this key out"
    with pytest.raises(errors.PlanError, match=hint):
        to_flax(copied, template)
    to_flax({"embed.weight": embed, "lm_head.weight": embed}, template)  # the same memory says so itself
    for other in (embed + 1, embed.bfloat16(), embed.to("meta")):
        assert "same values" not in str(plan({**copied, "lm_head.weight": other}, template).report)
    zeros = {key: torch.zeros_like(value) for key, value in copied.items()}
    assert "same values" not in str(plan(zeros, template).report)


def test_a_conjugate_view_of_a_tensor_is_no_tie() -> None:
    value = torch.randn(3, dtype=torch.complex64)
    state = {"first": value, "second": value.conj()}
    empty = nnx.State({name: nnx.Param(jnp.zeros(3, jnp.complex64)) for name in state})
    twin = to_flax(state, empty)
    back = to_state_dict(twin, state)
    assert torch.equal(back["first"], value)
    assert torch.equal(back["second"], value.conj().resolve_conj())


def test_two_values_for_one_tied_tensor_are_refused() -> None:
    module = Tied()
    twin = to_flax(module, NnxTied(nnx.Rngs(0), tie=False))
    twin.second.kernel[...] += 1
    with pytest.raises(errors.PlanError, match=r"second\.weight"):
        to_state_dict(twin, module)


@pytest.mark.parametrize("tie", [True, False])
def test_a_module_on_meta_says_what_it_ties_as_one_with_memory_does(tie: bool) -> None:
    module = Tied()
    with torch.device("meta"):
        empty = Tied()
    twin = to_flax(module, NnxTied(nnx.Rngs(0), tie=tie))
    back = to_state_dict(twin, empty)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    if not tie:
        twin.second.kernel[...] += 1
        with pytest.raises(errors.PlanError, match=r"second\.weight"):
            to_state_dict(twin, empty)


def test_two_tensors_for_one_flax_leaf_are_refused() -> None:
    module = Tied()
    module.second.weight = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(errors.PlanError, match=r"second\.weight"):
        to_flax(module, NnxTied(nnx.Rngs(0), tie=True))


# --- boxes -------------------------------------------------------------------------------------------


def test_partitioned_leaves_keep_their_boxes() -> None:
    class Boxed(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = ln.with_partitioning(ln.initializers.lecun_normal(), (None, "model"))
            return ln.Dense(4, kernel_init=init, name="fc")(x)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

    variables = Boxed().init(jax.random.key(0), jnp.zeros((1, 3)))
    module = Plain()
    twin = to_flax(module, variables)
    box = twin["params"]["fc"]["kernel"]
    assert isinstance(box, ln.Partitioned)
    assert box.names == (None, "model")
    np.testing.assert_array_equal(np.asarray(box.value), module.fc.weight.detach().numpy().T)
    assert torch.equal(to_state_dict(twin, module)["fc.weight"], module.fc.weight)


def test_parameters_that_require_grad_cross_as_values() -> None:
    module = nn.Linear(3, 4)
    twin = to_flax(dict(module.named_parameters()), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(np.asarray(twin.kernel[...]), module.weight.detach().numpy().T)
    assert not to_state_dict(twin, module)["weight"].requires_grad


def test_extra_state_of_a_module_stays_in_torch() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"calls": 3}

        def set_extra_state(self, state: dict) -> None:
            self.calls = state["calls"]

    module = Stateful(3, 4)
    twin = to_flax(module, nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    back = to_state_dict(twin, module)
    assert back["_extra_state"] == {"calls": 3}
    module.load_state_dict(back)


# --- wrong options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"copy": "yes"}, {"copy": 1}, {"copy": 0}, {"strict": "no"}])
def test_an_option_that_is_neither_true_nor_false_is_refused_both_ways(options: dict[str, Any]) -> None:
    module, twin = nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    (name,) = options
    with pytest.raises(TypeError, match=f"{name} must be .*True or False; got"):
        to_flax(module, twin, **options)
    with pytest.raises(TypeError, match=f"{name} must be .*True or False; got"):
        to_state_dict(twin, module, **options)


def test_a_module_that_holds_itself_is_filled() -> None:
    class Knot(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.own = self

    module = nn.ModuleDict({"fc": nn.Linear(2, 3)})
    twin = to_flax(module, Knot())
    assert twin.own is twin
    assert torch.equal(to_state_dict(twin, module)["fc.weight"], module["fc"].weight)


def test_a_pure_dict_of_nnx_is_refused_with_what_to_pass_instead() -> None:
    """It holds parameters and statistics side by side, and linen's collections are what tells them apart."""
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)})
    rngs = nnx.Rngs(0)
    model = nnx.Dict(conv=nnx.Conv(3, 4, (1, 1), rngs=rngs), bn=nnx.BatchNorm(4, rngs=rngs))
    pure = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(
        errors.PlanError, match=r"pass nnx\.state\(model\), filled .* nnx\.replace_by_pure_dict"
    ):
        to_flax(module, pure)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, pure)
    filled = to_flax(module, state)
    assert np.array_equal(filled["bn"]["mean"][...], module["bn"].running_mean)
