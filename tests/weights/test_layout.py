"""Layouts: the inverse is exact, shapes come from meta tensors, lossy ones say so."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchjax_bridge.weights import Each, Flip, Identity, Layout, Permute, Reshape, Split, Stack, Sum, then
from torchjax_bridge.weights.layouts import Constant, Inverse, Parallel, Rows
from torchjax_bridge.weights.rules._linear import kernel_after_flatten

# A NaN with a payload, a signed zero, a subnormal: what a careless copy loses.
_ODD_BITS = torch.tensor([0x7FC12345, -0x80000000, 1, 0x3F800000], dtype=torch.int32).view(torch.float32)


def _numbers(*shape: int) -> torch.Tensor:
    count = int(np.prod(shape))
    return _ODD_BITS.repeat(count // 4 + 1)[:count].reshape(shape).clone()


def _bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.int32).tolist()


LOSSLESS = [
    (Identity(), [(2, 3)]),
    (Permute((1, 0)), [(2, 3)]),
    (Permute((2, 3, 1, 0)), [(5, 4, 3, 2)]),
    (Permute((1, 2, 0)), [(2, 3, 4)]),
    (Reshape((6, 4), (2, 3, 4)), [(6, 4)]),
    (Flip((0, 2)), [(2, 3, 4)]),
    (Split(3), [(6, 2)]),
    (Each(Permute((1, 0))), [(2, 3), (4, 5)]),
    (then(Split(3), Each(Permute((1, 0)))), [(6, 2)]),
    (then(Flip((2,)), Permute((2, 0, 1))), [(2, 3, 4)]),
    (Stack(2, Permute((1, 0))), [(2, 3), (2, 3)]),
    (Stack(3, Split(2)), [(4, 2), (4, 2), (4, 2)]),
    (kernel_after_flatten(7, (3, 2, 5)), [(7, 30)]),
    (Rows((4, 2)), [(6, 3)]),
    (Rows((8, 4, 4), heads=2), [(16,)]),
    (Rows((8, 4, 4), heads=4), [(16, 3)]),
    (Rows((4, 2), columns=True), [(3, 6)]),
    (Inverse(Rows((4, 2), heads=2)), [(4, 3), (2, 3)]),
    (then(Rows((4, 2)), Parallel((Permute((1, 0)), Reshape((2, 3), (6,))))), [(6, 3)]),
]


@pytest.mark.parametrize(("layout", "shapes"), LOSSLESS, ids=lambda value: str(value))
def test_the_inverse_gives_every_bit_back(layout: Layout, shapes: list[tuple[int, ...]]) -> None:
    tensors = [_numbers(*shape) for shape in shapes]
    back = layout.inverse(layout.forward(tensors))
    assert layout.lossless
    assert [t.shape for t in back] == [t.shape for t in tensors]
    assert [_bits(t) for t in back] == [_bits(t) for t in tensors]


@pytest.mark.parametrize(("layout", "shapes"), LOSSLESS, ids=lambda value: str(value))
def test_meta_tensors_give_the_shapes(layout: Layout, shapes: list[tuple[int, ...]]) -> None:
    real = layout.forward([torch.zeros(shape) for shape in shapes])
    meta = layout.forward([torch.empty(shape, device="meta") for shape in shapes])
    assert [t.shape for t in meta] == [t.shape for t in real]
    assert all(t.is_meta for t in meta)


VIEWS = [row for row in LOSSLESS if row[0].is_view and "reshape" not in str(row[0])]


@pytest.mark.parametrize(("layout", "shapes"), VIEWS, ids=lambda value: str(value))
def test_a_layout_that_says_it_is_a_view_moves_no_byte(layout: Layout, shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.zeros(shape) for shape in shapes]
    blocks = {t.untyped_storage().data_ptr() for t in tensors}
    out = layout.forward(tensors)
    assert {t.untyped_storage().data_ptr() for t in out} <= blocks
    assert {t.untyped_storage().data_ptr() for t in layout.inverse(out)} <= blocks


@given(st.permutations(range(4)))
def test_any_permutation_is_its_inverses_inverse(axes: list[int]) -> None:
    tensor = torch.arange(120).reshape(2, 3, 4, 5)
    layout = Permute(tuple(axes))
    (moved,) = layout.forward([tensor])
    assert np.array_equal(moved.numpy(), tensor.numpy().transpose(axes))
    (back,) = layout.inverse([moved])
    assert torch.equal(back, tensor)


def test_the_kernel_after_a_flatten_takes_rows_from_channel_order_to_position_order() -> None:
    channels, height, width, out = 3, 2, 4, 5
    weight = torch.randn(out, channels * height * width)
    x = torch.randn(6, channels, height, width)
    (kernel,) = kernel_after_flatten(out, (channels, height, width)).forward([weight])
    channels_last = x.permute(0, 2, 3, 1).reshape(6, -1)
    torch.testing.assert_close(channels_last @ kernel, x.flatten(1) @ weight.t())


def test_a_sum_is_not_lossless_and_gives_its_terms_back_only_when_nothing_changed() -> None:
    layout = Sum()
    first, second = torch.randn(9), torch.randn(9)
    (total,) = layout.forward([first, second])
    assert not layout.lossless
    again = layout.inverse([total], [first, second])
    assert _bits(again[0]) == _bits(first)
    assert _bits(again[1]) == _bits(second)
    changed = layout.inverse([total + 1], [first, second])
    assert torch.equal(changed[0], total + 1)
    assert not changed[1].any()
    unknown = layout.inverse([total])
    assert torch.equal(unknown[0], total)
    assert not unknown[1].any()


def test_terms_whose_sum_is_not_a_number_come_back_to_the_bit() -> None:
    first, second = torch.tensor([float("nan"), 1.0, float("inf")]), torch.tensor([2.0, 3.0, -float("inf")])
    back = Sum().inverse(Sum().forward([first, second]), [first, second])
    assert [_bits(t) for t in back] == [_bits(t) for t in (first, second)]


def test_a_sum_whose_sign_of_zero_changed_is_another_sum() -> None:
    zeros = torch.zeros(2)
    back = Sum().inverse([-zeros], [zeros, zeros])
    assert _bits(back[0]) == _bits(-zeros)


def test_a_stack_of_what_torch_has_not_is_made_and_comes_back_as_nothing() -> None:
    layout = Stack(3, Constant(0.0, (2,), torch.float32, fixed=True))
    (made,) = layout.forward([])
    assert torch.equal(made, torch.zeros(3, 2))
    assert layout.inverse([made]) == layout.inverse([made], []) == ()
    with pytest.raises(ValueError, match="no longer 0"):
        layout.inverse([made + 1])


def test_a_lossy_step_inside_a_chain_still_sees_what_stood_there() -> None:
    layout = then(Each(Reshape((6,), (2, 3))), Sum(), Permute((1, 0)))
    terms = [torch.randn(6), torch.randn(6)]
    out = layout.forward(terms)
    assert out[0].shape == (3, 2)
    assert not layout.lossless
    back = layout.inverse(out, terms)
    assert [_bits(t) for t in back] == [_bits(t) for t in terms]


def test_a_stack_of_lossy_layouts_hands_every_layer_its_own_past() -> None:
    layout = Stack(2, Sum())
    terms = [torch.randn(3) for _ in range(4)]
    out = layout.forward(terms)
    assert out[0].shape == (2, 3)
    assert [_bits(t) for t in layout.inverse(out, terms)] == [_bits(t) for t in terms]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(Permute((1, 0)), (2, 3, 4)), (Reshape((2, 3), (6,)), (3, 2)), (Split(3), (4, 2))],
    ids=str,
)
def test_a_shape_that_does_not_fit_raises(layout: Layout, shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        layout.forward([torch.zeros(shape)])


def test_equal_layouts_are_equal_values() -> None:
    assert then(Flip((0,)), Permute((1, 0))) == then(Flip((0,)), Permute((1, 0)))
    assert hash(Stack(2, Split(3))) == hash(Stack(2, Split(3)))
    assert then() == Identity()
    assert then(Identity(), Flip((1,))) == Flip((1,))
