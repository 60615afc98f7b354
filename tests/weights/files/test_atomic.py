"""Output is complete or absent: on a full disk, on an error, on a kill, and with a second writer."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest
import torch

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import convert, load_state_dict, open_checkpoint, save_flax, save_state_dict
from torchjax_bridge.weights.files import _pipeline
from torchjax_bridge.weights.files._atomic import atomic_file, atomic_folder, partial_path

from .bits import assert_same

Folder = pathlib.Path


def names(folder: Folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state(seed: int, count: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"layer.{n}.weight": torch.randn(64, 48).t() for n in range(count)}


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["m.safetensors", "m.pt", "folder"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_one_error_and_leaves_the_old_state(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, target: str, there: bool
) -> None:
    if there:
        save_state_dict(tmp_path / target, state(0))
    before = names(tmp_path)
    room = 40_000
    write = _pipeline._write

    def full(tensor: torch.Tensor, file: BinaryIO, at: int | None, progress: Any) -> None:
        nonlocal room
        room -= tensor.nbytes
        if room < 0:
            raise OSError(28, "No space left on device")
        write(tensor, file, at, progress)

    monkeypatch.setattr(_pipeline, "_write", full)
    with pytest.raises(CheckpointError, match=f"cannot write .*/{target}.*: No space left on device"):
        save_state_dict(tmp_path / target, state(1))
    assert names(tmp_path) == before
    if there:
        assert_same(load_state_dict(tmp_path / target), state(0))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_short_write_of_the_system_is_seen(tmp_path: Folder) -> None:
    from torchjax_bridge.weights.files._leaf import Leaf

    tensor = torch.ones(10)
    leaf = Leaf("w", ("w",), tensor.dtype, (10,), lambda: tensor)
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):  # noqa: SIM117
        with _pipeline.Pipeline(1 << 20).running() as pipeline:
            pipeline.write(leaf, file)


@pytest.mark.parametrize("target", ["m.safetensors", "folder"])
def test_a_source_that_is_damaged_halfway_leaves_nothing(tmp_path: Folder, target: str) -> None:
    save_state_dict(tmp_path / "src", state(0), shard_size=30_000)
    last = tmp_path / "src" / open_checkpoint(tmp_path / "src").shards[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(tmp_path / "src", tmp_path / target, to="torch")
    assert names(tmp_path) == ["src"]


@pytest.mark.parametrize("target", ["m.safetensors", "m.pt", "m"])
def test_an_interrupt_leaves_nothing(tmp_path: Folder, target: str) -> None:
    save_state_dict(tmp_path / "src", state(0), shard_size=30_000)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "src", tmp_path / target, to="torch", progress=lambda _: interrupt)
    assert names(tmp_path) == ["src"]


def test_a_target_that_cannot_be_written_is_refused_before_the_work(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "m.pt", state(0))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.pt").mkdir()
    for target, match in (
        ("no/where/m.pt", "there is no folder"),
        ("file", "a file of that name exists"),
        ("folder.pt", "a folder of that name exists"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert(tmp_path / "m.pt", tmp_path / target, to="torch", progress=lambda _: _began)
    with pytest.raises(CheckpointError, match="shards need a folder"):
        convert(tmp_path / "m.pt", tmp_path / "o.safetensors", to="torch", shard_size=100)
    assert names(tmp_path) == ["file", "folder.pt", "m.pt"]


def _began(_: int) -> None:
    pytest.fail("something was written")


# --- two writers, and the output of a killed one ---------------------------------------------------------


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path: Folder) -> None:
    with atomic_file(tmp_path / "m") as file:
        file.write(b"first")
        with pytest.raises(CheckpointError, match="another process"), atomic_file(tmp_path / "m"):
            pass
    assert (tmp_path / "m").read_bytes() == b"first"
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(CheckpointError, match="another process"), atomic_folder(tmp_path / "f"):
            pass
    assert names(tmp_path / "f") == ["a"]


def test_the_unfinished_output_of_a_killed_writer_is_reused(tmp_path: Folder) -> None:
    partial_path(tmp_path / "m").write_bytes(b"something much longer than what comes")
    with atomic_file(tmp_path / "m") as file:
        file.write(b"new")
    assert (tmp_path / "m").read_bytes() == b"new"
    part = partial_path(tmp_path / "f")
    (part / "sub").mkdir(parents=True)
    (part / "sub" / "x").write_text("old")
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("new")
    assert names(tmp_path / "f") == ["a"]
    assert names(tmp_path) == ["f", "m"]


def test_a_link_with_the_name_of_the_part_file_is_not_followed(tmp_path: Folder) -> None:
    (tmp_path / "victim").write_text("precious")
    partial_path(tmp_path / "m").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match="cannot write"), atomic_file(tmp_path / "m"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_is_replaced_in_one_step(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "m", state(0), shard_size=30_000)
    save_state_dict(tmp_path / "m", state(1))
    assert names(tmp_path / "m") == ["model.safetensors"]
    assert names(tmp_path) == ["m"]
    save_flax(tmp_path / "m", {"params": {"w": torch_to_jax()}}, format="orbax")
    save_state_dict(tmp_path / "m", state(0))
    assert names(tmp_path / "m") == ["model.safetensors"]


def torch_to_jax() -> Any:
    import jax.numpy as jnp

    return jnp.ones(3)


# --- kills ---------------------------------------------------------------------------------------------

# Imports once and forks for every conversion, so that a kill costs milliseconds.
_NURSERY = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from torchjax_bridge.weights import convert
torch.set_num_threads(1)
for line in sys.stdin:
    source, target, dtype, resume, pace = line.split()
    child = os.fork()
    if child == 0:
        def tick(_):
            time.sleep(float(pace))
        convert(source, target, to="torch", dtype=getattr(torch, dtype), overwrite=True, resume=resume == "1",
                progress=lambda _: tick)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """Starts conversions in processes of their own, to be killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    def convert(
        self,
        source: Folder,
        target: Folder,
        dtype: str,
        *,
        resume: bool,
        pace: float,
        kill_after: float | None,
    ) -> int:
        """Convert, with a pause after each leaf; kill it if that is asked. Gives the process' status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{source} {target} {dtype} {int(resume)} {pace}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.process.communicate()


def _is_old_or_new(target: Folder, old: dict[str, torch.Tensor]) -> torch.dtype:
    found = load_state_dict(target)
    dtype = next(iter(found.values())).dtype
    assert_same(found, {name: tensor.to(dtype) for name, tensor in old.items()})
    return dtype


@pytest.mark.every(3)
@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["m.safetensors", "folder", "m.pt"])
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new(
    tmp_path: Folder, nursery: Nursery, name: str, rounds: int
) -> None:
    old = state(0, count=20)
    save_state_dict(tmp_path / "src", old, shard_size=30_000)
    save_state_dict(tmp_path / name, old)
    chance = random.Random(7)
    kills = 0
    for _ in range(rounds):
        before = _is_old_or_new(tmp_path / name, old)
        dtype = "float64" if before == torch.float32 else "float32"
        delay = chance.uniform(0.0, 0.15)
        status = nursery.convert(
            tmp_path / "src", tmp_path / name, dtype, resume=False, pace=0.004, kill_after=delay
        )
        after = _is_old_or_new(tmp_path / name, old)
        kills += status == signal.SIGKILL
        assert status == signal.SIGKILL or after != before
        assert set(names(tmp_path)) <= {"src", name, f".{name}.part"}
    assert kills > rounds // 3
    convert(tmp_path / "src", tmp_path / name, to="torch", overwrite=True)
    assert names(tmp_path) == sorted(["src", name])


@pytest.mark.parametrize("repeats", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Folder, nursery: Nursery, repeats: int) -> None:
    old = state(0, count=20)
    save_state_dict(tmp_path / "src", old, shard_size=30_000)
    chance = random.Random(3)
    for turn in range(repeats):
        out = tmp_path / f"out{turn}"
        finished: dict[str, int] = {}
        for attempt in range(50):
            if out.exists() or (finished and attempt > 3):
                break
            delay = chance.uniform(0.05, 0.25) * (
                1 + attempt / 4
            )  # a busy machine finishes less in that time
            nursery.convert(tmp_path / "src", out, "float32", resume=True, pace=0.02, kill_after=delay)
            now = {path.name: path.stat().st_mtime_ns for path in partial_path(out).glob("model-*")}
            assert out.exists() or finished.items() <= now.items()
            finished = finished if out.exists() else now
        if not out.exists():
            nursery.convert(tmp_path / "src", out, "float32", resume=True, pace=0.0, kill_after=None)
        assert finished
        for shard, when in finished.items():
            assert (out / shard).stat().st_mtime_ns == when
        assert_same(load_state_dict(out), old)
        assert json.loads((out / "model.safetensors.index.json").read_text())
        assert not partial_path(out).exists()


# --- unusual file systems --------------------------------------------------------------------------------


def test_a_link_to_a_folder_is_followed_and_stays(tmp_path: Folder) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for seed in (1, 2):
        save_state_dict(tmp_path / "link", state(seed))
        assert_same(load_state_dict(tmp_path / "real"), state(seed))
    assert names(tmp_path) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()


def test_a_file_system_that_cannot_swap_names_is_refused_before_the_work(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state_dict(tmp_path / "m", state(0))
    read: list[int] = []

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("torchjax_bridge.weights.files._atomic._swap", refuse)
    with pytest.raises(CheckpointError, match="cannot replace a folder in one step"):
        convert(tmp_path / "m", tmp_path / "m", to="torch", overwrite=True, progress=lambda _: read.append)
    assert not read
    assert names(tmp_path) == ["m"]
    assert_same(load_state_dict(tmp_path / "m"), state(0))
    save_state_dict(tmp_path / "new", state(1))  # needs no swap
    assert_same(load_state_dict(tmp_path / "new"), state(1))


def test_a_file_system_without_locks_is_written_to(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    save_state_dict(tmp_path / "m", state(1))
    assert_same(load_state_dict(tmp_path / "m"), state(1))


def test_a_folder_of_orbax_with_other_files_is_not_replaced(tmp_path: Folder) -> None:
    tree = {"params": {"w": torch_to_jax()}}
    save_flax(tmp_path / "m", tree, format="orbax")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'notes.txt'"):
        save_flax(tmp_path / "m", tree, format="orbax")
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
