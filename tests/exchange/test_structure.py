"""Trees that JAX cannot flatten or rebuild: one error names the container, and the process stays sound."""

import collections

import jax
import jax.numpy as jnp
import pytest
import torch

from torchjax_bridge.errors import UnsupportedLeafError
from torchjax_bridge.exchange import to_jax, to_torch


@pytest.fixture(autouse=True)
def dlpack_path():
    """Trees are the same on both paths."""


@jax.tree_util.register_pytree_node_class
class Bag:
    """A custom node, whose class refuses what `allows` refuses."""

    allows = object

    def __init__(self, item):
        if not isinstance(item, self.allows):
            raise TypeError(f"the bag's own words about {type(item).__name__}")
        self.item = item

    def tree_flatten(self):
        return (self.item,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0])


@jax.tree_util.register_pytree_node_class
class TensorBag(Bag):
    allows = torch.Tensor


@jax.tree_util.register_pytree_node_class
class Shut(Bag):
    def tree_flatten(self):
        raise LookupError("shut for good")


def tensor():
    return torch.ones(16)


def levels_left():
    """How deep Python may still recurse in this thread."""

    def down(level):
        try:
            return down(level + 1)
        except RecursionError:
            return level

    return down(0)


MIXED = {
    "str and int": {"b": tensor(), 1: tensor()},
    "None and str": {None: tensor(), "a": tensor()},
    "tuples of mixed items": {(1, 2): tensor(), (1, "a"): tensor()},
    "defaultdict": collections.defaultdict(list, {"a": tensor(), 1: tensor()}),
    "tensors": {torch.ones(2): tensor(), torch.zeros(2): tensor()},
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_keys_that_do_not_sort_are_refused_with_the_place_and_a_fix(mixed):
    for cross in (to_jax, to_torch):
        with pytest.raises(UnsupportedLeafError, match=r"the \w+ at 'net\.1' .*keys must sort.*OrderedDict"):
            cross({"net": [tensor(), mixed]})
        with pytest.raises(
            UnsupportedLeafError, match=r"cannot flatten this \w+ as a pytree.*keys must sort"
        ):
            cross(mixed)


def test_the_types_of_keys_that_do_not_sort_are_listed():
    with pytest.raises(UnsupportedLeafError, match=r"\(int and str\)") as caught:
        to_jax(MIXED["str and int"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_ordered_dict_keeps_keys_that_do_not_sort():
    out = to_jax(collections.OrderedDict(MIXED["str and int"]))
    assert list(out) == ["b", 1]
    assert all(isinstance(leaf, jax.Array) for leaf in out.values())


def test_the_state_of_an_optimizer_is_refused_for_its_keys():
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(UnsupportedLeafError, match=r"this defaultdict.*keys must sort.*\(Parameter\)"):
        to_jax(optimizer.state)


def _list():
    tree = [tensor()]
    tree.append(tree)
    return tree, "the list at '1'", "the whole tree"


def _dict():
    tree = {"a": tensor(), "b": {}}
    tree["b"]["c"] = tree["b"]
    return tree, "the dict at 'b.c'", "the dict at 'b' again"


def _twice_over():
    tree = []
    tree += [tree, tree]
    return [tree], "the list at '0.0'", "the list at '0' again"


def _through_a_tuple():
    inner = collections.OrderedDict(a=tensor())
    inner["up"] = (inner,)
    return {"x": [inner]}, "the OrderedDict at 'x.0.up.0'", "the OrderedDict at 'x.0' again"


def _through_a_custom_node():
    inner = [tensor()]
    inner.append(Bag({"again": inner}))
    tree = inner
    for _ in range(40):  # deeper than the quick check
        tree = [tree]
    return tree, r"the list at '[0.]+\.1\.0\.again'", "again"


CYCLES = (_list, _dict, _twice_over, _through_a_tuple, _through_a_custom_node)


@pytest.mark.parametrize("make", CYCLES)
def test_a_container_that_contains_itself_is_refused_with_both_places(make):
    tree, inner, outer = make()
    for cross in (to_jax, to_torch):
        with pytest.raises(UnsupportedLeafError, match=rf"{inner} .*contains itself.*{outer}"):
            cross(tree)


def test_a_refusal_leaves_the_recursion_depth_as_it_was():
    # jaxlib's flattening of these trees would leave fewer levels, or none.
    before = levels_left()
    for tree in (_list()[0], _dict()[0], {"x": [MIXED["str and int"]]}):
        for _ in range(20):
            with pytest.raises(UnsupportedLeafError):
                to_jax(tree)
    assert levels_left() == before


def test_one_container_at_two_places_is_no_cycle():
    shared = {"w": tensor()}
    out = to_jax({"a": shared, "b": [shared, (shared,)]})
    assert out["a"]["w"] is out["b"][0]["w"] is out["b"][1][0]["w"]


def nested(levels, kind):
    tree = tensor()
    for _ in range(levels):
        tree = [tree] if kind is list else {"k": tree}
    return tree


@pytest.mark.parametrize("kind", [list, dict])
def test_a_tree_as_deep_as_jax_allows_crosses(kind):
    deep = nested(700, kind)
    out = to_jax(deep)
    assert jax.tree.structure(out) == jax.tree.structure(deep)


@pytest.mark.parametrize("kind", [list, dict])
def test_a_tree_deeper_than_the_recursion_limit_is_refused(kind):
    deep = nested(5_000, kind)
    before = levels_left()
    with pytest.raises(UnsupportedLeafError, match=r"'[k0]\.[k0]\..*levels deep.*setrecursionlimit"):
        to_jax(deep)
    assert levels_left() == before


def test_a_fault_inside_a_custom_node_is_named_by_its_path():
    with pytest.raises(UnsupportedLeafError, match=r"the dict at 'b\.0\.0\.q' .*keys must sort"):
        to_jax({"b": [Bag({"q": MIXED["str and int"]})]})


def test_a_class_whose_own_flattening_fails_is_named_with_its_error():
    with pytest.raises(
        UnsupportedLeafError, match=r"the Shut at 'b\.1' .*LookupError: shut for good"
    ) as caught:
        to_jax({"a": tensor(), "b": [tensor(), Shut(tensor())]})
    assert isinstance(caught.value.__cause__, LookupError)


def test_a_class_that_does_not_take_the_new_leaves_is_named_with_its_error():
    tree = {"a": tensor(), "b": [Bag(tensor()), TensorBag(tensor())]}
    with pytest.raises(
        UnsupportedLeafError, match=r"rebuild the TensorBag at 'b\.1'.*own words about ArrayImpl"
    ) as caught:
        to_jax(tree)
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(UnsupportedLeafError, match="rebuild this TensorBag"):
        to_jax(TensorBag(tensor()))


def test_torchs_packed_sequence_is_refused_with_its_place():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    with pytest.raises(UnsupportedLeafError, match=r"rebuild the PackedSequence at '1'.*dict, list or tuple"):
        to_jax([tensor(), packed])


def test_an_array_passed_through_goes_back_into_any_node():
    bag = Bag(jnp.ones(2))
    assert to_jax([bag])[0].item is bag.item
