"""Resuming after a kill: finished shards are kept if they belong to the same conversion."""

import errno
import pathlib
from typing import Any

import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import Flatten, convert, load_state_dict, save_flax, save_state_dict

from .bits import assert_same
from .mlp import sharded

Folder = pathlib.Path


def _interrupted(source: Folder, target: Folder, after: int, **options: Any) -> None:
    """Convert until ``after`` leaves are written, then stop without cleaning up, as a kill does."""

    class Killed(KeyboardInterrupt):
        pass

    options = {"to": "torch", "resume": True} | options

    count = 0

    def tick(_: int) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Killed

    with pytest.raises(Killed):
        convert(source, target, progress=lambda _: tick, **options)


def test_a_resumed_conversion_keeps_the_finished_shards(tmp_path: Folder) -> None:
    state = sharded(tmp_path / "torch")
    _interrupted(tmp_path / "torch", tmp_path / "out", after=6)
    assert not (tmp_path / "out").exists()
    part = tmp_path / ".out.part"
    finished = {path.name: path.stat().st_mtime_ns for path in part.glob("model-*")}
    assert finished
    convert(tmp_path / "torch", tmp_path / "out", to="torch", resume=True)
    for name, when in finished.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == when
    assert_same(load_state_dict(tmp_path / "out"), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "torch"]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".safetensors", ".json"}


def test_an_error_costs_no_finished_shards_of_what_is_to_be_resumed(tmp_path: Folder) -> None:
    state = sharded(tmp_path / "torch")
    _interrupted(tmp_path / "torch", tmp_path / "out", after=6)
    finished = sorted((tmp_path / ".out.part").glob("model-*.safetensors"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        convert(tmp_path / "torch", tmp_path / "out", to="torch", resume=True, progress=lambda _: full)
    assert finished
    assert sorted((tmp_path / ".out.part").glob("model-*.safetensors")) == finished
    convert(tmp_path / "torch", tmp_path / "out", to="torch", resume=True)
    assert_same(load_state_dict(tmp_path / "out"), state)


def test_a_kill_while_resuming_cannot_cost_what_was_finished(tmp_path: Folder) -> None:
    """The identifier of the work is written once, atomically: a kill while rewriting it could leave it empty."""
    sharded(tmp_path / "torch")
    _interrupted(tmp_path / "torch", tmp_path / "out", after=2)
    state = tmp_path / ".out.part" / ".unfinished"
    before = state.stat()
    _interrupted(tmp_path / "torch", tmp_path / "out", after=4)
    assert (state.stat().st_ino, state.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert state.read_text()


def test_a_conversion_with_other_settings_is_not_resumed(tmp_path: Folder) -> None:
    state = sharded(tmp_path / "torch")
    _interrupted(tmp_path / "torch", tmp_path / "out", after=6)
    with pytest.raises(CheckpointError, match="other settings"):
        convert(tmp_path / "torch", tmp_path / "out", to="torch", dtype=torch.float32, resume=True)
    convert(tmp_path / "torch", tmp_path / "out", to="torch")
    assert_same(load_state_dict(tmp_path / "out"), state)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(16, 2)


class NnxWide(nnx.Module):
    def __init__(self) -> None:
        self.conv = nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0))
        self.fc = nnx.Linear(16, 2, rngs=nnx.Rngs(0))


def test_a_conversion_with_other_rules_is_not_resumed(tmp_path: Folder) -> None:
    """The shards have the same names, shapes and dtypes: only the plan shows that the values differ."""
    save_state_dict(tmp_path / "torch", Wide().state_dict(), shard_size=1)
    template = nnx.eval_shape(NnxWide)
    wrong, right = [Flatten("fc", None)], [Flatten("fc", (4, 2, 2))]
    _interrupted(tmp_path / "torch", tmp_path / "out", 3, to="flax", template=template, rules=wrong)
    before = sorted(path.name for path in (tmp_path / ".out.part").iterdir())
    with pytest.raises(CheckpointError, match="other settings"):
        convert(tmp_path / "torch", tmp_path / "out", to="flax", template=template, rules=right, resume=True)
    assert sorted(path.name for path in (tmp_path / ".out.part").iterdir()) == before
    convert(tmp_path / "torch", tmp_path / "out", to="flax", template=template, rules=wrong, resume=True)


def test_another_entry_of_the_same_file_is_not_resumed(tmp_path: Folder) -> None:
    entries = {name: {f"{n}.weight": torch.full((4,), value) for n in range(4)} for name, value in
               (("model", 1.0), ("ema", 2.0))}  # fmt: skip
    torch.save(entries, tmp_path / "a.pt")
    _interrupted(tmp_path / "a.pt", tmp_path / "out", 3, key="model", shard_size=16)
    with pytest.raises(CheckpointError, match="other settings"):
        convert(tmp_path / "a.pt", tmp_path / "out", to="torch", key="ema", shard_size=16, resume=True)


def test_a_run_that_was_not_told_to_resume_can_be_resumed_after_a_kill(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = sharded(tmp_path / "torch")
    with monkeypatch.context() as killed:  # a kill removes nothing
        killed.setattr("torchjax_bridge.weights.files._atomic.shutil.rmtree", lambda *_, **__: None)
        _interrupted(tmp_path / "torch", tmp_path / "out", after=6, resume=False)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.part").glob("model-*")}
    assert finished
    convert(tmp_path / "torch", tmp_path / "out", to="torch", resume=True)
    assert finished == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert_same(load_state_dict(tmp_path / "out"), state)


def test_a_source_that_was_written_again_is_not_resumed(tmp_path: Folder) -> None:
    sharded(tmp_path / "torch")
    _interrupted(tmp_path / "torch", tmp_path / "out", after=6)
    sharded(tmp_path / "torch")
    with pytest.raises(CheckpointError, match="another source"):
        convert(tmp_path / "torch", tmp_path / "out", to="torch", resume=True)


def test_another_value_that_only_the_module_has_is_not_resumed(tmp_path: Folder) -> None:
    class Stack(nn.Module):
        def __init__(self, seen: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.BatchNorm1d(64) for _ in range(4))
            for layer in self.layers:
                layer.num_batches_tracked.fill_(seen)

    class Twin(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.BatchNorm(64, rngs=nnx.Rngs(0)) for _ in range(4)])

    save_flax(tmp_path / "flax", Twin(), shard_size=1024)
    _interrupted(tmp_path / "flax", tmp_path / "out", after=6, model=Stack(1))
    with pytest.raises(CheckpointError, match="cannot resume"):
        convert(tmp_path / "flax", tmp_path / "out", to="torch", model=Stack(2), resume=True)
    convert(tmp_path / "flax", tmp_path / "out", to="torch", model=Stack(1), resume=True)
    assert load_state_dict(tmp_path / "out")["layers.3.num_batches_tracked"] == 1
