"""The checkpoint of the job: saved by torch, converted in parts, restored by a JAX job on another mesh."""

import os
import pathlib
import subprocess
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchjax_bridge.weights import load_flax

from .models import FlaxModel, batch

__all__ = ["convert_in_parts", "restore", "save", "template"]

LOCAL_DEVICES = 2


def save(module: Any, folder: pathlib.Path) -> None:
    """Save the sharded module, each rank its own part; rank 0 also notes what the module computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch itself calls
        dcp.save({"model": module.state_dict()}, checkpoint_id=folder / "dcp")
    with torch.no_grad():
        logits = module(batch(10**6)[:, :-1]).numpy()
    if torch.distributed.get_rank() == 0:
        np.save(folder / "logits.npy", logits)


def template(mesh: Any = None) -> FlaxModel:
    """The Flax model with shapes for arrays: rows over axis ``x``, columns over ``y`` if the mesh has one.

    ``--mesh x=2,y=2`` of the command line makes a mesh without devices; a job gives its own.
    """
    mesh = mesh or jax.sharding.get_abstract_mesh()
    axes = tuple(mesh.axis_names)
    model = nnx.eval_shape(lambda: FlaxModel(nnx.Rngs(0)))
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            spec = PartitionSpec(*axes[: variable.ndim]) if variable.ndim > 1 else PartitionSpec()
            sharding = NamedSharding(mesh, spec)
            variable.set_value(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding))
    return model


def convert_in_parts(folder: pathlib.Path, parts: int) -> None:
    """DCP to Orbax by so many processes, chunked for a mesh of two by two devices that none of them has."""
    workers = []
    for part in range(parts):
        command = [
            sys.executable,
            "-m",
            "torchjax_bridge",
            "convert",
            str(folder / "dcp"),
            str(folder / "orbax"),
        ]
        command += ["--to", "flax", "--format", "orbax", "--template", "examples.sharded.checkpoint:template"]
        command += ["--mesh", "x=2,y=2", "--part", f"{part}/{parts}"]
        workers.append(subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}))
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("a part of the conversion failed")


def restore(rank: int, count: int, port: int, folder: pathlib.Path) -> None:
    """One process of a JAX job of ``count``: restores its own part of the model, and checks what it computes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", LOCAL_DEVICES)
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank, initialization_timeout=120)
    mesh = Mesh(np.array(jax.devices()).reshape(count, LOCAL_DEVICES), ("x", "y"))
    model = load_flax(folder / "orbax", template(mesh))
    kernel = model.blocks[0].up.kernel[...]
    forward = nnx.jit(
        lambda model, x: jax.lax.with_sharding_constraint(model(x), NamedSharding(mesh, PartitionSpec()))
    )
    tokens = jnp.asarray(batch(10**6)[:, :-1].numpy(), dtype=jnp.int32)
    logits = np.asarray(forward(model, tokens).addressable_shards[0].data)
    difference = float(np.abs(logits - np.load(folder / "logits.npy")).max())
    if difference > 1e-4:
        raise SystemExit(
            f"not so in process {rank}: the logits of the restored model differ by {difference:.1e}"
        )
    if rank == 0:
        where = f"{kernel.shape} lies as {kernel.sharding.spec} over {dict(mesh.shape)}"
        print(f"restore {count} processes with {LOCAL_DEVICES} devices each: {where}")
        print(f"check   JAX computes what torch saved: the logits differ by at most {difference:.1e}")
