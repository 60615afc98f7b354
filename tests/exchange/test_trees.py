import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge.errors import (
    DeviceError,
    DtypeError,
    ExchangeError,
    NarrowingError,
    ShareError,
    UnsupportedLeafError,
)
from torchjax_bridge.exchange import _tensors, to_jax, to_torch

Pair = collections.namedtuple("Pair", ["first", "second"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object
    bias: object
    name: str = dataclasses.field(default="dense", metadata={"static": True})


def test_every_pytree_crosses_and_keeps_its_structure():
    tensors = [torch.full((16,), float(i)) for i in range(8)]
    tree = {
        "dict": {"b": tensors[0], "a": tensors[1]},
        "list": [tensors[2], None, ()],
        "tuple": (tensors[3],),
        "named": Pair(tensors[4], [tensors[5]]),
        "data": Layer(tensors[6], tensors[7], name="out"),
    }
    out = to_jax(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert out["list"][1:] == [None, ()]
    assert out["data"].name == "out"
    assert isinstance(out["named"], Pair)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(out), strict=True):
        assert isinstance(after, jax.Array)
        assert after.unsafe_buffer_pointer() == before.data_ptr()
    back = to_torch(out)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert after.data_ptr() == before.data_ptr()


@pytest.mark.parametrize("empty", [None, {}, [], (), {"a": None, "b": []}])
def test_a_tree_without_leaves_comes_back_equal(empty):
    assert to_jax(empty) == empty
    assert to_torch(empty) == empty


def test_a_state_dict_keeps_type_and_order():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    state = module.state_dict()
    out = to_jax(state)
    assert type(out) is collections.OrderedDict
    assert list(out) == list(state)
    assert list(out) != sorted(out)  # else the order above says nothing
    back = to_torch(out)
    assert list(back) == list(state)
    assert back["1.num_batches_tracked"].dtype is torch.int32  # x64 is off
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor)


def test_a_state_dicts_fault_is_named_by_its_key():
    state = torch.nn.Sequential(torch.nn.Linear(4, 3)).double().state_dict()
    with pytest.raises(DtypeError, match=r"'0\.weight'"):
        to_jax(state)


def test_dicts_with_integer_keys_cross():
    out = to_jax({3: torch.ones(2), 1: torch.zeros(2)})
    assert set(out) == {1, 3}
    assert out[3].tolist() == [1.0, 1.0]
    with pytest.raises(UnsupportedLeafError, match=r"'3\.x'"):
        to_jax({3: {"x": object()}})


def test_defaultdicts_keep_their_factory():
    out = to_jax(collections.defaultdict(list, {"a": torch.ones(2)}))
    assert type(out) is collections.defaultdict
    assert out["new"] == []


def test_dict_keys_that_do_not_sort_raise():
    with pytest.raises(UnsupportedLeafError, match=r"flatten this dict.*keys must sort"):
        to_jax({"a": torch.ones(2), 1: torch.ones(2)})
    with pytest.raises(UnsupportedLeafError, match=r"flatten this dict.*keys must sort"):
        to_torch({"a": jnp.ones(2), 1: jnp.ones(2)})


@dataclasses.dataclass
class Unregistered:
    weight: object


class Config(dict):
    pass


NO_PYTREES = {
    "dataclass": (Unregistered(torch.ones(2)), r"Unregistered.*register_dataclass.*vars\(it\)"),
    "subclass of dict": (Config(a=torch.ones(2)), r"Config.*dict\(it\)"),
    "UserDict": (collections.UserDict(a=torch.ones(2)), r"UserDict.*dict\(it\)"),
    "generator": (torch.nn.Linear(2, 2).parameters(), r"generator.*list\(it\)"),
    "dict values": ({"a": torch.ones(2)}.values(), r"dict_values.*list\(it\)"),
    "set": ({torch.ones(2)}, r"a set.*list\(it\)"),
}


@pytest.mark.filterwarnings("ignore:Python iterable type:DeprecationWarning")
@pytest.mark.parametrize(("container", "fix"), NO_PYTREES.values(), ids=NO_PYTREES)
def test_a_container_that_jax_does_not_flatten_is_refused_with_advice(container, fix):
    for cross in (to_jax, to_torch):
        with pytest.raises(UnsupportedLeafError, match=rf"'x\.0'.*{fix}"):
            cross({"x": [container]})


def test_an_object_that_is_no_pytree_is_a_leaf_that_cannot_cross():
    class Box:
        def __init__(self):
            self.tensor = torch.ones(2)

    with pytest.raises(UnsupportedLeafError, match=r"'box'.*Box"):
        to_jax({"box": Box()})


@pytest.mark.parametrize("copy", [None, True])
def test_one_tensor_twice_becomes_one_array(copy):
    tensor = torch.ones(16)
    out = to_jax({"a": tensor, "b": [tensor], "c": torch.ones(16)}, copy=copy)
    assert out["a"] is out["b"][0]
    assert out["a"] is not out["c"]


@pytest.mark.parametrize("copy", [None, True])
def test_one_array_twice_becomes_one_tensor(copy):
    array = jnp.ones(16)
    out = to_torch({"a": array, "b": [array], "c": jnp.ones(16)}, copy=copy)
    assert out["a"] is out["b"][0]
    assert out["a"] is not out["c"]


def test_tied_weights_stay_tied_through_a_round_trip():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    tree = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    tree["b.weight"] = tree["a.weight"]
    out = to_jax(tree)
    assert out["a.weight"] is out["b.weight"]
    assert out["a.bias"] is not out["b.bias"]


def test_two_views_of_one_storage_stay_two_arrays_on_one_memory():
    base = torch.zeros(64)
    out = to_jax({"all": base, "matrix": base.view(8, 8), "head": base[:16]})
    base.fill_(3)
    assert out["all"].tolist() == [3.0] * 64
    assert out["matrix"][7].tolist() == [3.0] * 8
    assert out["head"].tolist() == [3.0] * 16
    copied = to_jax({"all": base, "matrix": base.view(8, 8)}, copy=True)
    base.fill_(4)
    assert copied["all"].tolist() == [3.0] * 64
    assert copied["matrix"][0].tolist() == [3.0] * 8


def test_leaves_of_the_target_framework_pass_through():
    array, tensor = jnp.ones(3), torch.ones(3, requires_grad=True)
    assert to_jax({"a": array, "b": torch.zeros(2)})["a"] is array
    assert to_torch({"a": tensor, "b": jnp.zeros(2)})["a"] is tensor


def test_one_fault_is_raised_as_itself_with_its_path():
    with pytest.raises(NarrowingError, match=r"'a\.0'.*4294967296") as caught:
        to_jax({"a": [torch.tensor(2**32)], "b": torch.ones(2)})
    assert caught.value.faults == ()


def test_all_faults_are_gathered_in_the_order_of_the_leaves():
    tree = {
        "d": torch.tensor(2**40),
        "a": torch.ones(2, dtype=torch.float64),
        "b": [torch.ones(2), torch.ones(2, requires_grad=True), object()],
    }
    with pytest.raises(ExchangeError, match="4 leaves cannot cross") as caught:
        to_jax(tree)
    kinds = [type(fault) for fault in caught.value.faults]
    assert kinds == [DtypeError, UnsupportedLeafError, UnsupportedLeafError, NarrowingError]
    for name, fault in zip(("'a'", "'b.1'", "'b.2'", "'d'"), caught.value.faults, strict=True):
        assert name in str(fault)
        assert str(fault) in str(caught.value)
    assert type(caught.value) is DtypeError
    assert caught.value.__cause__ is None


def test_the_same_faulty_leaf_is_named_at_each_of_its_places():
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedLeafError) as caught:
        to_jax({"a": leaf, "b": leaf})
    assert [str(fault).split("'")[1] for fault in caught.value.faults] == ["a", "b"]


def test_copy_false_faults_name_every_leaf_that_cannot_be_shared():
    with pytest.raises(ShareError, match="2 leaves cannot cross") as caught:
        to_jax([torch.ones(8)[1:], torch.ones(16), torch.ones(8)[::2]], copy=False)
    assert [str(fault).split("'")[1] for fault in caught.value.faults] == ["0", "2"]


def test_an_array_fault_in_a_tree_is_named():
    with pytest.raises(DtypeError, match=r"'x\.1'.*int4"):
        to_torch({"x": (jnp.ones(2), jnp.ones(2, jnp.int4))})


def test_the_device_applies_to_every_leaf():
    device = jax.devices("cpu")[3]
    out = to_jax({"a": torch.ones(3), "b": [jnp.ones(3)]}, device=device)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(out))
    back = to_torch(out, device="cpu")
    assert all(leaf.device == torch.device("cpu") for leaf in jax.tree.leaves(back))


def test_copy_true_of_a_tree_aliases_nothing():
    tree = {"a": torch.ones(64), "b": jnp.ones(64)}
    out = to_jax(tree, copy=True)
    tree["a"].zero_()
    to_torch(tree["b"]).zero_()
    assert all(np.asarray(leaf).tolist() == [1.0] * 64 for leaf in jax.tree.leaves(out))


def test_a_thousand_leaves_cross_without_a_copy():
    state = {f"layers.{i}.weight": torch.full((4, 16), float(i)) for i in range(1000)}
    out = to_jax(state, copy=False)
    assert all(out[k].unsafe_buffer_pointer() == v.data_ptr() for k, v in state.items())
    back = to_torch(out, copy=False)
    assert all(back[k].data_ptr() == v.data_ptr() for k, v in state.items())


def test_none_stays_none_and_is_no_leaf():
    assert to_jax({"w": torch.ones(2), "b": None})["b"] is None
    assert to_torch((None, jnp.ones(2)))[0] is None


def test_a_pytree_with_a_custom_node_crosses():
    @jax.tree_util.register_pytree_node_class
    class Bag:
        def __init__(self, items, label):
            self.items, self.label = items, label

        def tree_flatten(self):
            return (self.items,), self.label

        @classmethod
        def tree_unflatten(cls, label, children):
            return cls(children[0], label)

    out = to_jax(Bag([torch.ones(2)], "x"))
    assert out.label == "x"
    assert isinstance(out.items[0], jax.Array)


def test_the_input_tree_is_not_changed():
    tensor = torch.ones(2)
    tree = {"a": [tensor]}
    to_jax(tree)
    assert tree["a"][0] is tensor


@pytest.mark.parametrize("tree", [{}, None, {"a": torch.ones(2), "b": [torch.ones(2)]}], ids=str)
def test_wrong_options_raise_once_for_any_tree(tree):
    for cross in (to_jax, to_torch):
        with pytest.raises(DeviceError, match=r"^'nope' is no device"):
            cross(tree, device="nope")
        with pytest.raises(TypeError, match=r"copy must be"):
            cross(tree, copy="nope")


def test_a_device_that_cannot_hold_values_raises_with_the_leaf():
    with pytest.raises(DeviceError, match=r"'w\.0'.*meta"):
        to_torch({"w": [jnp.ones(3)]}, device="meta")


def test_a_leaf_on_a_device_that_the_other_side_does_not_see_is_named(monkeypatch):
    def unseen(_):
        raise DeviceError("does not see it")

    monkeypatch.setattr(_tensors, "jax_device", unseen)
    with pytest.raises(DeviceError, match=r"'w\.0' with JAX: does not see it"):
        to_jax({"w": [torch.ones(8)]}, copy=True)
    monkeypatch.setattr(_tensors, "torch_device", unseen)
    with pytest.raises(DeviceError, match=r"'w\.0' with torch: does not see it"):
        to_torch({"w": [jnp.ones(3)]}, copy=True)
