"""Indexing and writing to a part give what torch gives wherever the axes stand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from .driver import Case, check, check_all, reasons, tensor

X = tensor(3, 4, 5)
MAPS = tensor(2, 3, 4, 5)
ROWS = torch.tensor([2, 0, 1])
GRID = torch.tensor([[0, 2], [1, 1]])


def _written(write: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        write(x, *rest)
        return x

    return call


def _set(index: Any) -> Callable[..., torch.Tensor]:
    return _written(lambda x, value: x.__setitem__(index, value))


s = slice(None)
CASES = [
    *(
        Case(f"x[{index}]", lambda x, index=index: x[index] * 1, (MAPS,))
        for index in (
            0, -1, (s, 1), (..., 2), (0, ..., 0), (s, slice(1, None)), (s, s, slice(None, -1), slice(0, 4, 2)), None,
            (s, None), (s, 0, None), (..., None), (None, s, 1, ..., None), (s, s, None, 2), (0, 1, 2, 3), (1, s, 0),
            (s, slice(0, 100)), (s, slice(-2, None), s, slice(1, -1)), Ellipsis, (s, None, None, 1), (None, 0, None),
        )
    ),
    Case("by one tensor", lambda x, i: (x[i], x[:, i], x[..., i], x[0, i], x[:, :2, i]), (X, ROWS)),
    Case("by a tensor of two axes", lambda x, i: (x[i], x[:, i], x[1:, :, i]), (X, GRID)),
    Case("by a list", lambda x: (x[[2, 0]], x[:, [1]], x[:, [[0, 1], [2, 3]]]), (X,)),
    Case("by a negative index", lambda x, i: x[i - 3], (X, ROWS)),
    Case("by two tensors side by side", lambda x, i: (x[i, i], x[:, i, i], x[:, :, i, i]), (tensor(3, 3, 4, 5), ROWS)),
    Case("by two tensors apart", lambda x, i: (x[i, :, i], x[i, :, :, i], x[:, i, :, i]), (tensor(3, 4, 3, 5), ROWS)),
    Case("by tensors that broadcast", lambda x, i, j: x[:, i, j], (X, ROWS[:, None], ROWS[:2])),
    Case("by a number and a tensor", lambda x, i: (x[0, :, i], x[:, 1, :, i], x[i, :, 0], x[1, i, None]), (tensor(3, 4, 3, 5), ROWS)),
    Case("by a slice and a tensor", lambda x, i: (x[1:, i], x[i, None, ::2]), (X, ROWS)),
    Case("by a tensor without axes", lambda x, i: (x[i[0]], x[:, i[1]], x[i[0], :, i[1]]), (X, ROWS)),
    Case("by sizes", lambda x: x[:, : x.shape[1] // 2, -x.shape[0] :], lambda n: (tensor(n, 4, 5),)),
    Case("select and narrow", lambda x: (x.select(1, 0), torch.select(x, -1, 2), x.narrow(1, 1, 2), torch.narrow(x, 2, -2, 2)), (X,)),
    Case("index_select", lambda x, i: (x.index_select(1, i), torch.index_select(x, -1, i), x.index_select(0, i[0])), (X, ROWS)),
    Case("take", lambda x, i: torch.take(x, i), (X, GRID)),
    Case("gather", lambda x, i: (x.gather(1, i), torch.gather(x, -1, i)), (X, tensor(3, 4, 5, dtype=torch.int64, low=0, high=4))),
    Case("gather by a smaller index", lambda x, i: x.gather(1, i), (X, tensor(2, 6, 3, dtype=torch.int64, low=0, high=4))),
    Case("take_along_dim", lambda x, i: (x.take_along_dim(i, 1), torch.take_along_dim(x, i, dim=2), torch.take_along_dim(x, i)), (X, tensor(3, 4, 5, dtype=torch.int64, low=0, high=4))),
    *(
        Case(f"x[{index}] = number", lambda x, index=index: _set(index)(x, 7.5), (MAPS,))
        for index in (0, (s, 1), (..., 0), (s, slice(1, None), s, slice(None, 2)), (0, ..., 1), (s, None, 1), Ellipsis)
    ),
    *(
        Case(f"x[{index}] = y", _set(index), (MAPS, value))
        for index, value in (
            (0, tensor(3, 4, 5)), ((s, 1), tensor(2, 4, 5)), ((s, 1), tensor(4, 1)), ((..., 0), tensor(3, 1)),
            ((s, slice(1, None), s, slice(None, 2)), tensor(4, 2)), ((s, s, 1), tensor()), (0, tensor(5)),
            ((s, slice(0, 2)), tensor(2, 1, 4, 5)),
        )
    ),
    Case("x[i] = y", _written(lambda x, i, y: x.__setitem__(i, y)), (X, ROWS, tensor(3, 4, 5) + 1)),
    Case("x[:, i] = y", _written(lambda x, i, y: x.__setitem__((slice(None), i), y)), (X, ROWS, tensor(3, 5))),
    Case("x[i, j] = y", _written(lambda x, i, j, y: x.__setitem__((i, j), y)), (X, ROWS, ROWS + 1, tensor(3, 5))),
    Case("x[mask] = number", _written(lambda x, m: x.__setitem__(m, 2.0)), (X, tensor(3, 4, 5, dtype=torch.bool))),
    Case("x[mask of rows] = number", _written(lambda x, m: x.__setitem__(m, -1)), (X, tensor(3, 4, dtype=torch.bool))),
    Case("integers from a float", lambda x: _set((slice(None), 1))(x, 2.75), (X.mul(3).long(),)),
    Case("integers from floats", _set((slice(None), 1)), (X.mul(3).long(), tensor(3, 5) * 3)),
    Case("written in place", _written(lambda x, y: x[:, 1:3].copy_(y) if False else x.__setitem__(0, y + x[0])), (X, tensor(4, 5))),
    Case("index_put", lambda x, i, y: torch.index_put(x, (i, i), y) + x.clone().index_put_((i,), y[0], accumulate=True), (X, ROWS, tensor(3, 5))),
    Case("scatter", lambda x, i, y: (x.scatter(1, i, y), x.scatter(1, i, 3.0), torch.scatter(x, -1, i, value=2.0)), (X, torch.argsort(tensor(3, 4, 5), 1), X * 2)),
    Case("scatter to a part", lambda x, i, y: x.scatter(1, i, y), (X, torch.argsort(tensor(3, 4, 5), 1)[:2, :3, :4], X * 2)),
    Case("scatter_add", lambda x, i, y: x.scatter_add(0, i, y) + x.clone().scatter_add_(0, i, y), (X, tensor(3, 4, 5, dtype=torch.int64, low=0, high=3), X * 2), tolerance=1e-5),
    Case("scatter_reduce", lambda x, i, y: (x.scatter_reduce(0, i, y, "sum"), x.scatter_reduce(0, i, y, reduce="amax"), x.scatter_reduce(0, i, y, "prod"), x.clone().scatter_(0, i, y, reduce="add")), (X, tensor(3, 4, 5, dtype=torch.int64, low=0, high=3), X * 2), tolerance=1e-5),
    Case("index_add", lambda x, i, y: (x.index_add(1, i, y), x.clone().index_add_(1, i, y, alpha=2), x.index_copy(1, i, y), x.index_fill(1, i, 4.0)), (X, ROWS, tensor(3, 3, 5))),
    Case("embedding", lambda i, w: (F.embedding(i, w), F.embedding(i, w, padding_idx=0), torch.embedding(w, i)), (GRID, tensor(4, 6))),
    Case("one_hot", lambda i: F.one_hot(i, 4), (GRID,)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter")
def test_an_index() -> None:
    check_all(CASES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter")
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_an_index_in_more_orders(case: Case) -> None:
    check(case, turns=4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: x[x > 0], "use torch.where"),
        (lambda x: x[True], "use torch.where"),
        (lambda x: x.masked_select(x > 0), "use torch.where"),
        (lambda x: x.unique(), "use torch.where"),
        (lambda x: F.one_hot(x.long().clamp(0, 3)), "pass num_classes"),
        (lambda x: x.scatter_reduce(0, x.long().clamp(0, 1), x, "mean"), "include_self=True"),
        (lambda x: F.embedding(x.long().clamp(0, 1), x[0], max_norm=1.0), "leave it out"),
        (_written(lambda x: x.__setitem__(x > 0, x[x > 0])), "use torch.where"),
        (_written(lambda x: x.__setitem__((x > 0)[:, 0, 0], x[0] + 1)), "use torch.where"),
        (lambda x: x.masked_scatter(x > 0, x), "use torch.where or scatter"),
    ],
)
def test_what_has_no_translation_is_refused_with_a_way_out(call: Callable[..., Any], words: str) -> None:
    assert words in reasons(call, X)
