"""A link pushes and pulls the same bits as a conversion, in place, and leaves old arrays as they were."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import core, nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import nn

from tests.weights.models import linen_variables, net, nnx_net
from torchjax_bridge import link, to_flax, to_state_dict
from torchjax_bridge.errors import NarrowingError, PlanError
from torchjax_bridge.weights import Fill, Flatten

FLATTEN = [Flatten("fc1", (4, 2, 2))]


def _arrays(model: Any) -> list[np.ndarray]:
    """Every array but the keys of random streams."""
    leaves = jax.tree.leaves(nnx.state(model) if isinstance(model, nnx.Module) else model)
    return [np.asarray(leaf) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


def _same(one: Any, other: Any) -> bool:
    pairs = zip(_arrays(one), _arrays(other), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def _disturb(module: nn.Module) -> None:
    """Write to every tensor in place, as an optimizer and a training step do."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(1)


def _pair() -> tuple[nn.Module, nnx.Module]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rngs = nnx.Rngs(0)
    return module, nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))


# --- push ---------------------------------------------------------------------------------------------


def test_every_push_gives_what_a_new_conversion_gives() -> None:
    module, model = net(), nnx_net()
    both = link(module, model, rules=FLATTEN)
    for _ in range(3):
        _disturb(module)
        assert both.push() is model
        assert _same(model, to_flax(module, model, rules=FLATTEN))


@pytest.mark.parametrize("frozen_dict", [False, True])
def test_linen_and_states_get_a_new_tree_each_time(frozen_dict: bool) -> None:
    module = net()
    variables = linen_variables()
    variables = core.freeze(variables) if frozen_dict else variables
    state = nnx.state(nnx_net())
    for tree in (variables, state, jax.eval_shape(lambda: variables)):
        before = None if tree is not variables else _arrays(tree)
        both = link(module, tree, rules=FLATTEN)
        first = both.push()
        _disturb(module)
        second = both.push()
        assert type(second) is type(tree)
        assert _same(second, to_flax(module, tree, rules=FLATTEN))
        assert not _same(first, second)
        assert before is None or all(map(np.array_equal, before, _arrays(tree)))


def test_an_abstract_module_is_filled() -> None:
    module, model = _pair()
    abstract = nnx.eval_shape(lambda: _pair()[1])
    assert link(module, abstract).push() is abstract
    assert _same(abstract, to_flax(module, model))


def test_pushes_trace_nothing_again_and_optimizers_go_on() -> None:
    module, model = _pair()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = 0

    @nnx.jit
    def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        loss, gradients = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    x = jnp.ones((5, 3))
    step(model, optimizer, x)
    variables = {id(variable) for _, variable in nnx.to_flat_state(nnx.state(model))}
    both = link(module, model)
    for _ in range(2):  # the first call has committed weights, the second also has committed moments
        both.push()
        step(model, optimizer, x)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        for _ in range(5):
            _disturb(module)
            both.push()
            reference = float(np.square(module(torch.ones(5, 3)).detach().numpy()).mean())
            assert float(step(model, optimizer, x)) == pytest.approx(reference, rel=1e-5)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert traces == 1
    assert compiled == []
    assert {id(variable) for _, variable in nnx.to_flat_state(nnx.state(model))} == variables


@pytest.mark.every(2)
@pytest.mark.parametrize("large", [False, True])
def test_arrays_that_were_handed_out_keep_their_values_over_100_pushes(large: bool) -> None:
    width = 600 if large else 8  # XLA or torch makes the copies
    module = nn.Linear(width, width)
    model = nnx.Linear(width, width, rngs=nnx.Rngs(0))
    both = link(module, model)
    held: list[tuple[jax.Array, bytes]] = []
    lost: list[weakref.ref[jax.Array]] = []
    for number in range(100):
        with torch.no_grad():
            module.weight.add_(1)
            module.bias.mul_(2)
        both.push()
        kernel = model.kernel.get_value()
        assert kernel.unsafe_buffer_pointer() != module.weight.data_ptr()
        if number % 10 == 0:
            held += [(array, np.asarray(array).tobytes()) for array in (kernel, model.bias.get_value())]
        else:
            lost.append(weakref.ref(kernel))
    # np.asarray is cached by an array; a view by DLPack reads the memory.
    assert all(np.from_dlpack(array).tobytes() == before for array, before in held)
    del kernel
    gc.collect()
    alive = [one for one in lost if one() is not None]
    assert len(alive) <= 1  # the one in the model


def test_memory_stays_flat_over_100_pushes() -> None:
    resource = pytest.importorskip("resource")
    module = nn.Linear(1024, 1024)
    both = link(module, nnx.Linear(1024, 1024, rngs=nnx.Rngs(0)))
    for _ in range(10):
        both.push()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        both.push()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 10 * module.weight.nbytes


def test_all_or_nothing_is_pushed() -> None:
    module, model = net(), nnx_net()
    module.register_buffer("count", torch.tensor(3))
    model.count = nnx.Variable(jnp.int32(0))
    both = link(module, model, rules=FLATTEN, changed_only=True)
    both.push()
    before = _arrays(model)
    _disturb(module)
    module.count.fill_(2**40)
    with pytest.raises(NarrowingError, match="count"):
        both.push()
    assert all(map(np.array_equal, before, _arrays(model)))
    module.count.fill_(4)
    both.push()
    assert _same(model, to_flax(module, model, rules=FLATTEN))


# --- what changed ---------------------------------------------------------------------------------------


def _kernels(model: Any) -> list[jax.Array]:
    return [layer.kernel.get_value() for layer in model.layers]


def test_changed_only_pushes_what_was_written_to() -> None:
    module, model = _pair()
    both = link(module, model, changed_only=True)
    both.push()
    first, second = _kernels(model)
    with torch.no_grad():
        module[1].weight.add_(1)
    both.push()
    assert model.layers[0].kernel.get_value() is first
    assert model.layers[1].kernel.get_value() is not second
    assert _same(model, to_flax(module, model))
    link(module, model).push()
    assert model.layers[0].kernel.get_value() is not first


@pytest.mark.parametrize(
    "write",
    [
        lambda p: setattr(p, "data", p.data + 1),
        lambda p: setattr(p, "data", p.data.t()),
        lambda p: p.detach().mul_(2),
        lambda p: torch.optim.SGD([p], 1.0).step(),
    ],
    ids=["data", "square view", "detach", "optimizer"],
)
def test_changed_only_sees_other_memory_and_other_strides(write: Any) -> None:
    module = nn.Linear(4, 4)
    module.weight.grad = torch.ones(4, 4)
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    both = link(module, model, changed_only=True)
    both.push()
    write(module.weight)
    both.push()
    assert _same(model, to_flax(module, model))


def test_memory_that_is_used_again_does_not_pass_for_unchanged() -> None:
    module = nn.Linear(64, 64)
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    both = link(module, model, changed_only=True)
    both.push()
    for _ in range(20):
        module.weight.data = torch.randn(64, 64)
        module.weight.data = torch.randn(64, 64)
        both.push()
        assert _same(model, to_flax(module, model))


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(64)


class _NormedTwin(nnx.Module):
    def __init__(self) -> None:
        self.bn = nnx.BatchNorm(64, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("of", [lambda model: model, nnx.state], ids=["module", "state"])
def test_changed_only_pushes_the_statistics_that_torch_writes_without_a_version(of: Any) -> None:
    module, model = _Normed(), _NormedTwin()
    both = link(module, of(model), changed_only=True)
    both.push()
    version = module.bn.running_mean._version
    module.bn(torch.randn(2, 64, 5, 5))
    assert module.bn.running_mean._version == version
    pushed = both.push()
    assert np.array_equal(
        pushed.bn.mean[...] if pushed is model else pushed["bn"]["mean"][...], module.bn.running_mean
    )


@pytest.mark.parametrize("in_place", [True, False])
def test_changed_only_does_not_hand_out_arrays_that_were_deleted(in_place: bool) -> None:
    module, model = nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    both = link(module, model if in_place else nnx.state(model), changed_only=True)
    both.push()["kernel"][...].delete() if not in_place else both.push().kernel[...].delete()
    pushed = both.push()
    kernel = pushed.kernel[...] if in_place else pushed["kernel"][...]
    assert np.array_equal(kernel, module.weight.detach().numpy().T)


def test_changed_only_names_another_dtype_at_the_same_address() -> None:
    module = nn.Linear(3, 2).bfloat16()
    both = link(module, nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), changed_only=True)
    both.push()
    module.weight.data = module.weight.data.view(torch.float16)
    with pytest.raises(PlanError, match=r"'weight' had dtype torch.bfloat16 and has torch.float16 now"):
        both.push()


def test_changed_only_gives_back_what_flax_has_changed_itself() -> None:
    module, model = _pair()
    both = link(module, model, changed_only=True)
    both.push()
    pushed = _kernels(model)  # held, so that they live on
    model.layers[0].kernel[...] = jnp.zeros((3, 4))
    both.push()
    assert _same(model, to_flax(module, model))
    assert model.layers[0].kernel.get_value() is not pushed[0]


def test_changed_only_of_a_tree_reuses_the_arrays_of_the_last_push() -> None:
    module, model = _pair()
    both = link(module, nnx.state(model), changed_only=True)
    first = both.push()
    with torch.no_grad():
        module[1].bias.add_(1)
    second = both.push()
    assert second["layers"][0]["kernel"].get_value() is first["layers"][0]["kernel"].get_value()
    assert _same(second, nnx.state(to_flax(module, model)))
    del first, second
    assert _same(both.push(), nnx.state(to_flax(module, model)))


def test_some_writes_raise_no_version_so_a_push_copies_everything_unless_it_is_told_otherwise() -> None:
    module = nn.Linear(4, 4)
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    both = link(module, model, changed_only=True)
    both.push()
    module.weight.data.add_(1)
    both.push()
    assert not _same(model, to_flax(module, model))  # as the documentation warns
    link(module, model).push()
    assert _same(model, to_flax(module, model))


# --- frozen, dtype, sharing, sharding -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "frozen",
    ["0", ["0.weight", "0.bias"], "0.*", lambda key, tensor: key.startswith("0") and tensor.ndim],
    ids=["module", "keys", "pattern", "predicate"],
)
def test_what_is_frozen_is_touched_by_no_push_and_no_pull(frozen: Any) -> None:
    module, model = _pair()
    both = link(module, model, frozen=frozen)
    kernel, weight = model.layers[0].kernel.get_value(), module[0].weight.detach().clone()
    both.push()
    assert model.layers[0].kernel.get_value() is kernel
    assert np.array_equal(model.layers[1].kernel[...], module[1].weight.detach().numpy().T)
    model.layers[1].kernel[...] = jnp.zeros((4, 2))
    both.pull()
    assert torch.equal(module[0].weight, weight)
    assert not module[1].weight.any()
    assert "0.weight" in both.plan.torch_only


def test_a_wrong_frozen_is_refused() -> None:
    module, model = _pair()
    with pytest.raises(PlanError, match=r"did you mean '0\.weight'"):
        link(module, model, frozen="0.weigth")
    with pytest.raises(PlanError, match="one leaf in Flax"):
        link(
            nn.LSTMCell(2, 3),
            nnx.OptimizedLSTMCell(2, 3, rngs=nnx.Rngs(0)),
            frozen=lambda key, _: key == "bias_ih",
        )
    with pytest.raises(PlanError, match="no value to keep"):
        link(module, nnx.eval_shape(lambda: _pair()[1]), frozen="0")


def test_floating_point_values_are_cast_on_the_way_and_back() -> None:
    module, model = net(), nnx_net()
    both = link(module, model, rules=FLATTEN, dtype=jnp.bfloat16)
    both.push()
    expected = to_flax(module, model, rules=FLATTEN)
    for ours, theirs in zip(_arrays(model), _arrays(expected), strict=True):
        assert np.array_equal(ours, theirs.astype(jnp.bfloat16) if theirs.dtype == np.float32 else theirs)
        assert ours.dtype == (jnp.bfloat16 if theirs.dtype == np.float32 else theirs.dtype)
    was = {key: value.clone() for key, value in module.state_dict().items()}
    _disturb(module)
    module.blocks[0].bn1.num_batches_tracked.fill_(9)
    both.pull()
    for key, value in module.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert value.dtype is torch.float32
            assert torch.equal(value, was[key].bfloat16().float())
    assert module.blocks[0].bn1.num_batches_tracked == 9


def test_a_wrong_dtype_is_refused() -> None:
    module, model = _pair()
    with pytest.raises(TypeError, match="no floating-point dtype"):
        link(module, model, dtype=jnp.int32)
    both = link(module, model)
    model.layers[0].kernel.set_value(jnp.zeros((3, 4), jnp.bfloat16))
    with pytest.raises(PlanError, match=r"'0.weight' is torch.float32 in torch and torch.bfloat16.*dtype="):
        both.pull()


def test_leaves_of_one_layout_are_shared_only_if_asked() -> None:
    module, model = _pair()
    both = link(module, model, share=True)
    both.push()
    for torch_layer, layer in zip(module, model.layers, strict=True):
        assert layer.bias.get_value().unsafe_buffer_pointer() == torch_layer.bias.data_ptr()
        assert layer.kernel.get_value().unsafe_buffer_pointer() != torch_layer.weight.data_ptr()
    _disturb(module)
    assert np.array_equal(np.from_dlpack(model.layers[0].bias.get_value()), module[0].bias.detach())
    both.pull()
    link(module, model).push()
    assert model.layers[0].bias.get_value().unsafe_buffer_pointer() != module[0].bias.data_ptr()
    assert _same(model, to_flax(module, model))


def test_sharded_leaves_stay_where_the_template_has_them() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    rows = NamedSharding(mesh, PartitionSpec("model"))
    module, model = nn.Linear(8, 4), nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    model.kernel.set_value(jax.device_put(model.kernel.get_value(), rows))
    both = link(module, model, dtype=jnp.bfloat16)
    for _ in range(2):
        _disturb(module)
        both.push()
        assert model.kernel.get_value().sharding == rows
        assert np.array_equal(
            np.asarray(model.kernel.get_value()), module.weight.detach().t().bfloat16().float()
        )
    with torch.no_grad():
        module.weight.zero_()
    both.pull()
    assert np.array_equal(module.weight.detach().t(), np.asarray(model.kernel.get_value()).astype(np.float32))


# --- pull --------------------------------------------------------------------------------------------------


def _trees(model: Any, kind: str) -> tuple[Any, Any]:
    """A model to link, and what to pull."""
    if kind == "nnx":
        return model, None
    return (state := nnx.state(model)), state


@pytest.mark.parametrize("kind", ["nnx", "state"])
def test_a_pull_writes_into_the_tensors_that_are_there(kind: str) -> None:
    module, model = net(), nnx_net()
    expected = to_state_dict(model, module, rules=FLATTEN)
    tensors = dict(module.state_dict(keep_vars=True))
    versions = {key: tensor._version for key, tensor in tensors.items()}
    linked, values = _trees(model, kind)
    link(module, linked, rules=FLATTEN).pull(values)
    for key, tensor in module.state_dict(keep_vars=True).items():
        assert tensor is tensors[key]
        assert torch.equal(tensor, expected[key])
        if not key.endswith("num_batches_tracked"):
            assert tensor._version > versions[key]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_pull_from_linen_needs_its_variables() -> None:
    module = net()
    variables = linen_variables()
    both = link(module, variables, rules=FLATTEN)
    both.pull(variables)
    expected = to_state_dict(variables, module, rules=FLATTEN)
    assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    with pytest.raises(TypeError, match="pull"):
        both.pull()
    module, model = _pair()
    with pytest.raises(TypeError, match="leave the argument out"):
        link(module, model).pull(nnx.state(model))


def test_large_tensors_of_any_strides_are_pulled_to_the_bit() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        module, model = nn.Linear(700, 600), nnx.Linear(700, 600, rngs=nnx.Rngs(0))
        conv, kernel = nn.Conv2d(64, 80, 3), nnx.Conv(64, 80, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
        conv.to(memory_format=torch.channels_last)
        version = module.weight._version
        link(module, model).pull()
        link(conv, kernel).pull()
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(module.weight.detach().t(), model.kernel[...])
    assert module.weight._version > version
    assert np.array_equal(conv.weight.detach().permute(2, 3, 1, 0), kernel.kernel[...])
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_optimizers_and_autograd_of_torch_go_on_after_a_pull() -> None:
    module, model = _pair()
    both = link(module, model)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for _ in range(2):
        both.pull()
        optimizer.zero_grad()
        module(torch.ones(5, 3)).square().mean().backward()
        before = module[0].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, module[0].weight)
        both.push()
    loss = module(torch.ones(5, 3)).square().mean()
    both.pull()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_pull_back_of_a_push_changes_no_bit() -> None:
    module = nn.LSTMCell(3, 4)  # two biases are one sum in Flax
    model = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
    both = link(module, model)
    was = {key: value.clone() for key, value in module.state_dict().items()}
    both.push()
    both.pull()
    assert all(torch.equal(value, was[key]) for key, value in module.state_dict().items())


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


class _Separate(nnx.Module):
    def __init__(self, *, tied: bool = False) -> None:
        self.first = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(1))
        if tied:
            self.second.kernel = self.first.kernel


def test_a_tied_tensor_is_written_once_and_only_with_one_value() -> None:
    module, model = _Tied(), _Separate()
    both = link(module, model)
    with pytest.raises(PlanError, match=r"'second.weight' is the same tensor as 'first.weight'"):
        both.pull()
    both.push()
    version = module.first.weight._version
    both.pull()
    assert module.first.weight._version == version + 1


def test_a_tie_on_both_sides_stays() -> None:
    module, model = _Tied(), _Separate(tied=True)
    both = link(module, model)
    both.push()
    assert model.first.kernel is model.second.kernel
    version = module.first.weight._version
    model.first.kernel[...] = jnp.eye(3)
    both.pull()
    assert torch.equal(module.second.weight, torch.eye(3))
    assert module.first.weight._version == version + 1


def test_nothing_is_pulled_if_one_leaf_cannot_be() -> None:
    module, model = _pair()
    both = link(module, model)
    was = {key: value.clone() for key, value in module.state_dict().items()}
    model.layers[1].bias.set_value(jnp.zeros(2, jnp.int32))
    with pytest.raises(PlanError, match=r"1\.bias"):
        both.pull()
    assert all(torch.equal(value, was[key]) for key, value in module.state_dict().items())
    with pytest.raises(PlanError, match="has no values: push first"):
        link(module, nnx.eval_shape(lambda: _pair()[1])).pull()


def test_a_constant_that_flax_has_trained_is_refused() -> None:
    module = nn.Linear(3, 4, bias=False)
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    both = link(module, model, rules=[Fill("bias", 0.0)])
    both.push()
    both.pull()
    model.bias[...] = jnp.ones(4)
    with pytest.raises(PlanError, match="'bias' cannot be pulled"):
        both.pull()
