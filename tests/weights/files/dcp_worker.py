"""One of several processes that train a small sharded model and save it with torch Distributed Checkpoint.

``python dcp_worker.py RANK PORT FOLDER COUNT``: with two processes FSDP2, with four FSDP2 over tensor
parallelism. Rank 0 also saves the whole values, for comparison.
"""

import os
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

LABELS = {"seed": 7, "names": ["a", "b"]}


def model() -> nn.Sequential:
    """Widths that do not divide by two, and one (1) that leaves the second rank without a row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 8), nn.Linear(8, 1))


def main(rank: int, port: str, folder: pathlib.Path, count: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=count)
    (save_one_axis if count == 2 else save_two_axes)(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def save_two_axes(rank: int, folder: pathlib.Path) -> None:
    """Rows that tensor parallelism and FSDP2 both split are strided: the ranks hold them out of order."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    state = get_model_state_dict(net)
    dcp.save({"model": state}, checkpoint_id=folder / "strided")
    whole = {name: full(tensor) for name, tensor in state.items()}
    if rank == 0:
        torch.save(whole, folder / "whole.pt")


def save_one_axis(rank: int, folder: pathlib.Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    net = model()
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        net(torch.randn(4, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        "model": get_model_state_dict(net),
        "optim": get_optimizer_state_dict(net, optimizer),
        "step": 2,
        "labels": LABELS,
    }
    dcp.save(state, checkpoint_id=folder / "fsdp")
    whole = {name: full(tensor) for name, tensor in state["model"].items()}
    raw = torch.randint(0, 2**15, (6, 10), dtype=torch.int16, generator=torch.manual_seed(1)).view(
        torch.bfloat16
    )
    plain = {
        "rows": distribute_tensor(raw, mesh, [Shard(0)]),
        "columns": distribute_tensor(raw, mesh, [Shard(1)]),
        "replica": distribute_tensor(raw, mesh, [Replicate()]),
        "transposed": distribute_tensor(raw.t().contiguous(), mesh, [Shard(1)]).t(),
    }
    dcp.save(plain, checkpoint_id=folder / "plain")
    if rank == 0:
        torch.save({"model": whole, "plain": raw}, folder / "whole.pt")


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4]))
