"""Orbax checkpoints that two processes wrote together, each its own pieces of every array."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax.numpy as jnp
import pytest
import torch
from torch import nn

from torchjax_bridge.weights import (
    compare_checkpoints,
    convert,
    load_flax,
    load_state_dict,
    open_checkpoint,
    save_flax,
)

from .bits import bits
from .orbax_worker import NO_COLLECTIVES, values

pytest.importorskip("orbax.checkpoint")

Folder = pathlib.Path
WORKER = pathlib.Path(__file__).with_name("orbax_worker.py")
LAYOUTS = ("manager", "standard", "files", "zarr3", "zarr3 files")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder with one tree in every layout, written by two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), port, str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if any(worker.returncode == NO_COLLECTIVES for worker in workers):
        pytest.skip(f"this JAX has no collectives between processes on the CPU: {said[0].strip()[-200:]}")
    assert [worker.returncode for worker in workers] == [0, 0], said
    return folder


def wanted() -> dict[str, object]:
    return {
        "params": {
            name: {key: jnp.asarray(array) for key, array in layer.items()}
            for name, layer in values().items()
        }
    }


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Dense_0 = nn.Linear(64, 96)
        self.Dense_1 = nn.Linear(96, 32)


@pytest.mark.slow
def test_both_processes_wrote_a_part(saved: Folder) -> None:
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= {path.name for path in (saved / "standard").iterdir()}
    assert {"0.0", "1.0"} <= {path.name for path in (saved / "files" / "params.Dense_0.kernel").iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_several_processes_wrote_is_read_to_the_bit(saved: Folder, layout: str) -> None:
    assert open_checkpoint(saved / layout).framework == "flax"
    found = load_flax(saved / layout)["params"]
    for name, layer in values().items():
        for key, array in layer.items():
            assert bits(found[name][key]) == bits(jnp.asarray(array)), (name, key)


@pytest.mark.parametrize("layout", ["manager", "zarr3 files"])
def test_what_several_processes_wrote_converts_and_compares(
    saved: Folder, tmp_path: Folder, layout: str
) -> None:
    convert(saved / layout, tmp_path / "f.safetensors", to="flax")
    save_flax(tmp_path / "want.msgpack", wanted())
    assert compare_checkpoints(tmp_path / "f.safetensors", tmp_path / "want.msgpack").ok
    assert compare_checkpoints(saved / layout, saved / "files").ok
    with torch.device("meta"):
        model = Net()
    convert(saved / layout, tmp_path / "m.pt", to="torch", model=model)
    state = load_state_dict(tmp_path / "m.pt")
    for name, layer in values().items():
        assert bits(state[f"{name}.weight"])[2] == bits(jnp.asarray(layer["kernel"].T))[2]


def test_a_process_of_a_job_writes_and_reads_its_own_parts_only(saved: Folder) -> None:
    for rank in range(2):
        found = json.loads((saved / f"restored-{rank}.json").read_text())
        assert found["same"]["exact"] is found["other"]["exact"] is True
        assert found["same"]["share"] == 2 << 20  # half of two arrays of 2 MiB
        assert (
            found["same"]["read"] < 1.05 * found["same"]["share"] + 30_000
        )  # with the index and the metadata


def test_a_job_loses_nothing_that_lies_at_its_target(saved: Folder) -> None:
    said = [json.loads((saved / f"restored-{rank}.json").read_text())["refused"] for rank in range(2)]
    assert said[0] == said[1]
    for words, line in zip(
        (
            "FOLDER/mine: it holds 'thesis.txt', which is not part of a checkpoint",
            "FOLDER/old: it exists. Pass overwrite=True",
            "there is no folder FOLDER/no",
            "shard_size has no effect",
        ),
        said[0],
        strict=True,
    ):
        assert words in line
    assert (saved / "mine" / "thesis.txt").read_text() == "mine"
    assert not [path for path in saved.iterdir() if ".part" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lacking", "why"),
    [
        ("ocdbt.process_1", "Orbax failed: "),
        pytest.param("manifest.ocdbt", "files that its _METADATA lists", marks=pytest.mark.slow),
    ],
)
def test_a_copy_that_lacks_a_part_is_one_error(
    saved: Folder, tmp_path: Folder, lacking: str, why: str
) -> None:
    shutil.copytree(saved / "standard", tmp_path / "half")
    part = tmp_path / "half" / lacking
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    # In a process of its own, where what the threads of TensorStore say must not be heard.
    done = subprocess.run(
        [sys.executable, "-m", "torchjax_bridge", "convert", "half", "o.safetensors", "--to", "flax"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: half: {why}")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
