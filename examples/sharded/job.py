"""What each process of the job does: train in torch, cross, train on in JAX over the same mesh, come back.

Both frameworks share the processes. Rank 0 prints, and every check holds on every rank or the job fails.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchjax_bridge import jax_mesh, to_flax, to_state_dict

from .checkpoint import save
from .models import FlaxModel, TorchModel, batch

__all__ = ["run", "start"]

RATE = 3e-3


def start(rank: int, count: int, torch_port: int, jax_port: int) -> DeviceMesh:
    """Start both frameworks on the same processes, each with one CPU device."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(torch_port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{jax_port}", count, rank, initialization_timeout=120)
    return init_device_mesh("cpu", (count,), mesh_dim_names=("data",))


def run(device_mesh: DeviceMesh, steps: int, folder: pathlib.Path) -> None:
    """The whole journey; checkpoints go below ``folder``."""
    say = _aloud if torch.distributed.get_rank() == 0 else _silent
    torch.manual_seed(0)
    module = TorchModel()
    for block in module.blocks:
        fully_shard(block, mesh=device_mesh)
    fully_shard(module, mesh=device_mesh)
    say(f"torch   {device_mesh.size()} ranks, {_held(module)} of the weights on each")
    losses = train_in_torch(module, device_mesh, range(steps))
    say(f"torch   {steps} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    mesh = jax_mesh(device_mesh)
    twin = to_flax(module, nnx.eval_shape(lambda: FlaxModel(nnx.Rngs(0))))
    kernel = twin.blocks[0].up.kernel[...]
    check(kernel.sharding.is_fully_replicated is False, "the kernels of the Flax model are sharded")
    say(f"cross   {kernel.shape} lies as {kernel.sharding.spec} over {dict(mesh.shape)}")
    compare(device_mesh, module, twin, "JAX computes what torch computed", say)

    losses = train_in_jax(twin, device_mesh, range(steps, 2 * steps))
    say(f"jax     {steps} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    state = to_state_dict(twin, module)
    check(
        all(type(value) is DTensor for value in state.values()), "every tensor that comes back is a DTensor"
    )
    module.load_state_dict(state)
    compare(device_mesh, module, twin, "torch computes what JAX computed", say)
    losses = train_in_torch(module, device_mesh, range(2 * steps, 3 * steps))
    say(f"torch   {steps} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    save(module, folder)
    say("save    a checkpoint of torch, each rank its own part")


def train_in_torch(module: Any, device_mesh: DeviceMesh, steps: range) -> list[float]:
    """Train on this rank's part of each batch; FSDP2 averages the gradients."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE)
    losses = []
    for step in steps:
        tokens = batch(step).chunk(device_mesh.size())[device_mesh.get_rank()]
        logits = module(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / device_mesh.size())
    return losses


def train_in_jax(model: FlaxModel, device_mesh: DeviceMesh, steps: range) -> list[float]:
    """Train over the same mesh: the batch is sharded over it, as the weights are."""
    sharding = NamedSharding(jax_mesh(device_mesh), PartitionSpec("data"))
    optimizer = nnx.Optimizer(model, optax.adamw(RATE, weight_decay=1e-2), wrt=nnx.Param)

    @nnx.jit
    def advance(model: FlaxModel, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        def loss_of(model: FlaxModel) -> jax.Array:
            logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    losses = []
    for step in steps:
        tokens = batch(step).to(torch.int32).numpy()
        whole = jax.make_array_from_callback(tokens.shape, sharding, tokens.__getitem__)
        losses.append(float(_local(advance(model, optimizer, whole))))
    return losses


def compare(
    device_mesh: DeviceMesh, module: Any, model: FlaxModel, claim: str, say: Callable[[str], None]
) -> None:
    """Check that both models give the same logits."""
    tokens = batch(10**6)[:, :-1]
    with torch.no_grad():
        ours = module(tokens).numpy()
    # Each process gives the whole batch, so the result is whole in each too.
    everywhere = NamedSharding(jax_mesh(device_mesh), PartitionSpec())
    forward = nnx.jit(lambda model, x: jax.lax.with_sharding_constraint(model(x), everywhere))
    theirs = _local(forward(model, jnp.asarray(tokens.numpy(), dtype=jnp.int32)))
    difference = float(np.abs(ours - theirs).max())
    check(difference < 1e-4, f"{claim}: the logits differ by {difference:.1e}")
    say(f"check   {claim}: the logits differ by at most {difference:.1e}")


def check(holds: bool, claim: str) -> None:
    """End the job unless a claim holds."""
    if not holds:
        raise SystemExit(f"not so on rank {torch.distributed.get_rank()}: {claim}")


def _local(array: jax.Array) -> np.ndarray:
    return np.asarray(array.addressable_shards[0].data)


def _held(module: Any) -> str:
    whole = sum(tensor.numel() for tensor in module.parameters())
    return f"{sum(tensor.to_local().numel() for tensor in module.parameters()) / whole:.0%}"


def _aloud(line: str) -> None:
    print(line, flush=True)


def _silent(_: str) -> None: ...
