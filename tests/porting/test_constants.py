"""A tensor that no state_dict holds becomes code that makes it again."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torchjax_bridge import port, to_state_dict
from torchjax_bridge.errors import PortError
from torchjax_bridge.porting._constants import constant_text
from torchjax_bridge.porting._placed import RefusedError
from torchjax_bridge.porting._tables import TABLES

INF = torch.inf


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((2, 3), -INF),
        torch.full((4,), 2.5, dtype=torch.bfloat16),
        torch.zeros(2, 2, dtype=torch.bool),
        torch.tensor([1.0, INF, -INF, torch.nan]),
        torch.tensor(torch.nan),
        torch.arange(100).reshape(10, 10),
        torch.arange(3, dtype=torch.int32),
        torch.ones(20, 20).tril(),
        torch.ones(1, 1, 20, 20, dtype=torch.bool).triu(),
        torch.ones(1, 1, 20, 20, dtype=torch.bool).tril().triu(-3),
        torch.tensor([[3, 1], [2, 7]], dtype=torch.uint8),
        torch.zeros(0),
        torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).repeat(32, 1, 1, 1),
        torch.arange(30)[:, None].expand(30, 5),
        torch.tensor([1.5, -2.0, 0.5])[:, None, None].expand(1, 3, 8, 8),
    ],
    ids=repr,
)
def test_the_code_makes_the_tensor_again(tensor: torch.Tensor) -> None:
    made = np.asarray(eval(constant_text(tensor, "a constant"), {"jnp": jnp}))
    assert str(made.dtype) == str(tensor.dtype).replace("torch.", "").replace("64", "32")
    assert made.shape == tuple(tensor.shape)
    np.testing.assert_array_equal(made.astype(np.float64), tensor.double().numpy())


def _places(height: int, width: int, stride: int = 1) -> torch.Tensor:
    """The coordinates of every ``stride``-th place of a map, ``(2, L)``."""
    axes = torch.arange(0, height, stride), torch.arange(0, width, stride)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def _offsets(height: int, width: int) -> torch.Tensor:
    """Swin's ``relative_position_index``."""
    apart = _places(height, width)[:, :, None] - _places(height, width)[:, None]
    return (apart[0] + height - 1) * (2 * width - 1) + apart[1] + width - 1


def _offsets_with_token(height: int, width: int) -> torch.Tensor:
    """BEiT's ``relative_position_index``."""
    count = (2 * height - 1) * (2 * width - 1)
    index = torch.nn.functional.pad(_offsets(height, width), (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = count, count + 1, count + 2
    return index


def _distances(height: int, width: int, stride: int = 1) -> torch.Tensor:
    """LeViT's ``attention_bias_idxs``."""
    apart = (_places(height, width, stride)[:, :, None] - _places(height, width)[:, None]).abs()
    return apart[0] * width + apart[1]


def _coordinates(height: int, width: int) -> torch.Tensor:
    axes = torch.arange(1.0 - height, height), torch.arange(1.0 - width, width)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _apart(height: int, width: int) -> torch.Tensor:
    """ConViT's ``rel_indices``."""
    y, x = (_places(height, width)[:, None] - _places(height, width)[:, :, None]).float()
    return torch.stack([x, y, x**2 + y**2], -1)[None]


def _logarithms(height: int, width: int, pretrained: int) -> torch.Tensor:
    """The ``relative_coords_table`` of the second Swin."""
    table = _coordinates(height, width)[None] / (pretrained - 1) * 8
    return table.sign() * torch.log2(table.abs() + 1) / np.log2(8)


def _mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> torch.Tensor:
    """Swin's ``attn_mask``: each place that a roll moves over the border is another region."""
    y, x = (
        torch.arange(n).ge(n - w).int() + (torch.arange(n).ge(n - s).int() if s else 0)
        for n, w, s in zip(size, window, shift, strict=True)
    )
    parted = (10 * y[:, None] + x).reshape(size[0] // window[0], window[0], size[1] // window[1], window[1])
    regions = parted.transpose(1, 2).reshape(-1, window[0] * window[1])
    return -100.0 * (regions[:, None] != regions[:, :, None])


def _waves(length: int, width: int, slowest: int, *, mixed: bool) -> torch.Tensor:
    """The positions of the annotated transformer, or with halves those of fairseq, in float32."""
    rates = torch.exp(torch.arange(width // 2).float() * (-np.log(10000.0) / slowest))
    angles = torch.arange(length).float()[:, None] * rates
    if not mixed:
        return torch.cat([angles.sin(), angles.cos()], 1)
    table = torch.zeros(length, width)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    return table


def _padded(table: torch.Tensor) -> torch.Tensor:
    table[1] = 0
    return table


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("tensor", "code"),
    [
        (_waves(50, 8, 4, mixed=True)[None], "sinusoids(50, 8, 4, mixed=True).reshape((1, 50, 8))"),
        (_waves(50, 8, 3, mixed=True), "sinusoids(50, 8, 3, mixed=True)"),
        (_waves(2000, 16, 8, mixed=False), "sinusoids(2000, 16, 8, mixed=False)"),
        (_padded(_waves(50, 8, 3, mixed=False)), "sinusoids(50, 8, 3, mixed=False, empty=1)"),
        (_offsets(4, 4), "offset_numbers(4, 4)"),
        (_offsets(3, 5)[None, None], "offset_numbers(3, 5).reshape((1, 1, 15, 15))"),
        (_offsets(3, 5).view(-1), "offset_numbers(3, 5).reshape(-1)"),
        (_offsets_with_token(4, 4), "offset_numbers_with_token(4, 4)"),
        (_offsets_with_token(3, 5), "offset_numbers_with_token(3, 5)"),
        (_distances(4, 5), "distance_numbers(4, 5)"),
        (_distances(5, 7, 2), "distance_numbers(5, 7, 2)"),
        (_coordinates(4, 3).sign() * _coordinates(4, 3).abs().log1p(), "logarithmic_offsets(4, 3)"),
        (_apart(3, 4), "offsets_and_distances(3, 4).reshape((1, 12, 12, 3))"),
        (_logarithms(4, 3, 6), "logarithmic_offsets(4, 3, (5, 5)).reshape((1, 7, 5, 2))"),
        (
            _mask((8, 8), (4, 4), (2, 2)).bfloat16(),
            "shifted_window_mask((8, 8), (4, 4), (2, 2), -100.0).astype(jnp.bfloat16)",
        ),
        (_mask((8, 8), (4, 4), (2, 2)), "shifted_window_mask((8, 8), (4, 4), (2, 2), -100.0)"),
        (_mask((6, 8), (3, 4), (1, 0)), "shifted_window_mask((6, 8), (3, 4), (1, 0), -100.0)"),
    ],
)
def test_tables_of_positions_are_made_by_a_function_of_the_file(tensor: torch.Tensor, code: str) -> None:
    space: dict[str, Any] = {"jax": jax, "jnp": jnp, "np": np}
    exec("\n".join(TABLES.values()), space)
    assert constant_text(tensor, "a table") == code
    made = np.asarray(eval(code, space))
    closeness = {"atol": 1e-7 * tensor.numel()} if code.startswith("sinusoids") else {"rtol": 1e-6}
    np.testing.assert_allclose(made.astype(np.float64), tensor.double().numpy(), **closeness)
    changed = tensor.clone()
    changed.view(-1)[7] += 1
    with pytest.raises(RefusedError):
        constant_text(changed, "a table")


@pytest.mark.parametrize(
    "tensor", [torch.randn(100), torch.ones(3, dtype=torch.complex64), torch.ones(3, device="meta")]
)
def test_other_tensors_are_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(RefusedError, match="the_table"):
        constant_text(tensor, "the_table")


class _Normalized(nn.Module):
    """Tensors in a list and in a dict, which no ``state_dict`` holds."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = [torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)]
        self.stats = {"std": torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean[0]) / self.stats["std"]


def test_numbers_that_the_code_spells_out_are_named() -> None:
    ported = port(nn.Sequential(nn.Identity(), _Normalized()), torch.rand(2, 3, 4, 4))
    for name in ("self.mean[0] of '1'", "self.stats['std'] of '1'"):
        note = f"the values of {name}, which no state_dict holds"
        assert note in ported.notes
        assert note in " ".join(ported.source.split())


class _KeepsItsTable(nn.Module):
    """LeViT's attention: what is computed of its weights is kept in evaluation, until it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 5))
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x + self.table[:, [0, 2, 1, 4, 3]]
        if "table" not in self.kept:
            self.kept["table"] = self.table[:, [0, 2, 1, 4, 3]]
        return x + self.kept["table"]


def test_what_was_kept_in_evaluation_is_no_constant() -> None:
    module, x = _KeepsItsTable().eval(), torch.randn(2, 3, 5)
    module(x)
    ported = port(module, x)
    assert "self.table[...]" in ported.source
    assert module.kept  # nothing of the caller's changes


class _Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.randn(9, 16), persistent=False)
        self.plain = torch.randn(9, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.hidden + self.plain


@pytest.mark.parametrize(
    "module", [_Tables(), nn.Sequential(_Tables(), nn.Sequential(_Tables()))], ids=["itself", "below"]
)
def test_what_a_refusal_of_a_table_tells_to_type_makes_the_port_hold(module: nn.Module) -> None:
    x = torch.randn(2, 9, 16)
    with pytest.raises(PortError) as refused:
        port(module, x)
    lines = re.findall(r"a buffer that is saved: (.*)", str(refused.value))
    assert len(lines) == 2 * sum(isinstance(part, _Tables) for part in module.modules())
    for line in lines:
        exec(line, {"module": module})
    ported = port(module, x)
    assert sorted(to_state_dict(ported.model, module, rules=ported.rules)) == sorted(module.state_dict())
    np.testing.assert_allclose(ported.model(jnp.asarray(x.numpy())), module(x).numpy(), rtol=1e-6)


class _OwnTensor(nn.Module):
    """A tensor that is no parameter and no buffer."""

    def __init__(self, own: torch.Tensor) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.own


def test_few_values_of_a_plain_tensor_are_written_out_and_said() -> None:
    ported = port(_OwnTensor(torch.rand(64)), torch.randn(2, 64))
    assert "jnp.asarray(" in ported.source
    assert any("values of self.own" in note and "no state_dict" in note for note in ported.notes)


def test_many_values_of_a_plain_tensor_are_code_or_are_refused() -> None:
    assert (
        "jnp.arange(100, dtype=jnp.float32)"
        in port(_OwnTensor(torch.arange(100.0)), torch.randn(2, 100)).source
    )
    with pytest.raises(PortError, match=r"self\.own(.|\n)*is held by no state_dict(.|\n)*register_buffer"):
        port(_OwnTensor(torch.rand(65)), torch.randn(2, 65))


_OUTSIDE = torch.rand(4)


class _ReadsOutside(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * _OUTSIDE


def test_a_tensor_that_no_module_holds_is_refused() -> None:
    with pytest.raises(PortError, match="no parameter, no buffer and made by no function"):
        port(_ReadsOutside(), torch.randn(2, 4))
