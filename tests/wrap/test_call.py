"""A call is split and put back."""

import doctest
import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.wrap import _call
from torchjax_bridge.wrap._call import StaticArguments, split_call

Point = namedtuple("Point", "x y")


def is_float(leaf: Any) -> bool:
    return isinstance(leaf, float)


CALLS = [
    ((), {}),
    ((1.0,), {}),
    ((1.0, "sum", 2.0), {"z": 3.0, "a": None}),
    (({"b": 1.0, "a": (2.0, Point(3.0, "p"))}, [4.0]), {"mode": np.sum}),
    (("only", "static"), {"flag": True}),
]


@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_join_gives_the_call_back(args, kwargs):
    leaves, structure = split_call(args, kwargs, is_float)
    assert all(is_float(leaf) for leaf in leaves)
    assert structure.unflatten(leaves) == (args, kwargs)
    assert hash(structure) == hash(split_call(args, kwargs, is_float)[1])
    assert len(structure.names()) == len(leaves)


def test_join_puts_other_leaves_in_the_same_places():
    structure = split_call((1.0, "s", {"a": 2.0}), {"k": 3.0}, is_float)[1]
    assert structure.unflatten(["A", "B", "C"]) == (("A", "s", {"a": "B"}), {"k": "C"})
    assert structure.names() == ["args[0]", "args[2]['a']", "kwargs['k']"]


def test_calls_that_differ_only_in_leaves_have_equal_rests():
    assert split_call((1.0, "s"), {}, is_float)[1] == split_call((2.0, "s"), {}, is_float)[1]


@pytest.mark.parametrize("other", [(1.0, "t"), ("s", 1.0), (1.0, "s", None), ((1.0,), "s"), (1.0, ("s",))])
def test_calls_that_differ_otherwise_have_unequal_rests(other):
    assert split_call((1.0, "s"), {}, is_float)[1] != split_call(other, {}, is_float)[1]


def test_equal_static_values_of_unequal_types_are_kept_apart():
    structures = {split_call((value,), {}, is_float)[1] for value in (1, True, np.int64(1))}
    assert len(structures) == 3


def test_a_static_argument_is_one_leaf_even_if_it_is_a_pytree():
    def f(x, sizes, *, scale):
        pass

    static = StaticArguments(f, argnums=1, argnames="scale")
    leaves, structure = split_call((1.0, (2.0, 3.0)), {"scale": 4.0}, is_float, static)
    assert leaves == [1.0]
    assert structure.unflatten(leaves) == ((1.0, (2.0, 3.0)), {"scale": 4.0})
    assert structure != split_call((1.0, (2.0, 3.5)), {"scale": 4.0}, is_float, static)[1]


def test_static_arguments_are_found_by_position_and_by_name():
    def f(x, mode, /, size, *, flag):
        pass

    static = StaticArguments(f, argnums=(-1,), argnames="flag")
    assert static.argnums == {2}
    assert static.argnames == {"size", "flag"}
    assert StaticArguments(f, argnames="size").argnums == {2}
    assert StaticArguments(f, argnums=1).argnames == frozenset()
    assert not StaticArguments(f)


@pytest.mark.parametrize(("nums", "names"), [((2,), ()), ((-3,), ()), ((), "z")])
def test_a_static_argument_that_does_not_exist_is_an_error(nums, names):
    def f(x, y):
        pass

    with pytest.raises(ArgumentError, match="f has"):
        StaticArguments(f, nums, names)


def test_static_arguments_of_a_function_with_any_arguments():
    def f(*args, **kwargs):
        pass

    static = StaticArguments(f, argnums=5, argnames="mode")
    assert static.argnums == {5}
    assert static.argnames == {"mode"}


def test_an_unhashable_static_value_is_named():
    with pytest.raises(ArgumentError, match=r"args\[1\]\['a'\] is a builtins.set"):
        split_call((1.0, {"a": {1}}), {}, is_float)

    def f(x, sizes):
        pass

    with pytest.raises(ArgumentError, match=r"args\[1\] is a builtins.list"):
        split_call((1.0, [1]), {}, is_float, StaticArguments(f, argnums=1))


def test_dict_keys_that_do_not_sort_are_an_error_with_the_fix():
    with pytest.raises(ArgumentError, match="must sort"):
        split_call(({1: 1.0, "a": 2.0},), {}, is_float)


def endless():
    tree = {"a": [1.0]}
    tree["a"].append(tree)
    return tree


def test_an_argument_that_contains_itself_is_named_and_the_thread_works_on():
    for args, kwargs, name in [
        ((1.0, endless()), {}, r"args\[1\]"),
        ((), {"k": endless()}, r"kwargs\['k'\]"),
    ]:
        for _ in range(2):
            with pytest.raises(ArgumentError, match=rf"{name} is no pytree: .*'a\.1'.* contains itself"):
                split_call(args, kwargs, is_float)
    assert split_call(({"a": [{"b": 1.0}]},), {}, is_float)[0] == [1.0]


@dataclass(frozen=True)
class Holder:
    weight: torch.Tensor


class Plain:
    def __init__(self, weight):
        self.inside = [weight, self]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(1), r"args\[0\] is static and a tensor"),
        ((1, torch.ones(1)), "holds a tensor"),
        (Holder(torch.ones(1)), "register_dataclass"),
        (torch.max(torch.ones(2, 2), dim=0), "pass a tuple"),
        (Plain(torch.ones(1)), "holds a tensor"),
        (functools.partial(print, end=torch.ones(1)), "holds a tensor"),
        (torch.nn.Linear(1, 1), "named_parameters"),
        (torch.fx.Proxy(torch.fx.Graph().placeholder("x")), "fx.wrap"),
    ],
)
def test_a_tensor_is_never_a_static_value(value, words):
    with pytest.raises(ArgumentError, match=words):
        split_call((value,), {}, is_float, StaticArguments(lambda x: x, argnums=0))


@pytest.mark.parametrize("value", [jnp.sin, jnp.float32, functools.partial(print, end=""), Plain(1)])
def test_a_static_value_without_tensors_is_taken(value):
    assert split_call((value,), {}, is_float)[0] == []


def test_equal_numbers_of_unequal_types_inside_a_static_tuple_are_kept_apart():
    static = StaticArguments(lambda x: x, argnums=0)
    values = ((1,), (1.0,), (True,), (0.0,), (-0.0,), ((1,),), ((1.0,),))
    assert len({split_call((value,), {}, is_float, static)[1] for value in values}) == len(values)


def test_tracers_pass_through_a_split():
    def f(x):
        leaves, structure = split_call(({"a": x}, "s"), {}, lambda leaf: isinstance(leaf, jax.Array))
        (joined, _), _ = structure.unflatten([leaf + 1 for leaf in leaves])
        return joined["a"]

    assert jax.jit(f)(1.0) == 2.0


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(_call).failed == 0


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1 + 0j, (1 + 0j).conjugate())])
def test_static_values_that_differ_in_the_sign_of_a_zero_are_kept_apart(one, other):
    assert one == other
    structures = [split_call((value,), {}, lambda leaf: False)[1] for value in (one, one, other)]
    assert structures[0] == structures[1]
    assert structures[0] != structures[2]
