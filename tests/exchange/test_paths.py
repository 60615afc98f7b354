import collections
import dataclasses

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from torchjax_bridge.exchange import from_jax_keypath, join_path, split_path


@pytest.fixture(autouse=True)
def dlpack_path():
    """No tensor crosses here."""


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("", ()),
        ("weight", ("weight",)),
        ("encoder.0.weight", ("encoder", 0, "weight")),
        ("layers.10.self_attn.in_proj_weight", ("layers", 10, "self_attn", "in_proj_weight")),
        ("a.007", ("a", "007")),
        ("a.-1", ("a", "-1")),
        ("a.٣", ("a", "٣")),  # a digit to str.isdigit, not to a state_dict
        ("a..b", ("a", "", "b")),
        (".a", ("", "a")),
    ],
)
def test_a_key_splits_into_names_and_positions(key, path):
    assert split_path(key) == path
    assert join_path(path) == key


@hypothesis.given(st.text(alphabet="ab_.0179-٣ ", max_size=20))
def test_join_is_the_inverse_of_split(key):
    assert join_path(split_path(key)) == key


@hypothesis.given(
    st.lists(
        st.integers(0, 10**6) | st.text(alphabet="abc_0", min_size=1).filter(lambda s: not s.isdigit()),
        min_size=1,
    )
)
def test_split_is_the_inverse_of_join_where_no_name_holds_a_dot(path):
    assert split_path(join_path(path)) == tuple(path)


Point = collections.namedtuple("Point", ["x", "y"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object
    bias: object


def test_every_kind_of_pytree_node_has_a_path():
    tree = {"net": [Layer({3: 0}, Point(1, 2)), (3,)], "other": {(1, 2): 4}}
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    assert {join_path(from_jax_keypath(keypath)): leaf for keypath, leaf in leaves} == {
        "net.0.kernel.3": 0,
        "net.0.bias.x": 1,
        "net.0.bias.y": 2,
        "net.1.0": 3,
        "other.(1, 2)": 4,
    }


def test_a_node_registered_without_names_is_numbered():
    @jax.tree_util.register_pytree_node_class
    class Plain:
        def __init__(self, *children):
            self.children = children

        def tree_flatten(self):
            return self.children, None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    keypath = jax.tree_util.tree_flatten_with_path([Plain("a", "b")])[0][1][0]
    assert from_jax_keypath(keypath) == (0, 1)
