"""The arithmetic of placements, for meshes of up to twelve ranks, without processes.

The oracle is torch's own split, applied to a tensor that holds its own indices; and JAX's own map of devices to
indices, over devices that are only numbers.
"""

import dataclasses
import itertools
import math
import types
from collections.abc import Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from torchjax_bridge import errors, torch_placements
from torchjax_bridge.exchange import _meshes, _placements

MESHES = [(4,), (2, 2), (3, 2), (2, 3), (1, 4), (2, 1, 2), (2, 2, 2), (2, 3, 2)]
P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX's mesh wants of a device."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"
    client: object = None


def mesh_of(shape: Sequence[int], **options: Any) -> Mesh:
    grid = np.empty(math.prod(shape), object)
    grid[:] = [Device(number) for number in range(len(grid))]
    return Mesh(grid.reshape(shape), tuple("abc"[: len(shape)]), **options)


def torchs(shape: Sequence[int]) -> Any:
    """What the arithmetic reads of a DeviceMesh."""
    return types.SimpleNamespace(ndim=len(shape), size=lambda at: shape[at], mesh_dim_names=None)


def split_by_torch(
    placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int], full: torch.Tensor
) -> torch.Tensor:
    """The shard at a coordinate: each mesh dimension chunks, a strided one within each of its pieces."""
    local = full
    for placement, size, at in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            dim, pieces = placement.dim, getattr(placement, "split_factor", 1)
            chunks = [piece.tensor_split(size, dim)[at] for piece in local.tensor_split(pieces, dim)]
            local = torch.cat(chunks, dim)
    return local


def split_by_jax(sharding: NamedSharding, coordinate: Sequence[int], full: torch.Tensor) -> torch.Tensor:
    device = sharding.mesh.devices[tuple(coordinate)]
    return full[sharding.devices_indices_map(tuple(full.shape))[device]]


def spec_of(placements: Sequence[Any], shape: Sequence[int], ndim: int) -> PartitionSpec | None:
    order = _placements._splitting_order(placements, torchs(shape), ndim)
    if isinstance(order, _placements.Refusal):
        return None
    return _placements._spec([["abc"[at] for at in splitting] for splitting in order])


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Any], int]:
    mesh, ndim = draw(st.sampled_from(MESHES)), draw(st.integers(1, 3))
    dims = st.integers(0, ndim - 1)
    strided = st.builds(_StridedShard, dims, split_factor=st.sampled_from([2, 3, 4, 6]))
    kinds = st.one_of(st.just(Replicate()), st.builds(Shard, dims), strided)
    return mesh, draw(st.lists(kinds, min_size=len(mesh), max_size=len(mesh))), ndim


@hypothesis.given(placed())
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_spec_gives_every_rank_the_elements_that_torch_gives_it(case) -> None:
    mesh, placements, ndim = case
    spec = spec_of(placements, mesh, ndim)
    hypothesis.assume(spec is not None)
    sharding = NamedSharding(mesh_of(mesh), spec)
    full = torch.arange(24**ndim).reshape((24,) * ndim)
    for coordinate in itertools.product(*map(range, mesh)):
        wanted = split_by_torch(placements, mesh, coordinate, full)
        assert torch.equal(split_by_jax(sharding, coordinate, full), wanted)


@st.composite
def specified(draw: st.DrawFn) -> NamedSharding:
    mesh, ndim = draw(st.sampled_from(MESHES)), draw(st.integers(1, 3))
    axes = draw(st.permutations("abc"[: len(mesh)]))
    parts: list[list[str]] = [[] for _ in range(ndim)]
    for axis in axes:
        if (dim := draw(st.integers(-1, ndim - 1))) >= 0:
            parts[dim].append(axis)
    return NamedSharding(mesh_of(mesh), P(*map(tuple, parts)))


@hypothesis.given(specified())
@hypothesis.settings(max_examples=150, deadline=None)
def test_placements_give_every_rank_the_elements_that_jax_gives_it(sharding) -> None:
    ndim, mesh = len(sharding.spec), sharding.mesh.devices.shape
    placements = torch_placements(sharding, ndim)
    full = torch.arange(24**ndim).reshape((24,) * ndim)
    for coordinate in itertools.product(*map(range, mesh)):
        wanted = split_by_jax(sharding, coordinate, full)
        assert torch.equal(split_by_torch(placements, mesh, coordinate, full), wanted)
    back = NamedSharding(sharding.mesh, spec_of(placements, mesh, ndim))
    assert back.is_equivalent_to(sharding, ndim)


@pytest.mark.parametrize(
    ("mesh", "placements", "spec"),
    [
        ((2, 2), [Shard(0), Shard(0)], P(("a", "b"))),
        (
            (2, 2),
            [_StridedShard(0, split_factor=2), Shard(0)],
            P(("b", "a")),
        ),  # FSDP2 over tensor parallelism
        ((2, 2), [Replicate(), Shard(1)], P(None, "b")),
        ((2, 3, 2), [_StridedShard(0, split_factor=3), Shard(0), Shard(0)], P(("b", "a", "c"))),
        ((2, 3, 2), [_StridedShard(0, split_factor=6), Shard(0), Shard(0)], P(("b", "c", "a"))),
        ((2, 2), [_StridedShard(0, split_factor=3), Shard(0)], None),
        ((2, 2), [Shard(0), _StridedShard(0, split_factor=2)], None),
        ((2, 2), [Shard(0)], None),
        ((2, 2), [Shard(0), Shard(5)], None),
        ((2, 2), [Shard(0), Partial()], None),
        ((2, 2), [Shard(0), type("Own", (Shard,), {})(0)], None),
    ],
)
def test_the_spec_of_placements(mesh, placements, spec) -> None:
    assert spec_of(placements, mesh, 2) == (spec if spec is None else P(*spec, *[None] * (2 - len(spec))))


def test_a_pending_sum_of_jax_is_refused() -> None:
    mesh = mesh_of((2, 2), axis_types=(AxisType.Explicit, AxisType.Explicit))
    pending = NamedSharding(mesh, P("a", unreduced={"b"}))
    with pytest.raises(errors.UnsupportedLeafError, match=r"a pending sum over \['b'\]"):
        torch_placements(pending, 1)


def test_a_sharding_without_names_is_refused() -> None:
    with pytest.raises(errors.UnsupportedLeafError, match="a SingleDeviceSharding"):
        torch_placements(jax.sharding.SingleDeviceSharding(jax.devices()[0]), 1)


def test_a_torch_without_strided_shards_refuses_only_them(monkeypatch) -> None:
    sharding = NamedSharding(mesh_of((2, 2)), P(("b", "a")))
    monkeypatch.setattr(_placements, "_strided_shard", lambda: None)
    with pytest.raises(errors.UnsupportedLeafError, match="cannot express"):
        torch_placements(sharding, 1)
    assert spec_of([_StridedShard(0, split_factor=2), Shard(0)], (2, 2), 1) is None
    assert torch_placements(NamedSharding(mesh_of((2, 2)), P(("a", "b"))), 1) == (Shard(0), Shard(0))


def test_ranks_that_lie_as_axes_do_are_found_in_a_mesh() -> None:
    devices = np.arange(24).reshape(2, 3, 4)
    for axes in [
        ((0,), (1,), (2,)),
        ((1,),),
        ((2,), (0,)),
        ((0, 1), (2,)),
        ((2, 0),),
        ((1, 2, 0),),
        ((), (1,)),
    ]:
        for at in (0, 1):
            chosen = [axis for group in axes for axis in group]
            part = devices[tuple(slice(None) if axis in chosen else at for axis in range(3))]
            part = part.transpose([sorted(chosen).index(axis) for axis in chosen])
            grid = part.reshape([math.prod(devices.shape[axis] for axis in group) for group in axes])
            assert _meshes.matching_axes(grid, devices) == axes


def test_ranks_that_lie_across_the_axes_are_not_found() -> None:
    devices = np.arange(8).reshape(2, 4)
    for ranks in ([0, 5], [0, 1], [1, 0], [3, 2, 1, 0], [0, 2, 4, 6], [8, 9], [[0, 1], [4, 5]]):
        assert _meshes.matching_axes(np.array(ranks), devices) is None
