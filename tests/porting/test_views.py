"""Writes to views: the whole is written to, and what was taken from it before is what it is now."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchjax_bridge import port


def added_to_columns(y: Tensor) -> Tensor:
    y[:, 1:3] += 1
    y[0] = y[1]
    return y


def multiplied_in_another_shape(y: Tensor) -> Tensor:
    parts = y.view(-1, 2, 3)
    parts[:, 0] = 1.0
    parts.transpose(1, 2)[:, 2] *= 2
    return y + parts.flatten(1)


def transposed(y: Tensor) -> Tensor:
    y.T[1] = 0
    y.permute(1, 0)[2].add_(1)
    return y


def taken_before(y: Tensor) -> Tensor:
    first = y[:, :3]
    rows = y.unsqueeze(1)
    y[:, 0] = 7.0
    rows.squeeze(1).mul_(2)
    return first * 2 + rows[:, 0, 3:]


def narrow(y: Tensor) -> Tensor:
    y.select(1, 2).zero_()
    y.narrow(1, 0, 2).fill_(3.0)
    y.narrow(1, -2, 1).mul_(2)
    return F.relu_(y[:, 1:]) + y[:, :-1]


def rows_and_numbers(y: Tensor) -> Tensor:
    y[torch.arange(y.size(0)), 1] += 5.0
    y[0, torch.tensor([1, 2])] = y[1, torch.tensor([0, 3])]
    return y


def chosen_by_a_mask(y: Tensor) -> Tensor:
    nearest = torch.full_like(y, 0.5)
    nearer = y < nearest
    nearest[nearer] = y[nearer]
    first = y > 2 * y[:, :1]
    nearest[first] = y[first]
    return nearest


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, y: Tensor) -> Tensor:
        columns = y[:, 1:]
        self.relu(columns)
        return y + columns.sum()


class Writes(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


FUNCTIONS = [
    added_to_columns,
    multiplied_in_another_shape,
    transposed,
    taken_before,
    narrow,
    rows_and_numbers,
    chosen_by_a_mask,
    Inside(),
]


@pytest.mark.every(2)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: getattr(one, "__name__", "inside"))
def test_a_write_to_a_view_is_ported(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module = Writes(function)
    ported = port(module, torch.randn(3, 6))
    assert not ported.notes
    assert isinstance(ported.proof.gradients, float)
    x = torch.randn(5, 6)
    want = module(x).detach().numpy()
    assert np.abs(np.asarray(ported.model(jnp.asarray(x.numpy()))) - want).max() <= 1e-5


def test_an_addition_to_a_part_is_written_once() -> None:
    ported = port(Writes(added_to_columns), torch.randn(3, 6))
    assert ported.source.count(".at[:, 1:3].set(") == 1
