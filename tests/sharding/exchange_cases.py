"""Cases of exchange in a job of several processes. Every process runs each of them, in this order."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from torchjax_bridge import errors, jax_mesh, jax_sharding, to_jax, to_torch, torch_mesh, torch_placements
from torchjax_bridge.exchange._dtypes import TORCH_TO_JAX

P = PartitionSpec


def line() -> DeviceMesh:
    size = torch.distributed.get_world_size()
    return init_device_mesh("cpu", (size,), mesh_dim_names=("x",))


def placed(full: torch.Tensor, mesh: DeviceMesh, placements: list) -> DTensor:
    """A DTensor made without communication: gloo has no int16, and no float8."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def every_bit_pattern(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """NaNs and their payloads, infinities, subnormal numbers; the same in every process."""
    count = int(np.prod(shape))
    if dtype is torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(shape)
    random = np.random.default_rng(0).integers(0, 256, count * dtype.itemsize, np.uint8)
    if dtype.itemsize <= 2:  # all that there are
        random = np.resize(np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}"), count).view(np.uint8)
    return torch.from_numpy(random).clone().view(dtype).reshape(shape)  # in memory that torch aligned


def raw(local: torch.Tensor) -> bytes:
    return local.contiguous().view(torch.uint8).numpy().tobytes()


def refused(kind: type[Exception], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        call()


def case_the_mesh_of_jax_has_the_device_of_each_rank_where_torch_has_the_rank() -> None:
    mesh = line()
    found = jax_mesh(mesh)
    assert found.axis_names == ("x",)
    assert found.devices[torch.distributed.get_rank()] == jax.local_devices()[0]
    assert found.devices.tolist() != jax.devices()  # JAX counts the other way round here
    assert jax_mesh(mesh) is found
    assert jax_mesh(found) is found
    assert torch_mesh(found) == mesh
    assert jax_mesh(init_device_mesh("cpu", mesh.shape)).axis_names == ("dim_0",)


def case_a_mesh_of_jax_becomes_torchs_and_back() -> None:
    own = Mesh(jax_mesh(line()).devices.reshape(1, -1), ("a", "b"))
    mesh = torch_mesh(own)
    assert mesh.mesh_dim_names == ("a", "b")
    assert mesh.mesh.tolist() == [list(range(len(jax.devices())))]
    assert jax_mesh(mesh) is own
    assert torch_mesh(own) is mesh


def case_a_mesh_whose_ranks_do_not_ascend_is_refused() -> None:
    """torch's ``full_tensor`` sorts the ranks of a group, so its shards lie otherwise than its offsets say."""
    ranks = list(reversed(range(len(jax.devices()))))
    turned = DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=("turned",))
    value = placed(torch.arange(float(2 * len(ranks))), turned, [Shard(0)])
    words = "Along an axis they must ascend"
    refused(errors.DeviceError, words, lambda: jax_mesh(turned))
    refused(errors.DeviceError, words, lambda: to_jax(value))
    refused(errors.DeviceError, words, lambda: jax_sharding(turned, [Shard(0)], 1))
    refused(errors.DeviceError, words, lambda: torch_mesh(Mesh(jax_mesh(line()).devices[::-1], ("x",))))


def case_every_dtype_crosses_both_ways_on_the_same_memory_bit_for_bit() -> None:
    mesh = line()
    size = mesh.size()
    with jax.enable_x64(True):
        for dtype in TORCH_TO_JAX:
            full = every_bit_pattern(dtype, (64 * size, 512))
            for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
                source = placed(full, mesh, placements)
                array = to_jax(source, copy=False)
                shard = array.addressable_shards[0]
                assert array.shape == full.shape
                assert array.sharding == jax_sharding(mesh, placements, 2)
                assert shard.data.unsafe_buffer_pointer() == source.to_local().data_ptr()
                local = full.view(torch.uint8).reshape(*full.shape, -1)[shard.index].contiguous()
                assert np.asarray(shard.data).tobytes() == local.numpy().tobytes()
                back = to_torch(array, copy=False, mesh=mesh)
                assert (back.placements, back.shape, back.stride()) == (
                    tuple(placements),
                    full.shape,
                    source.stride(),
                )
                assert back.to_local().data_ptr() == source.to_local().data_ptr()
                assert raw(back.to_local()) == raw(source.to_local())
                assert back.dtype is dtype


def case_jax_computes_with_the_whole_value() -> None:
    mesh = line()
    full = torch.arange(8.0 * mesh.size()).reshape(4 * mesh.size(), 2)
    for source in (placed(full, mesh, [Shard(0)]), placed(full, mesh, [Shard(0)]).t()):
        array = to_jax(source)
        total, product = jax.jit(lambda a: (a.sum(), a.T @ a))(array)
        whole = full if source.shape == full.shape else full.t()
        assert float(total.addressable_shards[0].data) == float(full.sum())
        product = jax.device_put(product, NamedSharding(array.sharding.mesh, P()))
        assert np.array_equal(product.addressable_shards[0].data, (whole.t() @ whole).numpy())


def case_a_number_is_replicated() -> None:
    mesh = line()
    array = to_jax(DTensor.from_local(torch.tensor(3.0), mesh, [Replicate()], run_check=False))
    assert array.sharding == NamedSharding(jax_mesh(mesh), P())
    assert float(array.addressable_shards[0].data) == 3.0
    assert to_torch(array, mesh=mesh).to_local().item() == 3.0


def case_a_transposed_tensor_is_shared_and_comes_back_with_its_strides() -> None:
    mesh = line()
    full = torch.arange(128.0 * mesh.size()).reshape(2 * mesh.size(), 64)
    source = placed(full, mesh, [Shard(0)]).t()
    array = to_jax(source, copy=False)
    assert array.sharding.spec == P(None, "x")
    back = to_torch(array, copy=False, mesh=mesh)
    assert back.stride() == source.stride()
    assert torch.equal(back.to_local(), source.to_local())


def case_copy_gives_memory_of_its_own() -> None:
    mesh = line()
    source = placed(torch.ones(mesh.size(), 64), mesh, [Shard(0)])
    array = to_jax(source, copy=True)
    source.to_local().fill_(7.0)
    assert float(array.addressable_shards[0].data[0, 0]) == 1.0
    tensor = to_torch(array, copy=True, mesh=mesh)
    assert tensor.to_local().data_ptr() != array.addressable_shards[0].data.unsafe_buffer_pointer()
    odd = DTensor.from_local(torch.ones(65)[1:], mesh, [Shard(0)], run_check=False)
    refused(errors.ShareError, "64", lambda: to_jax(odd, copy=False))
    assert to_jax(odd).shape == (64 * mesh.size(),)


def case_a_tree_crosses_with_its_plain_leaves_and_its_repeated_ones() -> None:
    mesh = line()
    source = placed(torch.ones(mesh.size(), 4), mesh, [Shard(0)])
    tree = {"w": source, "again": [source], "plain": torch.ones(2), "name": "n", "none": None}
    arrays = to_jax(tree)
    assert arrays["w"] is arrays["again"][0]
    assert arrays["plain"].sharding.num_devices == 1
    back = to_torch(arrays, mesh=mesh)
    assert type(back["w"]) is DTensor
    assert type(back["plain"]) is torch.Tensor
    assert back["w"] is back["again"][0]
    assert back["name"] == "n"


def case_a_result_of_a_collective_is_waited_for() -> None:
    mesh = line()
    size = mesh.size()
    sharded = placed(torch.arange(256.0 * size), mesh, [Shard(0)])
    gathered = sharded.redistribute(placements=[Replicate()], async_op=True)
    assert np.array_equal(to_jax(gathered).addressable_shards[0].data, np.arange(256.0 * size))


def case_64_bit_integers_are_narrowed_or_refused() -> None:
    mesh = line()
    with jax.enable_x64(False):
        small = to_jax(placed(torch.arange(2 * mesh.size()), mesh, [Shard(0)]))
        assert small.dtype == jnp.int32
        large = placed(torch.full((mesh.size(),), 2**40), mesh, [Shard(0)])
        refused(errors.NarrowingError, "'a'", lambda: to_jax({"a": large}))
        double = placed(torch.ones(mesh.size(), dtype=torch.float64), mesh, [Shard(0)])
        refused(errors.DtypeError, "x64", lambda: to_jax(double))


def case_what_has_no_counterpart_is_refused_in_words() -> None:
    mesh = line()
    size = mesh.size()
    full = torch.ones(2 * size, 4)
    partial = DTensor.from_local(full, mesh, [Partial()], run_check=False)
    words = (
        "a DTensor with a pending sum over mesh dim 'x'. Call .redistribute(placements=[Replicate()]) first."
    )
    refused(errors.UnsupportedLeafError, words, lambda: to_jax({"p": partial}))
    refused(errors.UnsupportedLeafError, words, lambda: jax_sharding(mesh, [Partial()], 2))
    rows, lie = (10, "3, 3, 3, 1") if size == 4 else (3, "2, 1")
    uneven = placed(torch.ones(rows), mesh, [Shard(0)])
    words = f"{rows} rows on {size} ranks lie {lie}; a jax.Array needs equal shards"
    refused(errors.UnsupportedLeafError, words, lambda: to_jax({"u": uneven}))
    needs = placed(full, mesh, [Shard(0)]).requires_grad_()
    refused(errors.UnsupportedLeafError, "requires grad", lambda: to_jax(needs))
    assert to_jax(needs.detach()).shape == full.shape
    refused(errors.UnsupportedLeafError, "one device", lambda: to_jax(needs.detach(), device="cpu"))
    wrong = DTensor.from_local(
        torch.ones(3), mesh, [Shard(0)], run_check=False, shape=full.shape, stride=(4, 1)
    )
    refused(errors.UnsupportedLeafError, "whose shard here has shape (3,)", lambda: to_jax(wrong))
    lonely = Mesh(np.array(jax.local_devices()), ("x",))
    words = f"a DTensor on ranks {tuple(range(size))}, and the mesh is over other devices"
    refused(errors.UnsupportedLeafError, words, lambda: to_jax(needs.detach(), mesh=lonely))
    strided = DTensor.from_local(full, mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    refused(errors.UnsupportedLeafError, "cannot express", lambda: to_jax(strided))
    array = to_jax(needs.detach())
    refused(errors.UnsupportedLeafError, "Pass mesh=torch_mesh(array.sharding.mesh)", lambda: to_torch(array))
    refused(errors.UnsupportedLeafError, "one device", lambda: to_torch(array, device="cpu", mesh=mesh))
    open_axis = NamedSharding(jax_mesh(mesh), P(P.UNCONSTRAINED))
    refused(errors.UnsupportedLeafError, "cannot express", lambda: torch_placements(open_axis, 1))


def case_another_mesh_over_the_same_processes_may_be_asked_for() -> None:
    mesh = line()
    own = Mesh(jax_mesh(mesh).devices.reshape(1, -1), ("a", "b"))
    array = to_jax(placed(torch.ones(mesh.size()), mesh, [Shard(0)]), mesh=own)
    assert array.sharding == NamedSharding(own, P("b"))
    assert to_torch(array, mesh=mesh).placements == (Shard(0),)
    assert to_torch(array, mesh=own).placements == (Replicate(), Shard(0))


# --- of four processes -------------------------------------------------------------------------------


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def four_every_placement_of_two_dimensions_crosses_both_ways() -> None:
    mesh = grid()
    full = torch.arange(64.0 * 64).reshape(64, 64)
    kinds = [Replicate(), Shard(0), Shard(1)]
    pairs = [[one, other] for one in kinds for other in kinds]
    for placements in [*pairs, *([_StridedShard(dim, split_factor=2), Shard(dim)] for dim in (0, 1))]:
        sharding = jax_sharding(mesh, placements, 2)
        index = sharding.devices_indices_map((64, 64))[jax.local_devices()[0]]
        local = full[index].contiguous()
        source = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
        )
        assert torch.equal(source.full_tensor(), full)  # torch reads the placements as JAX does
        array = to_jax(source, copy=False)
        assert array.addressable_shards[0].data.unsafe_buffer_pointer() == local.data_ptr()
        whole = jax.device_put(array, NamedSharding(array.sharding.mesh, P()))
        assert np.array_equal(whole.addressable_shards[0].data, full.numpy())
        back = to_torch(array, copy=False, mesh=mesh)
        assert back.placements == tuple(placements)
        assert back.to_local().data_ptr() == local.data_ptr()


def four_a_part_of_a_mesh_is_a_part_of_the_whole_on_every_rank() -> None:
    mesh = grid()
    part = placed(torch.arange(8.0), mesh["dp"], [Shard(0)])
    array = to_jax(part)
    assert array.sharding == NamedSharding(jax_mesh(mesh), P("dp"))
    total = jax.jit(lambda a, b: (a * b).sum())(
        array, to_jax(placed(torch.ones(8), mesh, [Shard(0), Shard(0)]))
    )
    assert float(total.addressable_shards[0].data) == 28.0
    assert to_torch(array, mesh=mesh["dp"]).placements == (Shard(0),)
    assert to_torch(array, mesh=mesh).placements == (Shard(0), Replicate())
    split = to_jax(placed(torch.ones(8), mesh, [Shard(0), Shard(0)]))
    refused(errors.UnsupportedLeafError, "cannot express", lambda: to_torch(split, mesh=mesh["dp"]))


def four_a_flattened_dimension_is_both_of_its_axes() -> None:
    mesh = grid()
    flat = mesh._flatten("all")
    array = to_jax(placed(torch.arange(8.0), flat, [Shard(0)]))
    assert array.sharding == NamedSharding(jax_mesh(mesh), P(("dp", "tp")))
    assert to_torch(array, mesh=flat).placements == (Shard(0),)


def four_a_rank_outside_the_mesh_is_told_so() -> None:
    half = DeviceMesh("cpu", [0, 1], mesh_dim_names=("x",))
    source = DTensor.from_local(torch.ones(4), half, [Shard(0)], run_check=False)
    if torch.distributed.get_rank() < 2:
        array = to_jax(source)
        assert array.shape == (8,)
        assert array.sharding.num_devices == 2
        words = "a DTensor on ranks (0, 1), and the mesh is over other devices"
        others = Mesh(np.array(jax.devices()[:2]), ("x",))  # of ranks 3 and 2
        refused(errors.UnsupportedLeafError, words, lambda: to_jax(source, mesh=others))
        everywhere = to_jax(source, mesh=Mesh(jax_mesh(line()).devices.reshape(2, 2), ("a", "b")))
        assert everywhere.sharding.spec == P("b")
    else:
        refused(errors.DeviceError, "rank", lambda: to_jax(source))
        jax_mesh(line())
