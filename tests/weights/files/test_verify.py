"""Comparing two checkpoints: what differs, by how much, and what can be compared at all."""

import math
import pathlib

import jax.numpy as jnp
import pytest
import torch
from flax import serialization
from torch import nn

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import compare_checkpoints, save_flax, save_state_dict
from torchjax_bridge.weights.files import Comparison, TensorDifference

Folder = pathlib.Path


def _found(folder: Folder, one: torch.Tensor, other: torch.Tensor) -> TensorDifference:
    save_state_dict(folder / "a.safetensors", {"w": one})
    save_state_dict(folder / "b.safetensors", {"w": other})
    (found,) = compare_checkpoints(folder / "a.safetensors", folder / "b.safetensors").differences
    return found


def test_equal_infinities_and_nans_do_not_hide_how_far_the_rest_is(tmp_path: Folder) -> None:
    one, other = (torch.tensor([math.inf, -math.inf, math.nan, last]) for last in (1.0, 3.5))
    found = _found(tmp_path, one, other)
    assert (found.elements, found.largest) == (1, 2.5)
    raw, twin = (torch.tensor([0x7F, last], dtype=torch.uint8) for last in (0x38, 0x40))  # NaN; 1 and 2
    found = _found(tmp_path, raw.view(torch.float8_e4m3fn), twin.view(torch.float8_e4m3fn))
    assert (found.elements, found.largest) == (1, 1.0)


def test_a_nan_on_one_side_is_a_nan_apart(tmp_path: Folder) -> None:
    found = _found(tmp_path, torch.tensor([1.0, 2.0]), torch.tensor([5.0, math.nan]))
    assert found.elements == 2
    assert math.isnan(found.largest)


def test_integers_that_a_double_cannot_tell_apart_differ_by_one(tmp_path: Folder) -> None:
    found = _found(tmp_path, torch.tensor([2**62]), torch.tensor([2**62 + 1]))
    assert (found.elements, found.largest) == (1, 1.0)


def test_differences_are_counted_over_all_of_a_large_tensor(tmp_path: Folder) -> None:
    one = torch.zeros((1 << 20) * 2 + 5)
    other = one.clone()
    other[[0, 1 << 20, -1]] = torch.tensor([1.0, 7.0, 2.0])
    found = _found(tmp_path, one, other)
    assert (found.elements, found.largest) == (3, 7.0)


def test_a_key_that_neither_file_has_is_refused(tmp_path: Folder) -> None:
    for name, value in (("a.pt", 1.0), ("b.pt", 2.0)):
        torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.full((2,), value)}}, tmp_path / name)
    save_state_dict(tmp_path / "c.safetensors", {"w": torch.ones(2)})
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "d.pt")
    save_flax(tmp_path / "orbax", {"params": {"w": jnp.ones(2)}}, format="orbax")
    for other in ("d.pt", "c.safetensors", "orbax"):
        with pytest.raises(CheckpointError, match="no entry 'eam'"):
            compare_checkpoints(tmp_path / "d.pt", tmp_path / other, key="eam")
    assert compare_checkpoints(tmp_path / "a.pt", tmp_path / "c.safetensors", key="ema").ok
    assert not compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", key="ema").ok


def test_files_that_name_no_framework_are_compared_by_their_names(tmp_path: Folder) -> None:
    from safetensors.torch import save_file

    for name in "ab":
        save_file({"x": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    assert compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors").same == 1


def test_a_bare_parameter_tree_is_compared_from_either_side(tmp_path: Folder) -> None:
    tree = {"Dense_0": {"kernel": jnp.ones((2, 3))}}
    save_flax(tmp_path / "whole.msgpack", {"params": tree})
    (tmp_path / "bare.msgpack").write_bytes(serialization.to_bytes(tree))
    assert compare_checkpoints(tmp_path / "whole.msgpack", tmp_path / "bare.msgpack").same == 1
    assert compare_checkpoints(tmp_path / "bare.msgpack", tmp_path / "whole.msgpack").same == 1


def test_conjugate_views_are_compared_by_their_values(tmp_path: Folder) -> None:
    value = torch.randn(3, dtype=torch.complex64)
    torch.save({"w": value.conj()}, tmp_path / "a.pt")
    save_state_dict(tmp_path / "b.safetensors", {"w": value.conj().resolve_conj()})
    assert compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.safetensors").ok


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_two_torch_files_are_compared_by_what_is_one_tensor_in_the_model(tmp_path: Folder) -> None:
    table = torch.rand(5, 4)
    states = {
        "both": {"embed.weight": table, "head.weight": table.clone()},
        "first": {"embed.weight": table},
        "second": {"head.weight": table},
        "wrapped": {"module.embed.weight": table},
        "conflicting_ties": {"embed.weight": table, "head.weight": table + 1},
    }
    for name, state in states.items():
        save_state_dict(tmp_path / f"{name}.safetensors", state)

    def compare(one: str, other: str, model: nn.Module | None) -> Comparison:
        return compare_checkpoints(
            tmp_path / f"{one}.safetensors", tmp_path / f"{other}.safetensors", model=model
        )

    with torch.device("meta"):
        model = _Tied()
    for one in ("both", "first", "second", "wrapped"):
        for other in ("both", "first", "second", "wrapped"):
            found = compare(one, other, model)
            assert (found.ok, found.same) == (True, 2)
    assert not compare("both", "first", None).ok
    for other in ("both", "first"):
        (found,) = compare("conflicting_ties", other, model).differences
        assert (found.name, found.elements) == ("head.weight", 20)
    save_state_dict(tmp_path / "more.safetensors", {"embed.weight": table, "extra": torch.ones(2)})
    assert [one.name for one in compare("first", "more", model).differences] == ["extra"]
