"""Checkpoints: what is read, what is refused, and that nothing is half-written."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from examples.cifar10 import atomic, checkpoint
from torchjax_bridge.errors import CheckpointError


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_safetensors_come_back_as_they_were_written(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    state["0.weight"] = state["0.weight"].permute(0, 1, 3, 2)  # not row-major
    checkpoint.write(path, state, {"seed": "3"})
    assert same(checkpoint.read(path), state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"seed": "3"}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "best_prec1": 91.7, "args": None}])
def test_torch_files_are_read_bare_and_wrapped(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, zipped: bool, wrap
) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    assert same(checkpoint.read(path), state)


def test_the_prefix_of_data_parallel_is_dropped_only_where_every_name_has_it(tmp_path: Path) -> None:
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save({"module.a": torch.ones(1), "module.module.b": torch.ones(1)}, one)
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, other)
    assert list(checkpoint.read(one)) == ["a", "module.b"]
    assert list(checkpoint.read(other)) == ["module.a", "b"]


def test_the_third_party_checkpoint_is_read_without_its_prefix(shared: Path) -> None:
    state = checkpoint.read(shared / "data/checkpoints/resnet20-12fca82f.th")
    assert len(state) == 97
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    assert state["layer3.2.bn2.running_var"].shape == (64,)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".th"])
def test_a_file_cut_anywhere_gives_one_line(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        checkpoint.write(path, state)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",)

    torch.save({"state_dict": {"a": torch.ones(1)}, "trap": Trap()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="It is not loaded"):
        checkpoint.read(tmp_path / "a.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="Save the state_dict alone, as safetensors"):
        checkpoint.read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"holds a list, not a state_dict$"),
        (torch.zeros(2), r"holds a Tensor, not a state_dict$"),
        ({}, r"holds no tensors$"),
        ({"a": torch.zeros(1), "epoch": 3, 5: torch.zeros(1)}, r"state_dict of named tensors: see epoch, 5$"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / "a.pt")


def test_a_missing_file_and_an_unknown_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^there is no checkpoint .*a\.pt$"):
        checkpoint.read(tmp_path / "a.pt")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a\.bin is neither a \.safetensors nor a \.pt, \.pth or \.th"):
        checkpoint.read(tmp_path / "a.bin")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path,
    state: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(*names: object) -> None:
        raise error

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(error):
        checkpoint.write(path, state)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"old"


def test_writing_into_no_folder_is_an_error_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere$"):
        checkpoint.write(tmp_path / "nowhere" / "a.safetensors", {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []
