"""What needs no second process: torch.distributed is loaded only when it is used, and one rank is a job too."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchjax_bridge import errors, jax_mesh, to_jax, to_torch, torch_mesh
from torchjax_bridge.exchange import _dlpack


def test_neither_the_package_nor_a_crossing_loads_dtensor() -> None:
    code = (
        "import sys, torch, jax, torchjax_bridge as bridge\n"
        "before = set(sys.modules)\n"
        "for name in bridge.__all__: getattr(bridge, name)\n"
        "bridge.to_torch(bridge.to_jax({'a': torch.ones(2), 'b': [torch.ones(3)]}))\n"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('torch.distributed')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("junk", [None, "cpu", torch.device("cpu"), 3])
def test_what_is_no_mesh_raises(junk) -> None:
    for function in (jax_mesh, torch_mesh):
        with pytest.raises(errors.DeviceError, match="is no mesh"):
            function(junk)


# --- several host devices in one process -------------------------------------------------------------


def over(*axes: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b")), PartitionSpec(*axes))


def test_rows_become_shards_on_the_same_memory_and_columns_are_copied() -> None:
    tensor = torch.arange(64.0 * 16).reshape(64, 16)
    rows = to_jax({"w": tensor}, device=over(("a", "b")), copy=False)["w"]
    assert rows.sharding == over(("a", "b"))
    for shard in rows.addressable_shards:
        assert shard.data.unsafe_buffer_pointer() == tensor[shard.index].data_ptr()
    columns = to_jax(tensor, device=over("a", "b"))
    assert np.array_equal(jax.jit(lambda a, b: a @ b.T)(rows, columns), (tensor @ tensor.t()).numpy())
    with pytest.raises(errors.ShareError, match=r"'w'.*no run of rows"):
        to_jax({"w": tensor}, device=over("a", "b"), copy=False)
    with pytest.raises(errors.ShareError, match="multiple of 64"):
        to_jax(torch.ones(8, 3), device=over("a"), copy=False)
    back = to_torch([shard.data for shard in rows.addressable_shards])
    assert torch.equal(torch.cat(back), tensor)
    assert back[1].data_ptr() == tensor[16:].data_ptr()


def test_a_copy_over_devices_has_memory_of_its_own() -> None:
    tensor = torch.ones(64, 16)
    copied = to_jax(tensor, device=over("a"), copy=True)
    tensor.zero_()
    assert np.array_equal(copied, np.ones((64, 16)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_tensors_of_any_strides_compute_right_over_devices(order) -> None:
    tensor = torch.arange(4.0 * 8 * 16).reshape(4, 8, 16).permute(order)
    for axes in [(), ("a",), (None, "b"), (None, None, ("a", "b")), ("b", None, "a")]:
        array = to_jax(tensor, device=over(*axes))
        assert np.array_equal(jax.jit(lambda a: a * 2)(array), (tensor * 2).numpy())


def test_leaves_over_devices_are_checked_as_ever() -> None:
    with pytest.raises(errors.UnsupportedLeafError, match="does not divide"):
        to_jax(torch.ones(3), device=over("a"))
    with pytest.raises(errors.UnsupportedLeafError, match="requires grad"):
        to_jax(torch.ones(4, requires_grad=True), device=over("a"))
    assert to_jax(torch.arange(4), device=over("a")).dtype == "int32"
    assert to_jax({"n": 3, "a": np.ones(4)[::2].astype("f4")}, device=over("a"))["n"] == 3
    array = to_jax(jax.numpy.ones(4), device=over("a"))
    assert array.sharding == over("a")


@pytest.mark.parametrize("path", ["fast", "public"])
def test_every_host_device_can_hold_a_part_on_both_paths(path) -> None:
    before = _dlpack.choice().path
    _dlpack.set_path(path)
    try:
        tensor = torch.arange(64.0 * 4).reshape(4, 64)
        array = to_jax(tensor, device=over(("b", "a")))
        assert np.array_equal(array, tensor.numpy())
        if path == "public":
            with pytest.raises(errors.ShareError, match="no way to give"):
                to_jax(tensor, device=over(("b", "a")), copy=False)
    finally:
        _dlpack.set_path(before)
