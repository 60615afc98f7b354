"""Classes that only torch knows as pytrees: they cross as nodes and come back as their own class."""

import collections
import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.utils import _pytree

from torchjax_bridge import as_torch_function, to_jax, to_torch


def test_a_return_type_crosses_and_comes_back():
    found = torch.arange(6.0).reshape(2, 3).max(1)
    there = to_jax({"best": found})["best"]
    assert type(there) is torch.return_types.max
    assert isinstance(there.values, jax.Array)
    back = to_torch(there)
    assert type(back) is torch.return_types.max
    assert back.indices.tolist() == [2, 2]


def test_jax_flattens_a_crossed_return_type():
    there = to_jax(torch.tensor([3.0, 1.0, 2.0]).sort())
    out = jax.jit(lambda found: jax.tree.map(lambda x: x + 1, found))(there)
    assert type(out) is torch.return_types.sort
    assert out.values.tolist() == [2, 3, 4]


def test_a_fault_inside_a_return_type_is_named():
    with pytest.raises(TypeError, match=r"'top\.0'.*torch\.float64"):
        to_jax({"top": torch.ones(2, dtype=torch.float64).sort()})


def test_an_empty_size_does_not_decide_for_others():
    to_jax((torch.Size([]), torch.ones(1)))
    made = jax.tree.map(jnp.asarray, to_jax((torch.Size([2, 3]), torch.ones(1)))[0])
    assert type(made) is tuple  # a Size would make numbers of its arrays
    assert all(isinstance(child, jax.Array) for child in made)


def test_return_types_and_sizes_are_known_without_torchs_registry(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils._pytree", None)
    kinds = [kind for kind in vars(torch.return_types).values() if getattr(kind, "n_fields", 0) == 2]
    pair = (torch.eye(2), torch.ones(1))
    found = next(node for kind in kinds if jax.tree.leaves(node := kind(pair))[0] is node)
    there = to_jax(found)
    assert type(there) is type(found)
    assert (there[0] == jnp.eye(2)).all()
    assert type(to_jax((torch.Size([]), torch.ones(1)))[0]) is torch.Size


class OnlyTensors:
    """A mapping that holds tensors only."""

    def __init__(self, entries):
        if not all(isinstance(value, torch.Tensor) for value in entries.values()):
            raise TypeError("only tensors")
        self.entries = entries


class ByName(OnlyTensors):
    """The same, but torch names its entries as attributes."""


@pytest.fixture(scope="module", autouse=True)
def registered():
    for kind, key in ((OnlyTensors, _pytree.MappingKey), (ByName, _pytree.GetAttrKey)):
        _pytree.register_pytree_node(
            kind,
            lambda node: (list(node.entries.values()), list(node.entries)),
            lambda values, names, kind=kind: kind(dict(zip(names, values, strict=True))),
            flatten_with_keys_fn=lambda node, key=key: (
                [(key(name), value) for name, value in node.entries.items()],
                list(node.entries),
            ),
        )


def test_a_class_that_cannot_hold_arrays_keeps_the_names_of_its_children():
    entries = {"b": torch.ones(2), "a": torch.zeros(1)}
    mapping = to_jax(OnlyTensors(entries))
    assert type(mapping) is collections.OrderedDict
    assert list(mapping) == ["b", "a"]
    named = jax.jit(lambda x: x)(to_jax(ByName(entries)))
    assert named._fields == ("b", "a")
    assert named.b.tolist() == [1, 1]


def test_a_class_that_cannot_hold_arrays_comes_back_around_tensors():
    doubled = to_torch(OnlyTensors({"a": torch.ones(2)}))
    assert type(doubled) is OnlyTensors


def test_a_class_that_drops_a_child_is_replaced_by_a_builtin():
    """As a ModelOutput does with its only field, where that is an empty array."""

    @dataclasses.dataclass
    class Loses:
        kept: list

    _pytree.register_pytree_node(
        Loses,
        lambda node: (node.kept, None),
        lambda kept, _: Loses([x for x in kept if getattr(x, "size", 1)]),
    )
    out = jax.tree.map(lambda x: x, to_jax([Loses([jnp.ones(2), jnp.ones(0)])]))
    assert [x.size for x in out[0]] == [2, 0]


def test_a_jax_function_takes_and_returns_what_torch_knows():
    x = torch.tensor([3.0, 1.0], requires_grad=True)
    f = as_torch_function(lambda found: jax.tree.map(lambda v: v * 2, found))
    out = f(x.sort())
    assert type(out) is torch.return_types.sort
    out.values.sum().backward()
    assert x.grad.tolist() == [2, 2]


def test_a_tensordict_crosses_both_ways():
    tensordict = pytest.importorskip("tensordict")
    td = tensordict.TensorDict({"a": torch.ones(3, 2), "in": {"b": torch.zeros(3)}}, batch_size=[3])
    there = to_jax(td)
    assert isinstance(there["a"], jax.Array)
    back = to_torch(jax.jit(lambda td: jax.tree.map(lambda x: x + 1, td))(there))
    assert isinstance(back, tensordict.TensorDict)
    assert back.batch_size == td.batch_size
    assert (back["in", "b"] == 1).all()


def test_a_jax_function_takes_and_returns_a_tensordict():
    tensordict = pytest.importorskip("tensordict")
    td = tensordict.TensorDict({"a": torch.ones(3, 2, requires_grad=True)}, batch_size=[3])
    out = as_torch_function(lambda td: jax.tree.map(jnp.sin, td))(td)
    assert isinstance(out, tensordict.TensorDict)
    out["a"].sum().backward()
    assert torch.allclose(td["a"].grad, torch.ones(3, 2).cos())


def test_a_model_output_crosses_both_ways():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    out = outputs.BaseModelOutput(last_hidden_state=torch.ones(2, 3), hidden_states=(torch.zeros(1),))
    there = jax.jit(lambda out: out)(to_jax(out))
    assert type(there) is outputs.BaseModelOutput
    assert isinstance(there.last_hidden_state, jax.Array)
    assert isinstance(there.hidden_states[0], jax.Array)
    assert there.attentions is None
    assert torch.equal(to_torch(there)[0], out[0])
