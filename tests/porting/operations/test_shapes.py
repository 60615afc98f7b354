"""Functions that change, join and take apart shapes give what torch gives wherever the axes stand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from .driver import Case, check, check_all, lowered, reasons, tensor

X = tensor(2, 3, 4)
IMAGE = tensor(2, 4, 6, 6)


def _maps(n: int) -> tuple[torch.Tensor]:
    return (tensor(n, 4, 3, 5),)


def _attend(x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c // 2, 2, h * w).permute(0, 3, 1, 2).reshape(b, h * w, c)


CASES = [
    Case("permute", lambda x: x.permute(2, 0, 1) + torch.permute(x, dims=(-1, 0, 1)) + x.permute([2, 0, 1]), (X,)),
    Case("transpose", lambda x: x.transpose(0, -1) + torch.swapaxes(x, axis0=0, axis1=2) + x.swapdims(2, 0), (X,)),
    Case("transpose_", lambda x: x.clone().transpose_(0, 1), (X,)),
    Case("mT and H", lambda x: (x.mT, x.mH, x.adjoint(), x[0].t(), x[0].T, x[0].H), (X,)),
    Case("t of one axis", lambda x: x.t(), (tensor(3),)),
    Case("movedim", lambda x: torch.movedim(x, 0, -1) + x.moveaxis((0, 1), (2, 0)).transpose(0, 1).contiguous(), (tensor(3, 3, 3),)),
    Case("movedim of several", lambda x: torch.movedim(x, (1, 3), (0, 1)), _maps),
    Case("view", lambda x: x.view(x.shape[0], -1), _maps),
    Case("view of groups", lambda x: x.contiguous().view(x.size(0), 2, 2, *x.shape[2:]), _maps),
    Case("reshape through attention", _attend, _maps),
    Case("reshape by name", lambda x: torch.reshape(x, shape=(-1, 4)) + x.reshape((-1, 4)), (X,)),
    Case("reshape_as and view_as", lambda x, y: x.reshape_as(y) + x.contiguous().view_as(y), (X, tensor(6, 4))),
    Case("reshape to no axes", lambda x: x.reshape(()), (tensor(1, 1),)),
    Case("flatten", lambda x: (x.flatten(), torch.flatten(x, 1), x.flatten(start_dim=1, end_dim=2), x.ravel()), _maps),
    Case("flatten of a number", lambda x: x.flatten(), (tensor(),)),
    Case("unflatten", lambda x: x.unflatten(1, (2, -1)) + torch.unflatten(x, dim=-3, sizes=(2, 2)), _maps),
    Case("unflatten in a layer", torch.nn.Unflatten(1, (2, 2)), _maps),
    Case("squeeze", lambda x: (x.squeeze(), x.squeeze(1), x.squeeze(0), torch.squeeze(x, (1, 3))), (tensor(2, 1, 3, 1),)),
    Case("unsqueeze", lambda x: (x.unsqueeze(0), x.unsqueeze(-1), x.unsqueeze(2), x.clone().unsqueeze_(1)), (X,)),
    Case("atleast", lambda x: (torch.atleast_1d(x), torch.atleast_2d(x[0, 0]), torch.atleast_3d(x[0])), (X,)),
    Case("expand", lambda x: x[:, :1].expand(-1, 5, -1) + x[:, :1].expand(x.shape[0], 5, 4), lambda n: (tensor(n, 3, 4),)),
    Case("expand to more axes", lambda x, y: x.expand(y.shape[0], -1, -1), lambda n: (tensor(3, 4), tensor(n))),
    Case("expand to the batch", lambda x, y: x.expand(y.size(0), 3) + x.expand_as(y), lambda n: (tensor(1, 3), tensor(n, 3))),
    Case("broadcast_to", lambda x: torch.broadcast_to(x, (2, 3, 4)), (tensor(3, 1),)),
    Case("broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), (tensor(3, 1, 2), tensor(4, 1))),
    Case("repeat", lambda x: x.repeat(1, 2, 3) + torch.tile(x, (2, 3)), (X,)),
    Case("repeat to more axes", lambda x, y: x.repeat(y.shape[0], 1, 2), lambda n: (tensor(3, 4), tensor(n))),
    Case("tile", lambda x: x.tile(2, 1, 1, 2) + torch.tile(x, dims=(2, 1, 1, 2)), (X,)),
    Case("repeat_interleave", lambda x: (x.repeat_interleave(2, 1), torch.repeat_interleave(x, 3, dim=-1), x.repeat_interleave(2)), (X,)),
    Case("roll", lambda x: (x.roll(1), torch.roll(x, (1, -2), (0, 2)), x.roll(shifts=2, dims=1)), (X,)),
    Case("flip", lambda x: (x.flip(0), x.flip([1, 2]), torch.flip(x, dims=(-1,)), x.fliplr(), x.flipud()), (X,)),
    Case("rot90", lambda x: (x.rot90(1, (0, 2)), torch.rot90(x, 2), torch.rot90(x, -1, [2, 1])), (X,)),
    Case("diagonal", lambda x: (x.diagonal(), torch.diagonal(x, 1, 1, 2), torch.linalg.diagonal(x)), (X,)),
    Case("diag", lambda x, y: (torch.diag(x), x.diag(1), y.diag(), y.trace()), (tensor(3), tensor(3, 3))),
    Case("diag_embed", lambda x: torch.diag_embed(x), (X,)),
    Case("tril", lambda x: x.tril() + torch.triu(x, 1) + x.triu(diagonal=-1), (X,)),
    Case("Tensor.unfold", lambda x: (x.unfold(2, 3, 2), x.unfold(-3, 2, 1)), _maps),
    Case("pad", lambda x: (F.pad(x, (1, 2)), F.pad(x, (0, 0, 1, 0), value=2.5), F.pad(x, (1, 0, 0, 0, 2, 1))), _maps),
    Case("pad of one axis", lambda x: F.pad(x, (1, 2)), (tensor(5),)),
    Case("pad that cuts", lambda x: (F.pad(x, (-1, 0, 0, -1)), F.pad(x, (-1, 2, 1, -1), value=3.0)), _maps),
    Case("pad to a multiple", lambda x: F.pad(x, (0, (-x.shape[-1]) % 4)), lambda n: (tensor(2, 2 + 2 * (n - 2), 3, 4 + n - 2),)),
    *(Case(f"pad {mode}", lambda x, mode=mode: F.pad(x, (2, 1, 1, 2), mode=mode), _maps) for mode in ("reflect", "replicate", "circular")),
    Case("constant_pad_nd", lambda x: torch.constant_pad_nd(x, (1, 1), 2.0), (X,)),
    Case("padding layers", lambda x: torch.nn.ZeroPad2d(1)(x) + torch.nn.ReflectionPad2d((1, 1, 1, 1))(x), _maps),
    Case("channel_shuffle", lambda x: torch.channel_shuffle(x, 2) + F.channel_shuffle(x, 2), _maps),
    Case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2) + torch.nn.PixelShuffle(2)(x), _maps),
    Case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2) + F.pixel_unshuffle(x, downscale_factor=2), (IMAGE,)),
    Case("cat", lambda x, y: (torch.cat([x, y], 1), torch.concat((y, x), dim=-2), torch.concatenate([x, x])), (X, X + 1)),
    Case("cat of dtypes", lambda x, y: torch.cat([x, y], axis=2), (X, tensor(2, 3, 5, dtype=torch.int64))),
    Case("cat with an empty tensor", lambda x: torch.cat([torch.zeros(0), x[0, 0]]), (X,)),
    Case("stack", lambda x, y: (torch.stack([x, y]), torch.stack((x, y), -1), torch.stack([x, y], dim=2)), (X, X + 1)),
    Case("stacks", lambda x: (torch.hstack([x, x]), torch.vstack([x, x]), torch.dstack([x, x]), torch.column_stack([x[0], x[0]]), torch.row_stack([x, x]) if hasattr(torch, "row_stack") else x), (X,)),
    Case("split", lambda x: (*x.split(1), *torch.split(x, 2, dim=2), *x.split([1, 2], 1), *x.split_with_sizes([1, 3], 2)), (X,)),
    Case("split by sizes", lambda x: x.split([x.shape[1] // 4, x.shape[1] - x.shape[1] // 4], 1), lambda n: (tensor(2, 2 * n, 3),)),
    Case("split by name", lambda x: (*torch.split(x, split_size_or_sections=2, dim=1), *x.chunk(chunks=2, dim=2), *x.split(split_size=1)), (X,)),
    Case("chunk", lambda x: (*x.chunk(2, 1), *torch.chunk(x, 3, -1)), (X,)),
    Case("tensor_split", lambda x: (*x.tensor_split(2, 1), *x.tensor_split([1, 3], dim=2), *x.hsplit(3), *x.vsplit(2), *x.dsplit([1])), (X,)),
    Case("unbind", lambda x: (*x.unbind(), *torch.unbind(x, dim=-1), *[row + 1 for row in x]), (X,)),
    Case("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij") + torch.meshgrid([x, y], indexing="xy"), (tensor(3), tensor(4))),
]  # fmt: skip


def test_a_function_of_shapes() -> None:
    check_all(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_function_of_shapes_in_more_orders(case: Case) -> None:
    check(case, turns=4)


@st.composite
def _reshapes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """A shape, another with as many elements, and a permutation of the first."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=2, max_size=6))

    def grouped() -> list[int]:
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(factor)
            else:
                shape[-1] *= factor
        return shape

    before = grouped()
    return before, grouped(), draw(st.permutations(range(len(before))))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_reshapes())
def test_a_reshape_in_any_order_of_axes(drawn: tuple[list[int], list[int], list[int]]) -> None:
    before, after, order = drawn
    x = tensor(*before)
    case = Case(str(order), lambda x: x.reshape(after) * 1, (x,))
    check(case)


def test_a_permutation_and_a_reshape_that_fit_the_layout_emit_no_transposition() -> None:
    _, body = lowered(lambda x: x.flatten(2).transpose(1, 2), (IMAGE,), [(0, 2, 3, 1)])
    assert len(body.statements) == 1
    assert "transpose" not in body.statements[0].text
    assert "swapaxes" not in body.statements[0].text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: x.view(torch.int32), "use .to(dtype)"),
        (lambda x: torch.nonzero(x), "depends on values"),
        (lambda x: x.as_strided((2, 2), (1, 1)), "use slices"),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), 0), "pass one number"),
        (lambda x: F.pixel_shuffle(x, 2), "add a batch axis"),
        (lambda x: x[:0].reshape(0, 12), "not empty"),
    ],
)
def test_what_has_no_translation_is_refused_with_a_way_out(call: Callable[..., Any], words: str) -> None:
    assert words in reasons(call, IMAGE[0])
