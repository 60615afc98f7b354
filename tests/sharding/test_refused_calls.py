"""Calls that run in one process refuse what all processes of a job hold; one rank is a job too."""

import pathlib
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.distributed as dist
from flax import nnx
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from torchjax_bridge import as_jax_function, as_jax_module, as_torch_function, errors, link, port, to_flax
from torchjax_bridge.weights import load_state_dict


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


def under_fsdp(mesh: DeviceMesh) -> nn.Module:
    return fully_shard(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), mesh=mesh["dp"])


def in_parallel(mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(nn.Sequential(nn.Linear(4, 8)), mesh["tp"], {"0": ColwiseParallel()})


@pytest.mark.parametrize("shard", [under_fsdp, in_parallel])
def test_a_sharded_module_is_not_called_from_jax(mesh: DeviceMesh, shard) -> None:
    module, x = shard(mesh), jnp.ones((2, 4))
    why = "under fully_shard" if shard is under_fsdp else "'0.weight' is a DTensor"
    for wrapped in (as_jax_function(module), as_jax_function(lambda x: module(x) * 2)):
        with pytest.raises(
            errors.ArgumentError, match=f"as_jax_function cannot run a sharded module: .*{why}"
        ):
            wrapped(x)
    with pytest.raises(errors.ArgumentError, match=f"as_jax_module cannot run a sharded module: .*{why}"):
        as_jax_module(module)
    # A trace would have left fake tensors in what FSDP keeps.
    assert torch.isfinite(module(torch.ones(2, 4))).all()


def test_a_module_that_is_sharded_once_it_is_wrapped_is_refused_by_the_next_trace(mesh: DeviceMesh) -> None:
    module = nn.Linear(4, 8)
    wrapped = as_jax_function(module)
    wrapped(jnp.ones((2, 4)))
    fully_shard(module, mesh=mesh["dp"])
    with pytest.raises(errors.ArgumentError, match="cannot run a sharded module: 'FSDPLinear'"):
        wrapped(jnp.ones((3, 4)))


def test_a_dtensor_is_no_argument_of_a_wrapped_jax_function(mesh: DeviceMesh) -> None:
    dtensor = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Replicate()])
    double = as_torch_function(lambda tree: jax.tree.map(lambda a: a * 2, tree))
    double({"w": torch.ones(4, 4)})  # a program for the same shapes is there
    for argument, name in ((dtensor, r"args\[0\]"), ({"w": dtensor}, r"args\[0\]\['w'\]")):
        with pytest.raises(errors.ArgumentError, match=rf"{name} is a DTensor.*to_jax\(dtensor\)"):
            double(argument)
    assert torch.equal(double(dtensor.to_local()), torch.full((4, 4), 2.0))


def test_what_needs_a_whole_module_says_so(mesh: DeviceMesh) -> None:
    whole, twin = (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh()),
        nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.tanh),
    )
    both = link(whole, twin)
    fully_shard(whole, mesh=mesh["dp"])
    module = under_fsdp(mesh)
    for refused in (lambda: link(module, twin), both.push, both.pull):
        with pytest.raises(errors.PlanError, match=r"'0.weight' is a DTensor.*to_flax\(module, template\)"):
            refused()
    with pytest.raises(errors.ArgumentError, match="cannot copy FSDPSequential"):
        port(module, torch.ones(2, 4))
    template = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.tanh))
    assert to_flax(module, template).layers[0].kernel.shape == (4, 8)


def test_a_torch_file_of_shards_says_so_in_a_job_and_outside(
    mesh: DeviceMesh, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "rank.pt"
    torch.save(under_fsdp(mesh).state_dict(), file)
    with pytest.raises(errors.CheckpointError, match=r"holds DTensors.*torch\.distributed\.checkpoint"):
        load_state_dict(file)
    code = f"from torchjax_bridge.weights import load_state_dict; load_state_dict({str(file)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "holds DTensors, and of each the shard of one process" in done.stderr
