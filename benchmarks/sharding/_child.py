"""One run of something with a checkpoint, in a process of its own: prints its CPU seconds, wall time and memory.

``python -m benchmarks.sharding._child TASK ARGUMENTS...``. It says that it is ready when its imports are over, and
starts the clock when it reads a line, so that several start at one time.
"""

import functools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchjax_bridge.weights import convert, load_flax, load_state_dict, save_flax, save_state_dict, to_flax

__all__ = ["MEMORY", "TASKS", "WIDTH", "template"]

WIDTH = 2048
MEMORY = 64 << 20
_BLOCK = 16 << 20
_SHARDS = 4


class _Net(nnx.Module):
    """Square layers; the kernel of each is sharded along its outputs."""

    def __init__(self, count: int) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(count)])


@functools.cache
def template(count: int, mesh: Any = None, *, one_device: bool = False) -> nnx.Module:
    """The Flax side, over a mesh of four, or of the devices of all processes, or without one."""
    net = nnx.eval_shape(lambda: _Net(count))
    if one_device:
        return net
    mesh = mesh or jax.sharding.AbstractMesh((_SHARDS,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    for layer in net.layers:
        layer.kernel.set_value(jax.ShapeDtypeStruct((WIDTH, WIDTH), "bfloat16", sharding=sharding))
    return net


def nothing() -> None:
    """Long enough to be seen: what the imports hold."""
    time.sleep(0.1)


def make(target: str, count: str) -> None:
    """A DCP checkpoint of so many bf16 layers, each in the chunks that four ranks would save."""
    values = torch.randn(WIDTH, WIDTH).bfloat16()
    save_state_dict(target, {f"layers.{n}.weight": values for n in range(int(count))}, format="dcp")


def copy(source: str, target: str, part: str = "0/1") -> None:
    """The files of a folder, or this part of each, by plain reads and writes."""
    number, parts = map(int, part.split("/"))
    Path(target).mkdir(exist_ok=True)
    for file in Path(source).iterdir():
        begin, end = (file.stat().st_size * place // parts for place in (number, number + 1))
        made = os.open(Path(target) / file.name, os.O_WRONLY | os.O_CREAT, 0o666)
        with file.open("rb", buffering=0) as since, os.fdopen(made, "wb", buffering=0) as to:
            since.seek(begin)
            to.seek(begin)
            while begin < end:
                begin += to.write(since.read(min(_BLOCK, end - begin)))


def relay(source: str, target: str) -> None:
    """The files of a folder, with every block of 16 MiB read as square matrices that are transposed."""
    Path(target).mkdir()
    read, turned = (torch.empty(_BLOCK, dtype=torch.uint8) for _ in range(2))
    from_squares, to_squares = (one.view(torch.bfloat16).view(-1, WIDTH, WIDTH) for one in (read, turned))
    for file in Path(source).iterdir():
        with file.open("rb", buffering=0) as since, (Path(target) / file.name).open("wb", buffering=0) as to:
            while count := since.readinto(read.numpy().data):
                for square, its_turn in zip(from_squares, to_squares, strict=True):
                    its_turn.copy_(square.mT)
                to.write(turned[:count].numpy().data)


def stream(source: str, target: str, count: str, part: str = "0/1") -> None:
    """DCP to Orbax with a transposition of every kernel, block by block."""
    number, parts = map(int, part.split("/"))
    convert(
        source,
        target,
        to="flax",
        format="orbax",
        template=template(int(count)),
        memory=MEMORY,
        part=(number, parts),
    )


def whole(source: str, target: str, count: str) -> None:
    """What one does by hand: load all, convert all, save all."""
    structs = template(int(count), one_device=True)
    save_flax(target, to_flax(load_state_dict(source, copy=True), structs), format="orbax")


def merge(source: str, target: str, _: str) -> None:
    """The tool that torch has for a DCP checkpoint: one file of ``torch.save``."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(source, target)


def restore(source: str, count: str, rank: str, world: str, port: str) -> dict[str, float]:
    """One of several processes that restore a sharded model: the bytes that it reads, and those of its share."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(world), int(rank), initialization_timeout=120)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    structs = template(int(count), mesh)
    before = _read_bytes()
    found = load_flax(source, structs)
    read = _read_bytes() - before
    share = sum(shard.data.nbytes for layer in found.layers for shard in layer.kernel[...].addressable_shards)
    multihost_utils.sync_global_devices("read")
    return {"read": read, "share": share}


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task for task in (nothing, make, copy, relay, stream, whole, merge, restore)
}


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def main(task: str, *arguments: str) -> None:
    """Run a task and print what it took, as JSON."""
    if task in (
        "stream",
        "whole",
        "restore",
        "nothing",
    ):  # the user's model and the imports are no part of it
        import orbax.checkpoint  # noqa: F401
    if task in ("stream", "whole"):
        template(int(arguments[2]), **({"one_device": True} if task == "whole" else {}))
    print("ready", flush=True)
    sys.stdin.readline()
    ended = threading.Event()
    with ThreadPoolExecutor(1) as watcher:
        anonymous = watcher.submit(_peak_anonymous, ended)
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            found = TASKS[task](*arguments) or {}
            took = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        finally:
            ended.set()
    print(json.dumps({**took, "anonymous": anonymous.result(), **found}))


def _peak_anonymous(ended: threading.Event) -> int:
    """The most memory that is no view of a file, seen every few milliseconds; with that of the imports."""
    peak = 0
    while not ended.wait(0.005):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024)
    return peak


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(*sys.argv[1:])
