"""Modules that hold modules of their own class, directly or in others, become classes in an order that runs."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from torchjax_bridge import port
from torchjax_bridge.porting._nesting import in_order


class Chomp(nn.Module):
    """Leaves out the end of a sequence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :-2].contiguous()


class Block(nn.Module):
    """A causal convolution, in a Sequential."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(width, width, 3, padding=2), Chomp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).relu() + x


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(Block(4)),
        nn.Sequential(Block(4), nn.Sequential(Block(4), Chomp()), Block(4)),
        nn.Sequential(nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(1), nn.Unflatten(1, (4, 20))), Block(4)),
    ],
    ids=["one block", "blocks around a Sequential", "a map taken apart"],
)
def test_a_sequential_of_blocks_that_hold_sequentials_is_ported(module: nn.Module) -> None:
    port(module, torch.randn(2, 4, 20))


def test_blocks_of_convolutions_over_sequences_move_no_axes_between_them() -> None:
    source = port(nn.Sequential(Block(4), Block(4), Block(4)), torch.randn(2, 4, 20)).source
    before, _, model = source.rpartition("class ")
    assert "swapaxes" not in before  # of Block
    assert model.count("swapaxes") == 2  # the model takes and gives what torch does


class A(nn.Module):
    """One class."""


class B(nn.Module):
    """Another class."""


class C(nn.Module):
    """A third class."""


def _order(**kinds: type[nn.Module]) -> list[Sequence[str]]:
    named = {path.replace("_", "."): kind for path, kind in kinds.items()}
    return [paths for _, paths in in_order(list(named), named)]


def test_each_class_comes_after_those_that_it_holds() -> None:
    assert _order(a=A, a_b=B, a_c=C, b=B) == [["a.b", "b"], ["a.c"], ["a"]]


def test_a_class_that_is_deep_in_one_place_comes_before_all_that_hold_it() -> None:
    # A holds C in one place; B holds a lower A in another.
    assert _order(a=A, a_c=C, b=B, b_a=A) == [["a.c"], ["a", "b.a"], ["b"]]


def test_instances_inside_of_others_are_groups_by_height() -> None:
    assert _order(a=A, a_b=B, a_b_a=A, c=A) == [["a.b.a", "c"], ["a.b"], ["a"]]


def test_classes_that_hold_each_other_are_groups_by_height() -> None:
    assert _order(a=A, a_b=B, b=B, b_a=A) == [["a.b"], ["b.a"], ["a"], ["b"]]
