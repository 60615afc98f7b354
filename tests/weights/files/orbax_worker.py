"""One of two processes that save one tree together, as a program on several hosts does.

``python orbax_worker.py RANK PORT FOLDER``: every array is spread over both processes, or held by both.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NO_COLLECTIVES = 77
SHAPES = {"Dense_0": (64, 96), "Dense_1": (96, 32)}
SPREAD = {"Dense_0": PartitionSpec("x", None), "Dense_1": PartitionSpec(None, "x")}


def values() -> dict[str, dict[str, np.ndarray]]:
    """The tree, the same in every process: bf16 with every bit pattern, and float32."""
    random = np.random.default_rng(0)
    tree = {}
    for name, shape in SHAPES.items():
        bits = random.integers(0, 2**16, shape, np.uint16)
        bias = random.standard_normal(shape[1]).astype(np.float32)
        tree[name] = {"kernel": bits.view(jax.numpy.bfloat16), "bias": bias}
    return tree


def main(rank: int, port: str, folder: pathlib.Path) -> None:
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=60)
        devices = jax.devices()
    except (AttributeError, RuntimeError, ValueError) as err:
        sys.stderr.write(f"no collectives between processes: {err}\n")
        raise SystemExit(NO_COLLECTIVES) from err
    import orbax.checkpoint as ocp

    mesh = Mesh(np.array(devices), ("x",))

    def placed(array: np.ndarray, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])

    tree = {
        "params": {
            name: {
                "kernel": placed(layer["kernel"], SPREAD[name]),
                "bias": placed(layer["bias"], PartitionSpec()),
            }
            for name, layer in values().items()
        }
    }
    with ocp.CheckpointManager(folder / "manager") as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "standard", tree)
    restore_in_parts(folder, rank, mesh, placed)
    for name, ocdbt, zarr3 in (("files", False, False), ("zarr3", True, True), ("zarr3 files", False, True)):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder / name, ocp.args.PyTreeSave(tree))


def restore_in_parts(folder: pathlib.Path, rank: int, mesh: Mesh, placed: Any) -> None:
    """Save arrays that no process holds whole by `save_flax`, and restore them; notes what was read and held."""
    from torchjax_bridge.weights import load_flax, save_flax

    want = np.arange(512 * 1024, dtype=np.float32).reshape(512, 1024)
    specs = {"rows": PartitionSpec("x"), "columns": PartitionSpec(None, "x")}
    save_flax(
        folder / "ours", {"params": {n: placed(want, spec) for n, spec in specs.items()}}, format="orbax"
    )
    found: dict[str, Any] = {"refused": refusals(folder, placed)}
    for name, turned in (("same", specs), ("other", dict(zip(specs, reversed(specs.values()), strict=True)))):
        template = {
            "params": {
                n: jax.ShapeDtypeStruct(want.shape, "float32", sharding=NamedSharding(mesh, spec))
                for n, spec in turned.items()
            }
        }
        before = bytes_read()
        tree = load_flax(folder / "ours", template)["params"]
        read = bytes_read() - before
        shards = [shard for array in tree.values() for shard in array.addressable_shards]
        exact = all(np.array_equal(np.asarray(shard.data), want[shard.index]) for shard in shards)
        found[name] = {"read": read, "share": sum(shard.data.nbytes for shard in shards), "exact": exact}
    (folder / f"restored-{rank}.json").write_text(json.dumps(found))


def refusals(folder: pathlib.Path, placed: Any) -> list[str]:
    """What is said where a save would lose something; in every process the same."""
    from torchjax_bridge.errors import CheckpointError
    from torchjax_bridge.weights import load_flax, save_flax

    def tree(value: float) -> dict[str, Any]:
        return {"params": {"w": placed(np.full((4, 4), value, np.float32), PartitionSpec("x"))}}

    for name in ("mine", "old"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "mine" / "thesis.txt").write_text("mine")
    save_flax(folder / "old", tree(1), format="orbax")
    save_flax(folder / "mine" / ".." / "new", tree(2), format="orbax")
    save_flax(folder / "new", tree(3), format="orbax")
    assert load_flax(folder / "new")["params"]["w"].tolist() == [[3.0] * 4] * 4
    said = []
    for name, options in (
        ("mine", {}),
        ("old", {"overwrite": False}),
        ("no/such", {}),
        ("old", {"shard_size": 9}),
    ):
        try:
            save_flax(folder / name, tree(4), format="orbax", **options)
        except CheckpointError as err:
            said.append(str(err).replace(str(folder), "FOLDER"))
    assert load_flax(folder / "old")["params"]["w"].tolist() == [[1.0] * 4] * 4
    return said


def bytes_read() -> int:
    try:
        lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
