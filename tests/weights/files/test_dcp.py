"""Checkpoints of torch Distributed Checkpoint are read to the bit, in any cut, without running their pickles."""

import contextlib
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import compare_checkpoints, convert, load_state_dict, open_checkpoint
from torchjax_bridge.weights.files._leaf import Leaf
from torchjax_bridge.weights.files._mapped import Window

from .bits import assert_same, bits, torch_state
from .dcp_worker import model

Folder = pathlib.Path
WORKER = pathlib.Path(__file__).with_name("dcp_worker.py")


def save(state: dict[str, Any], folder: Folder, **options: Any) -> Folder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that only one process saves
        dcp.save(state, checkpoint_id=folder, **options)
    return folder


def edit(folder: Folder, change: Any) -> Folder:
    """Change the metadata, as a faulty tool would."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def state() -> dict[str, torch.Tensor]:
    odd = torch.randn(3, dtype=torch.complex64).conj()
    return torch_state() | {
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "double": torch.randn(3, dtype=torch.complex128),
        "negative": odd.imag,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """What two processes saved: ``fsdp`` (a model, its optimizer, other things), ``plain``, ``whole.pt``."""
    return launch(tmp_path_factory.mktemp("dcp"), 2)


def launch(folder: Folder, count: int) -> Folder:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), port, str(folder), str(count)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * count, said
    return folder


# --- what is read --------------------------------------------------------------------------------------


def test_every_dtype_shape_and_memory_order_is_read_to_the_bit(tmp_path: Folder) -> None:
    """torch saves a transposed tensor with its strides: its bytes alone are in another order."""
    want = state()
    found = load_state_dict(save(want, tmp_path / "dcp"))
    assert_same(found, {name: tensor.resolve_neg() for name, tensor in want.items()})


@pytest.mark.slow
def test_a_model_that_two_processes_saved_is_read_without_its_optimizer(saved: Folder) -> None:
    want = torch.load(saved / "whole.pt")["model"]
    checkpoint = open_checkpoint(saved / "fsdp")
    assert (checkpoint.format, checkpoint.framework) == ("dcp", "torch")
    assert checkpoint.note == "the entry 'model'"
    assert_same(load_state_dict(saved / "fsdp"), want)
    moments = load_state_dict(saved / "fsdp", key="optim.state.0.weight")
    assert {name: tuple(tensor.shape) for name, tensor in moments.items()} == {
        "step": (),
        "exp_avg": (5, 6),
        "exp_avg_sq": (5, 6),
    }
    with pytest.raises(CheckpointError, match="there is no entry 'step'"):
        load_state_dict(saved / "fsdp", key="step")


def test_every_placement_is_read_to_the_bit(saved: Folder) -> None:
    raw = torch.load(saved / "whole.pt")["plain"]
    found = load_state_dict(saved / "plain")
    assert set(found) == {"rows", "columns", "replica", "transposed"}
    for name, tensor in found.items():
        assert bits(tensor) == bits(raw), name


def test_any_slice_is_that_of_the_whole(saved: Folder) -> None:
    raw = torch.load(saved / "whole.pt")["plain"]
    leaves = open_checkpoint(saved / "plain").leaves

    @given(st.sampled_from(sorted(leaves)), *[st.tuples(st.integers(0, 10), st.integers(0, 10))] * 2)
    @settings(max_examples=240, deadline=None)
    def check(name: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        box = tuple(slice(*sorted(ends)) for ends in (rows, columns))
        assert bits(leaves[name].slice(box)) == bits(raw[box])

    check()


@pytest.mark.slow
def test_rows_that_two_axes_split_out_of_order_are_read_to_the_bit(tmp_path: Folder) -> None:
    launch(tmp_path, 4)
    assert_same(load_state_dict(tmp_path / "strided"), torch.load(tmp_path / "whole.pt"))


def test_it_converts_and_compares(saved: Folder, tmp_path: Folder) -> None:
    with torch.device("meta"):
        meta = model()
    done = convert(saved / "fsdp", tmp_path / "m.safetensors", to="torch", model=meta, dtype=torch.bfloat16)
    assert done.note == "the entry 'model'"
    convert(saved / "fsdp", tmp_path / "w.safetensors", to="torch")
    assert compare_checkpoints(saved / "fsdp", tmp_path / "w.safetensors").ok
    other = load_state_dict(tmp_path / "m.safetensors")
    want = torch.load(saved / "whole.pt")["model"]
    assert bits(other["0.weight"]) == bits(want["0.weight"].bfloat16())


def test_what_is_not_a_tensor_is_left_out_and_noted(tmp_path: Folder) -> None:
    folder = save({"weight": torch.ones(2), "step": 3, "names": ["a"]}, tmp_path / "dcp")
    assert open_checkpoint(folder).note == "a state_dict, without what is not a tensor: step, names"
    assert set(load_state_dict(folder)) == {"weight"}


def test_a_window_bounds_what_stays_mapped(tmp_path: Folder) -> None:
    """A map that was dropped is made again."""
    save({f"w{place}": torch.full((100,), float(place)) for place in range(5)}, tmp_path / "dcp")
    leaves: dict[str, Leaf] = dict(open_checkpoint(tmp_path / "dcp", window=Window(500)).leaves)
    for _ in range(2):
        for place in range(5):
            assert torch.equal(leaves[f"w{place}"].read(), torch.full((100,), float(place)))


def test_a_checkpoint_of_many_files_needs_few_open_ones(
    saved: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchjax_bridge.weights.files._dcp._MAX_OPEN_FILES", 1)
    checkpoint = open_checkpoint(saved / "plain")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    raw = torch.load(saved / "whole.pt")["plain"]
    for _ in range(2):
        assert all(bits(leaf.read()) == bits(raw) for leaf in checkpoint.leaves.values())
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # a file and its map


def test_several_state_dicts_need_a_key(tmp_path: Folder) -> None:
    one, other = {"weight": torch.ones(2)}, {"weight": torch.zeros(3)}
    folder = save({"model": one, "ema": other}, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=r"several state_dicts \('ema', 'model'\)|\('model', 'ema'\)"):
        open_checkpoint(folder)
    assert_same(load_state_dict(folder, key="ema"), other)


# --- what is refused -----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo evil > /tmp/evil",)


@pytest.mark.parametrize("content", [{"model": {"w": torch.ones(2)}, "step": 3}, {"step": 3}])
def test_a_save_whose_tensors_lie_in_pickles_says_so(tmp_path: Folder, content: Any) -> None:
    save(content, tmp_path / "dcp", planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    with pytest.raises(
        CheckpointError, match=r"holds no tensors, but pickles \(.*step\).*flatten_state_dict=True"
    ):
        open_checkpoint(tmp_path / "dcp")


def test_a_key_that_is_no_text_is_refused(tmp_path: Folder) -> None:
    save({"model": {"w": torch.ones(2)}}, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="key=3 is not the name of an entry"):
        open_checkpoint(tmp_path / "dcp", key=3)  # type: ignore[arg-type]


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Folder) -> None:
    folder = save({"weight": torch.ones(2)}, tmp_path / "dcp")
    edit(folder, lambda metadata: metadata.planner_data.update(evil=Evil()))
    with pytest.raises(
        CheckpointError, match=rf"\.metadata: {os.system.__module__}\.system is no part of DCP metadata"
    ):
        open_checkpoint(folder)


def test_an_item_that_is_not_a_plain_tensor_is_refused_and_not_run(tmp_path: Folder) -> None:
    folder = save({"weight": torch.ones(2)}, tmp_path / "dcp")
    raw = (folder / "__0_0.distcp").read_bytes()
    name, evil = b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nsystem\n"
    assert raw.count(name) == 1
    (folder / "__0_0.distcp").write_bytes(raw.replace(name, evil + b" " * (len(name) - len(evil))))
    with pytest.raises(CheckpointError, match="chunk of 'weight' at byte 0"):
        load_state_dict(folder)


def test_a_gap_is_refused_where_torch_would_leave_old_values(tmp_path: Folder) -> None:
    def gap(metadata: Any) -> None:
        (chunk,) = metadata.state_dict_metadata["weight"].chunks
        chunk.sizes = torch.Size([96, 128])

    folder = edit(save({"weight": torch.ones(128, 128)}, tmp_path / "dcp"), gap)
    with pytest.raises(CheckpointError, match="'weight': its chunks cover 12288 of 16384 elements"):
        open_checkpoint(folder)


def test_chunks_that_overlap_are_refused(tmp_path: Folder) -> None:
    def twice(metadata: Any) -> None:
        metadata.state_dict_metadata["weight"].chunks *= 2

    folder = edit(save({"weight": torch.ones(4, 4)}, tmp_path / "dcp"), twice)
    with pytest.raises(CheckpointError, match="'weight': its chunks overlap"):
        open_checkpoint(folder)


def test_a_gap_that_an_overlap_hides_is_refused(saved: Folder, tmp_path: Folder) -> None:
    def same(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["rows"].chunks
        chunks[1] = chunks[0]

    shutil.copytree(saved / "plain", tmp_path / "dcp")
    edit(tmp_path / "dcp", same)
    with pytest.raises(CheckpointError, match="'rows': its chunks overlap"):
        open_checkpoint(tmp_path / "dcp").leaves["rows"].read()
    with pytest.raises(CheckpointError, match="'rows': its chunks cover 0 of 30"):
        open_checkpoint(tmp_path / "dcp").leaves["rows"].slice((slice(3, 6), slice(0, 10)))


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda file: file.unlink(), "the file '__1_0.distcp', which holds a part of '.*', is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), r"__1_0\.distcp is cut: it has \d+ bytes"),
        (
            lambda file: file.write_bytes(bytes(file.stat().st_size)),
            "is damaged or not written by torch.save",
        ),
        (lambda file: (file.parent / ".metadata").unlink(), "no .metadata, which DCP writes last"),
        (lambda file: (file.parent / ".metadata").write_bytes(b"\x80\x02}"), "DCP metadata is damaged"),
        (lambda file: (file.parent / ".metadata").write_bytes(pickle.dumps({1: 2})), "it is no DCP metadata"),
    ],
)
def test_a_damaged_folder_is_one_error(saved: Folder, tmp_path: Folder, break_it: Any, why: str) -> None:
    shutil.copytree(saved / "plain", tmp_path / "dcp")
    break_it(tmp_path / "dcp" / "__1_0.distcp")
    with pytest.raises(CheckpointError, match=why):
        load_state_dict(tmp_path / "dcp")


def test_another_dtype_or_place_than_the_metadata_says_is_refused(tmp_path: Folder) -> None:
    folder = save({"weight": torch.ones(4), "other": torch.zeros(4)}, tmp_path / "dcp")
    shutil.copytree(folder, tmp_path / "escape")

    def as_int(metadata: Any) -> None:
        metadata.state_dict_metadata["weight"].properties.dtype = torch.int32

    with pytest.raises(CheckpointError, match=r"holds torch\.float32, and the metadata says torch\.int32"):
        load_state_dict(edit(folder, as_int))

    def elsewhere(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../secret"

    with pytest.raises(CheckpointError, match=r"'\.\./secret', which is not a file beside the metadata"):
        open_checkpoint(edit(tmp_path / "escape", elsewhere))


def test_extensions_of_dcp_are_refused(tmp_path: Folder) -> None:
    def compress(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.zstd"]

    folder = edit(save({"weight": torch.ones(4)}, tmp_path / "dcp"), compress)
    with pytest.raises(CheckpointError, match="'weight' was written through an extension of DCP"):
        open_checkpoint(folder)


DAMAGE = {
    "a number for a chunk": lambda m: setattr(_entry(m), "chunks", [5]),
    "nothing for a chunk": lambda m: setattr(_entry(m), "chunks", [None]),
    "a size beyond memory": lambda m: vars(_entry(m)).update(size=(2**62, 2**62), chunks=[]),
    "a list for a name": lambda m: [object.__setattr__(index, "fqn", ["a"]) for index in m.storage_data],
    "a path that is one of a group": lambda m: m.planner_data.update(weight=("model",), bias=("model", "bias")),
    "one path for two": lambda m: m.planner_data.update(weight=("bias",), bias=("bias",)),
}  # fmt: skip


def _entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["weight"]


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_part_of_another_kind_in_the_metadata_is_damage(
    tmp_path: Folder, change: Callable[[Any], object]
) -> None:
    save({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, tmp_path / "dcp")
    edit(tmp_path / "dcp", change)
    with pytest.raises(CheckpointError):
        load_state_dict(tmp_path / "dcp")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_change_of_a_byte_of_the_metadata_is_more_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        save({"model": {"a": torch.ones(3, 2), "b": torch.zeros(2)}, "step": 1}, folder)
        shutil.copy(folder / ".metadata", folder / "intact")
    raw = bytearray((folder / "intact").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        load_state_dict(folder)
