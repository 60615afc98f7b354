"""What a link would get silently wrong is made right or refused, and an error leaves both models as they were."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import nn

from torchjax_bridge import link, to_flax, to_jax
from torchjax_bridge.errors import ExchangeError, PlanError, TransformError
from torchjax_bridge.weights.linking import Link


def _pair(width: int = 4) -> tuple[Any, Any]:
    module = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    rngs = nnx.Rngs(0)
    return module, nnx.Sequential(nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs))


# --- memory that both sides use -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 600])  # one plain copy, or slabs
def test_an_array_in_the_memory_of_its_own_target_is_read_before_it_is_written(width: int) -> None:
    module, model = _pair(width)
    both = link(module, model)
    weight = module[0].weight.detach()
    model.layers[0].kernel.set_value(to_jax(weight, copy=False))  # not transposed
    before = weight.clone()
    both.pull()
    assert torch.equal(weight, before.t())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shared_arrays_that_changed_places_are_read_before_they_are_written(order: tuple[int, int]) -> None:
    module, model = _pair()
    both = link(module, model, share=True)
    both.push()
    first, second = (model.layers[place] for place in order)
    was = first.bias[...], second.bias[...]
    expected = [np.array(array) for array in was]
    second.bias.set_value(was[0])
    first.bias.set_value(jnp.ones(4))
    both.pull()
    assert np.array_equal(module[order[1]].bias.detach(), expected[0])
    assert module[order[0]].bias.eq(1).all()


def _freed(module: Any) -> None:
    module[1].bias.untyped_storage().resize_(0)


def _expanded(module: Any) -> None:
    module[1].bias = nn.Parameter(torch.ones(1).expand(4))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_freed, r"'1\.bias' has no memory"),
        (_expanded, r"'1\.bias' has several elements that are one in memory"),
    ],
)
def test_a_tensor_that_cannot_be_written_to_leaves_all_as_they_were(
    spoil: Callable[[Any], None], message: str
) -> None:
    module, model = _pair()
    both = link(module, model)
    spoil(module)
    weight, kernel = module[0].weight.detach().clone(), model.layers[0].kernel[...]
    with pytest.raises(PlanError, match=message):
        both.pull()
    assert torch.equal(module[0].weight, weight)
    if spoil is _freed:
        with pytest.raises(PlanError, match=message):
            both.push()
        assert model.layers[0].kernel[...] is kernel
    else:
        both.push()
        assert model.layers[1].bias[...].tolist() == [1, 1, 1, 1]


def test_a_meta_module_is_neither_pushed_nor_pulled_to() -> None:
    module, model = _pair()
    both = link(module.to("meta"), model)
    for call in (both.push, both.pull):
        with pytest.raises(PlanError, match=r"'0\.weight' has no memory"):
            call()


# --- transforms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_nothing_moves_while_jax_traces(verb: str) -> None:
    module, model = _pair()
    linear = nn.Linear(4, 4)
    variables = {"params": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    of_module, of_tree = link(module, model), link(linear, variables)
    calls = (
        getattr(of_module, verb),
        of_tree.push if verb == "push" else lambda: of_tree.pull(variables),
    )
    for call in calls:
        with pytest.raises(TransformError, match=f"cannot {verb} while JAX traces"):
            jax.jit(lambda x, call=call: (call(), x)[1])(1.0)
        call()


@pytest.mark.parametrize(
    "transform", [jax.grad, lambda f: lambda x: jax.vmap(f)(x[None])], ids=["grad", "vmap"]
)
@pytest.mark.parametrize("verb", ["push", "pull"])
def test_nothing_moves_inside_a_transform_that_runs_at_once(verb: str, transform: Any) -> None:
    both = link(*_pair())
    with pytest.raises(TransformError, match=f"cannot {verb} while JAX traces"):
        transform(lambda x: (getattr(both, verb)(), x)[1])(jnp.ones(()))


# --- what a run leaves --------------------------------------------------------------------------------------


class _Sows(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def run(self) -> None:
        """Leave what ``self.sow`` leaves: a tuple that grows."""
        seen = self.seen.get_value() if hasattr(self, "seen") else ()
        self.seen = nnx.Intermediate((*seen, self.linear(jnp.ones((1, 4)))))


def test_what_a_model_has_sown_is_left_alone() -> None:
    module, model = nn.ModuleDict({"linear": nn.Linear(4, 4)}), _Sows()
    both = link(module, model)
    for _ in range(2):
        model.run()
        both.push()
        both.pull()
    assert len(model.seen.get_value()) == 2
    filled = to_flax(module, model)
    assert np.array_equal(filled.linear.kernel[...], model.linear.kernel[...])
    assert np.array_equal(filled.seen.get_value()[1], model.seen.get_value()[1])
    assert link(module, model).push() is model


def test_what_linen_has_sown_is_left_alone() -> None:
    module = nn.Linear(4, 4)
    variables = {"params": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    sown = {**variables, "intermediates": {"seen": (jnp.ones(3), jnp.ones(2))}}
    link(module, variables).pull(sown)
    assert module.weight.eq(1).all()
    filled = to_flax(module, sown)
    assert [len(one) for one in filled["intermediates"]["seen"]] == [3, 2]


def test_an_array_of_the_link_that_was_donated_is_named() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    both = link(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nnx.split(model)[1])
    jax.jit(lambda state: jax.tree.map(lambda x: x, state), donate_argnums=0)(both.push())
    with pytest.raises(PlanError, match=r"'layers\.1\.rngs.*Donate a copy"):
        both.push()


def test_a_sharded_array_that_was_donated_is_named() -> None:
    module, model = _pair()
    everywhere = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("x",)), PartitionSpec())
    nnx.update(model, jax.device_put(nnx.state(model), everywhere))
    both = link(module, model)
    both.push()
    jax.tree.map(lambda array: array.delete(), nnx.state(model))
    with pytest.raises(ExchangeError, match=r"'layers\.0\.(kernel|bias)'.*deleted array"):
        both.pull()


# --- errors in the middle -------------------------------------------------------------------------------------


class _Halved(nnx.Param[Any]):
    """Holds half of its value, and refuses when it is told to."""

    refusing = False

    def get_value(self, **_: Any) -> Any:
        return self.get_raw_value() * 2

    def set_value(self, value: Any, **_: Any) -> None:
        if self.refusing:
            raise RuntimeError("no")
        self.set_raw_value(value / 2)


def test_a_variable_that_overloads_its_verbs_is_read_and_set_by_them() -> None:
    module, model = _pair()
    model.layers[1].bias = _Halved(jnp.zeros(4))
    both = link(module, model)
    both.push()
    bias = module[1].bias.detach().clone()
    for filled in (model, to_flax(module, model)):
        assert np.array_equal(filled.layers[1].bias.get_raw_value() * 2, bias)
    with torch.no_grad():
        module[1].bias.zero_()
    both.pull()
    assert torch.equal(module[1].bias, bias)


def test_a_variable_that_refuses_its_value_leaves_all_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    module, model = _pair()
    model.layers[1].bias = _Halved(jnp.zeros(4))
    both = link(module, model)
    both.push()
    held = model.layers[0].kernel[...], model.layers[1].bias.get_raw_value()
    monkeypatch.setattr(_Halved, "refusing", True)
    with pytest.raises(RuntimeError, match="no"):
        both.push()
    assert model.layers[0].kernel[...] is held[0]
    assert model.layers[1].bias.get_raw_value() is held[1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_link_is_not_copied(duplicate: Callable[[Link], Any]) -> None:
    with pytest.raises(TypeError, match="two live models"):
        duplicate(link(*_pair()))


# --- frozen -----------------------------------------------------------------------------------------------------


def test_a_function_of_what_is_frozen_sees_the_tensors_of_the_module() -> None:
    module, model = _pair()
    module[0].requires_grad_(False)
    both = link(module, model, frozen=lambda _, tensor: not tensor.requires_grad)
    assert set(both.plan.torch_only) == {"0.weight", "0.bias"}


def test_a_tied_tensor_is_frozen_by_all_its_names_or_by_none() -> None:
    module, model = _pair()
    module[1].weight = module[0].weight
    with pytest.raises(PlanError, match=r"'0\.weight' is frozen and '1\.weight' is not.*one tensor"):
        link(module, model, frozen="0.weight")
    both = link(module, model, frozen="*.weight")
    before = module[0].weight.detach().clone()
    both.push()
    both.pull()
    assert torch.equal(module[0].weight, before)
    model.layers[1].kernel = model.layers[0].kernel  # one leaf in Flax too
    with pytest.raises(PlanError, match=r"'1\.weight' is frozen and '0\.weight' is not"):
        link(module, model, frozen="1.weight")
    assert len(link(module, model, frozen="*.weight").plan.moves) == 2


@pytest.mark.parametrize("frozen", ["", "*", lambda *_: True])
def test_a_link_that_would_move_nothing_is_refused(frozen: Any) -> None:
    with pytest.raises(PlanError, match="would move nothing"):
        link(*_pair(), frozen=frozen)


@pytest.mark.parametrize("frozen", [3, [lambda *_: True], [None]])
def test_what_is_no_name_cannot_be_frozen(frozen: Any) -> None:
    with pytest.raises(TypeError, match="is no name"):
        link(*_pair(), frozen=frozen)


def test_float64_crosses_if_it_is_cast() -> None:
    module, model = _pair()
    module.double()
    both = link(module, model, dtype=jnp.bfloat16)
    both.push()
    assert np.array_equal(model.layers[0].kernel[...], module[0].weight.detach().t().bfloat16().float())
    both.pull()
    assert module[0].weight.dtype is torch.float64
    with pytest.raises(PlanError, match="needs x64"):
        link(module, model)


# --- elements that several tensors hold -----------------------------------------------------------------


class _Held(nn.Module):
    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)


class _Twin(nnx.Module):
    def __init__(self, module: _Held) -> None:
        self.first, self.second = (nnx.Param(jnp.zeros(one.shape)) for one in (module.first, module.second))


_SHARING: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "a transpose": lambda base: (base.view(3, 4), base.view(3, 4).t()),
    "a part": lambda base: (base[:8], base[4:12]),
    "a beginning": lambda base: (base, base[:4]),
}


@pytest.mark.parametrize("kind", _SHARING)
def test_an_element_of_two_tensors_is_pulled_if_it_gets_one_value(kind: str) -> None:
    module = _Held(*_SHARING[kind](torch.arange(12.0)))
    model = _Twin(module)
    both = link(module, model)
    both.push()
    both.pull()
    assert torch.equal(module.first.detach().reshape(-1), torch.arange(12.0)[: module.first.numel()])
    model.second.set_value(model.second[...] + 1)
    with pytest.raises(PlanError, match="'first' and 'second' share memory in torch"):
        both.pull()
    assert torch.equal(module.first.detach().reshape(-1), torch.arange(12.0)[: module.first.numel()])


def test_tensors_whose_elements_alternate_in_memory_share_none() -> None:
    base = torch.arange(12.0)
    module = _Held(base[::2], base[1::2])
    model = _Twin(module)
    both = link(module, model)
    both.push()
    model.second.set_value(-model.second[...])
    both.pull()
    assert torch.equal(base, torch.tensor([0.0, -1, 2, -3, 4, -5, 6, -7, 8, -9, 10, -11]))


def test_a_tensor_that_holds_an_element_twice_is_refused() -> None:
    module = _Held(torch.arange(6.0).as_strided((4, 3), (1, 1)), torch.ones(2))
    both = link(module, _Twin(module))
    both.push()
    with pytest.raises(PlanError, match="'first' has several elements that are one in memory"):
        both.pull()


def test_a_large_parameter_with_the_negative_bit_is_written() -> None:
    module, model = _pair(600)
    both = link(module, model)
    module[1].weight = nn.Parameter(torch._neg_view(torch.zeros(600, 600)))
    both.pull()
    written = module[1].weight.detach().resolve_neg().numpy()
    assert np.array_equal(written, np.asarray(model.layers[1].kernel[...]).T)
