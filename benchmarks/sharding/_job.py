"""One of two processes that exchange a sharded tensor: prints the seconds of every call in every round, as JSON.

``python -m benchmarks.sharding._job RANK COUNT TORCH_PORT JAX_PORT ROUNDS CALLS``. Each candidate is called equally
often in every process, since some of them are collective.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchjax_bridge import to_jax, to_torch

from .._case import WrongResultError

__all__ = ["COPY", "FULL", "OURS", "OURS_BACK", "SHAPE"]

SHAPE = (4096, 1024)
FULL, COPY = "full_tensor(), then to_jax", "to_jax, copy=True"
OURS, OURS_BACK = "to_jax", "to_torch, mesh="


def main(rank: int, count: int, torch_port: str, jax_port: str, rounds: int, calls: int) -> None:
    """Check every candidate, time them in turn, and print the times."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=torch_port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{jax_port}", count, rank, initialization_timeout=120)
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("x",))
    source = distribute_tensor(torch.randn(SHAPE), mesh, [Shard(0)], src_data_rank=None)
    array = to_jax(source)
    candidates: dict[str, Callable[[], Any]] = {
        FULL: lambda: to_jax(source.full_tensor()),
        COPY: lambda: to_jax(source, copy=True),
        OURS: lambda: to_jax(source),
        OURS_BACK: lambda: to_torch(array, mesh=mesh),
    }
    shares = {name: _shares(call(), source, name) for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    times = {FULL: 1, COPY: 1, OURS: calls, OURS_BACK: calls}
    for _ in range(rounds):
        for name, call in candidates.items():
            torch.distributed.barrier()
            start = time.perf_counter()
            for _ in range(times[name]):
                result = call()
            if isinstance(result, jax.Array):
                jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / times[name])
    if rank == 0:
        print(json.dumps({"seconds": seconds, "calls": times, "shares": shares}))


def _shares(result: Any, source: Any, name: str) -> bool:
    """Whether a result is on the memory of the shard; raises if its values are not the shard's."""
    local = source.to_local()
    if not isinstance(result, jax.Array):
        found = result.to_local()
    else:
        found = to_torch(result.addressable_shards[0].data)
        found = (
            found[: len(local)]
            if name == FULL and torch.distributed.get_rank() == 0
            else found[-len(local) :]
        )
    if not torch.equal(found, local):
        raise WrongResultError(f"{name} gives other values")
    return found.data_ptr() == local.data_ptr()


if __name__ == "__main__":
    rank, count, torch_port, jax_port, rounds, calls = sys.argv[1:]
    main(int(rank), int(count), torch_port, jax_port, int(rounds), int(calls))
