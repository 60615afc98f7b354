"""What a link's plan cannot see any more is an error that names it, and what does not matter is none."""

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import link, to_flax
from torchjax_bridge.errors import PlanError
from torchjax_bridge.weights.linking import Link, _make_link


def _models() -> tuple[Any, Any, Link]:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[3].weight = module[2].weight
    rngs = nnx.Rngs(0)
    layers = (
        nnx.Linear(3, 4, rngs=rngs),
        nnx.BatchNorm(4, momentum=0.9, rngs=rngs),
        nnx.Linear(4, 4, rngs=rngs),
        nnx.Linear(4, 4, rngs=rngs),
    )
    model = nnx.Sequential(*layers)
    both = link(module, model)
    both.push()
    return module, model, both


def _replace(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor))


TORCH: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (
        lambda m: _replace(m[0], "weight", torch.ones(5, 3)),
        r"'0\.weight' had shape \(4, 3\) and has \(5, 3\) now",
    ),
    "shape of data": (lambda m: setattr(m[0].bias, "data", torch.ones(2, 2)), r"'0\.bias' had shape \(4,\)"),
    "dtype": (lambda m: m[0].half(), r"'0\.weight' had dtype torch.float32 and has torch.float16 now"),
    "removed": (lambda m: delattr(m[0], "bias"), r"parameter or buffer '0\.bias' was removed"),
    "set to None": (lambda m: setattr(m[0], "bias", None), r"parameter or buffer '0\.bias' was removed"),
    "buffer removed": (lambda m: delattr(m[1], "running_mean"), r"'1\.running_mean' was removed"),
    "parameter added": (
        lambda m: m[0].register_parameter("scale", nn.Parameter(torch.ones(1))),
        r"parameter or buffer '0\.scale' was added",
    ),
    "module added": (lambda m: m.append(nn.Linear(2, 2)), r"module '4' was added"),
    "module removed": (lambda m: m.pop(3), r"module '3' was removed"),
    "module replaced": (lambda m: m.__setitem__(0, nn.Linear(3, 4)), r"module '0' was replaced"),
}


@pytest.mark.parametrize("change", TORCH)
def test_a_torch_module_that_has_changed_is_named(change: str) -> None:
    module, model, both = _models()
    kernel = model.layers[2].kernel.get_value()
    make, message = TORCH[change]
    make(module)
    for call in (both.push, both.pull):
        with pytest.raises(PlanError, match=message) as caught:
            call()
        assert "link(module, model, ...)" in str(caught.value)
    assert model.layers[2].kernel.get_value() is kernel


class _Equal(nn.Linear):
    """A layer that equals every other of its class, as a dataclass with the same settings does."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Equal)

    __hash__ = nn.Module.__hash__


def test_a_torch_module_that_is_replaced_by_an_equal_one_is_named() -> None:
    module = nn.Sequential(_Equal(3, 4))
    both = link(module, nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0))))
    both.push()
    module[0] = _Equal(3, 4)
    for call in (both.push, both.pull):
        with pytest.raises(PlanError, match=r"module '0' was replaced"):
            call()


FLAX: dict[str, tuple[Callable[[Any], Any], str]] = {
    "removed": (
        lambda m: setattr(m.layers[0], "bias", None),
        r"Variable 'layers\.0\.bias' was removed",
    ),
    "added": (
        lambda m: setattr(m.layers[0], "scale", nnx.Param(jnp.ones(2))),
        r"Variable 'layers\.0\.scale' was added",
    ),
    "module removed": (lambda m: m.layers.pop(3), r"Variable 'layers\.3\.kernel' was removed"),
    "module added": (
        lambda m: m.layers.append(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        r"Variable 'layers\.4\.kernel' was added",
    ),
    "another shape": (
        lambda m: setattr(m.layers[0], "bias", nnx.Param(jnp.ones(5))),
        r"Variable 'layers\.0\.bias' had shape \(4,\) and has \(5,\) now",
    ),
}


@pytest.mark.parametrize("changed_only", [False, True])
@pytest.mark.parametrize("change", FLAX)
def test_an_nnx_module_that_has_changed_is_named(change: str, changed_only: bool) -> None:
    module, model, both = _models()
    if changed_only:
        both = link(module, model, changed_only=True)
        both.push()
    weight = module[2].weight.detach().clone()
    make, message = FLAX[change]
    make(model)
    for call in (both.push, both.pull):
        with pytest.raises(PlanError, match=message):
            call()
    assert torch.equal(module[2].weight, weight)


class _Settings(nnx.Module):
    """Equal to all of its kind, as a dataclass is to those of its settings."""

    def __init__(self, seed: int) -> None:
        self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(seed))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Settings)

    __hash__ = nnx.Module.__hash__


@pytest.mark.parametrize("changed_only", [False, True])
def test_a_part_of_flax_that_an_equal_one_replaced_is_followed(changed_only: bool) -> None:
    module = nn.ModuleDict({"part": nn.ModuleDict({"linear": nn.Linear(3, 4)})})
    model = nnx.Dict(part=_Settings(0))
    both = link(module, model, changed_only=changed_only)
    both.push()
    model.part = _Settings(1)
    both.push()
    assert np.array_equal(model.part.linear.kernel[...].T, module["part"]["linear"].weight.detach())


def _conv(kind: Any, **settings: Any) -> nnx.Sequential:
    return nnx.Sequential(kind(4, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0), **settings))


@pytest.mark.parametrize("verb", ["push", "pull"])
@pytest.mark.parametrize("changed_only", [False, True])
def test_a_layer_of_flax_that_lies_otherwise_is_named_each_time(verb: str, changed_only: bool) -> None:
    model = _conv(nnx.Conv)
    both = link(nn.Sequential(nn.Conv2d(4, 4, 3)), model, changed_only=changed_only)
    both.push()
    before = model.layers[0]
    model.layers[0] = _conv(nnx.ConvTranspose).layers[0]
    for _ in range(2):
        with pytest.raises(
            PlanError, match=r"(?s)go on with this link.*'0' \(Conv2d\) cannot fill 'layers\.0'"
        ):
            getattr(both, verb)()
    model.layers[0] = before
    getattr(both, verb)()


def test_a_setting_of_flax_that_changes_the_layout_is_named_and_others_are_followed() -> None:
    module, model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), _conv(nnx.ConvTranspose)
    both = link(module, model)
    model.layers[0].precision = "highest"
    both.push()
    model.layers[0].transpose_kernel = True
    for _ in range(2):
        with pytest.raises(PlanError, match=r"'layers\.0\.kernel' is laid out otherwise now"):
            both.push()


def test_settings_that_come_and_go_are_planned_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    make_plan = _make_link.make_plan
    monkeypatch.setattr(_make_link, "make_plan", lambda *given: plans.append(1) or make_plan(*given))
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1))
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(0)))
    both = link(module, model)
    for _ in range(5):
        model.eval()
        both.push()
        model.train()
        both.push()
    assert len(plans) <= 3


def test_a_class_of_torch_that_changed_is_named() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3))
    both = link(module, _conv(nnx.Conv))
    module[0].__class__ = nn.ConvTranspose2d
    with pytest.raises(PlanError, match="a Conv2d has become a ConvTranspose2d"):
        both.push()


@pytest.mark.parametrize("changed_only", [False, True])
@pytest.mark.parametrize("verb", ["push", "pull"])
def test_a_parameter_that_was_none_is_named(verb: str, changed_only: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 4, bias=False))
    model = nnx.Sequential(nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0)))
    both = link(module, model, changed_only=changed_only)
    both.push()
    module[0].bias = nn.Parameter(torch.ones(4))
    with pytest.raises(PlanError, match=r"parameter or buffer '0\.bias' was added"):
        getattr(both, verb)()


def test_new_dicts_of_parameters_are_followed() -> None:
    module, model = nn.Sequential(nn.Linear(3, 4)), nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    both = link(module, model)
    both.push()
    module[0].__setstate__(copy.deepcopy(module[0].__dict__))
    with torch.no_grad():
        module[0].weight.fill_(7)
    both.push()
    assert np.array_equal(model.layers[0].kernel[...], np.full((3, 4), 7))
    model.layers[0].kernel[...] = jnp.full((3, 4), 8.0)
    both.pull()
    assert module[0].weight.eq(8).all()
    module[0].__setstate__(
        {"_parameters": {"weight": nn.Parameter(torch.ones(5, 3)), "bias": module[0].bias}}
    )
    for call in (both.push, both.pull):
        with pytest.raises(PlanError, match=r"'0\.weight' had shape \(4, 3\) and has \(5, 3\) now"):
            call()


def test_a_hook_that_changes_the_state_dict_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 4))
    module._register_state_dict_hook(
        lambda module, state, *_: state.update({k: v * 2 for k, v in state.items()})
    )
    with pytest.raises(PlanError, match=r"cannot link '0\.weight'.*a hook makes it"):
        link(module, nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda weight: nn.Parameter(weight.detach().to_sparse()), "a sparse tensor"),
        (lambda weight: nn.UninitializedParameter(), "not initialized"),
    ],
)
def test_a_tensor_without_dense_values_is_named(make: Any, what: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4))
    both = link(module, nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0))))
    module[0].weight = make(module[0].weight)
    for call in (both.push, both.pull):
        with pytest.raises(PlanError, match=f"'0.weight' is {what}"):
            call()


def test_a_number_in_the_place_of_an_array_is_named() -> None:
    _, model, both = _models()
    model.layers[0].bias.set_value(1.0)
    with pytest.raises(PlanError, match=r"'layers\.0\.bias' is a float in Flax, not an array"):
        both.pull()


def test_a_value_of_another_shape_is_named() -> None:
    _, model, both = _models()
    model.layers[0].bias.set_value(jnp.ones(5))
    with pytest.raises(PlanError, match=r"'layers\.0\.bias' had shape \(4,\) in Flax and has \(5,\) now"):
        both.pull()


def test_a_tree_of_another_structure_is_named() -> None:
    module = nn.Linear(3, 4)
    tree = {"params": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    both = link(module, tree)
    with pytest.raises(PlanError, match=r"leaf 'params\.bias' was removed"):
        both.pull({"params": {"kernel": jnp.ones((3, 4))}})
    with pytest.raises(PlanError, match=r"leaf 'params\.scale' was added"):
        both.pull({"params": {**tree["params"], "scale": jnp.ones(4)}})
    with pytest.raises(PlanError, match=r"'params\.kernel' had shape \(3, 4\) in Flax and has \(4, 3\) now"):
        both.pull({"params": {**tree["params"], "kernel": jnp.ones((4, 3))}})
    both.pull({**tree, "cache": {"index": jnp.zeros(())}})  # the collection of a run
    assert module.weight.eq(1).all()


def test_changes_that_leave_the_plan_right_are_followed() -> None:
    module, model, both = _models()
    _replace(module[0], "weight", torch.full((4, 3), 2.0))
    module[0].bias.data = torch.full((4,), 3.0)
    module[1].register_buffer("scratch", torch.ones(2), persistent=False)
    module.eval()
    model.layers[0].bias = nnx.Param(jnp.zeros(4))
    model.note = "a setting"
    model.layers[0].sown = nnx.Intermediate(jnp.ones(2))
    assert both.push() is model
    expected = to_flax(module, model)
    for one, other in zip(model.layers, expected.layers, strict=True):
        assert np.array_equal(one.bias[...], other.bias[...])
    assert np.array_equal(model.layers[0].kernel[...], np.full((3, 4), 2.0))
    both.pull()
    assert module[0].bias.eq(3).all()


@pytest.mark.parametrize("changed_only", [False, True])
def test_a_tie_that_was_cut_is_named(changed_only: bool) -> None:
    def pair(kind: Any, linear: Any) -> Any:
        both = kind()
        both.first, both.second = linear(), linear()
        return both

    module = pair(nn.Module, lambda: nn.Linear(3, 3, bias=False))
    model = pair(nnx.Module, lambda: nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0)))
    module.second.weight = module.first.weight
    model.second.kernel = model.first.kernel
    both = link(module, model, changed_only=changed_only)
    both.push()
    _replace(module.first, "weight", torch.ones(3, 3))
    module.second.weight = module.first.weight
    both.push()
    assert model.second.kernel[...].sum() == 9
    _replace(module.second, "weight", torch.zeros(3, 3))
    for call in (both.push, both.pull):
        with pytest.raises(PlanError, match=r"'second\.weight' was the same tensor as 'first\.weight'"):
            call()


def test_one_error_names_every_change() -> None:
    module, _, both = _models()
    module.append(nn.Linear(1, 1))
    del module[0].bias
    with pytest.raises(PlanError) as caught:
        both.push()
    assert "module '4' was added" in str(caught.value)
    assert "'0.bias' was removed" in str(caught.value)


def test_only_a_live_module_can_be_linked() -> None:
    module = nn.Linear(3, 4)
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="For a state_dict use to_flax"):
        link(module.state_dict(), model)  # type: ignore[arg-type]
    module.register_state_dict_post_hook(
        lambda _, state, prefix, __: state.update({prefix + "bias": state.pop(prefix + "bias")})
    )
    assert link(module, model).push() is model
    renamed = nn.Linear(3, 4, bias=False)
    renamed.register_state_dict_post_hook(
        lambda _, state, prefix, __: state.update({prefix + "bias": torch.ones(4)})
    )
    without = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    without.use_bias = False
    with pytest.raises(PlanError, match="a hook makes it"):
        link(renamed, without)


def test_an_abstract_module_with_random_streams_is_refused() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.rngs = nnx.Rngs(1)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

    with pytest.raises(PlanError, match=r"rngs.*is a random stream without a value"):
        link(Module(), nnx.eval_shape(Model))
    assert isinstance(link(Module(), Model()), Link)


def test_a_link_is_printed_and_its_plan_too() -> None:
    _, _, both = _models()
    assert repr(both) == "Link(10 moves, nnx)"
    assert "0.weight" in str(both.plan)
