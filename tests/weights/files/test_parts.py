"""One conversion in several parts: joined by the last, resumed after any kill, and never half of two things."""

import json
import pathlib
import resource
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest
import torch
import torch.distributed.checkpoint as dcp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from safetensors.torch import save_file
from torch import nn

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import (
    compare_checkpoints,
    convert,
    load_flax,
    load_state_dict,
    save_flax,
    save_state_dict,
    to_flax,
)
from torchjax_bridge.weights.files import _atomic, _orbax_stream, _parts
from torchjax_bridge.weights.files._cut import Block
from torchjax_bridge.weights.files._leaf import Leaf

from .bits import assert_same, bits, random_bits, torch_state

pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:.*PairingWarning")

Folder = pathlib.Path
MESH = AbstractMesh((4,), ("x",))
WIDTH = 16
# Blocks of 256 bytes: four to a kernel.
MEMORY = 1024


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH, bias=False)


class NnxNet(nnx.Module):
    def __init__(self) -> None:
        init = nnx.initializers.normal()
        across = [(None, "x"), ("x", None), (None, None)]
        kernels = [nnx.with_partitioning(init, names) for names in across]
        self.first = nnx.Linear(WIDTH, WIDTH, kernel_init=kernels[0], rngs=nnx.Rngs(0))
        self.second = nnx.Linear(WIDTH, WIDTH, kernel_init=kernels[1], rngs=nnx.Rngs(0))
        self.third = nnx.Linear(WIDTH, WIDTH, kernel_init=kernels[2], use_bias=False, rngs=nnx.Rngs(0))


def template(mesh: AbstractMesh = MESH) -> Any:
    with jax.sharding.use_abstract_mesh(mesh):
        return nnx.eval_shape(NnxNet)


def source(folder: Folder, seed: int = 0) -> dict[str, torch.Tensor]:
    """A DCP checkpoint with every bit pattern."""
    state = Net().state_dict()
    for place, tensor in enumerate(state.values()):
        tensor.copy_(random_bits(torch.float32, tuple(tensor.shape), 100 * seed + place))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state, "step": 1}, checkpoint_id=folder)
    return state


def to_orbax(tmp_path: Folder, part: tuple[int, int] | None = None, **options: Any) -> Any:
    options = {"template": template(), "to": "flax", "format": "orbax"} | options
    return convert(tmp_path / "dcp", tmp_path / "out", mesh=MESH, memory=MEMORY, part=part, **options)


def to_dcp(tmp_path: Folder, part: tuple[int, int] | None = None, **options: Any) -> Any:
    return convert(
        tmp_path / "dcp", tmp_path / "out", to="torch", format="dcp", memory=MEMORY, part=part, **options
    )


FORMATS = pytest.mark.parametrize("run", [to_orbax, to_dcp])


def check(tmp_path: Folder, state: dict[str, torch.Tensor]) -> None:
    """The output has every bit of the source, and nothing else is left."""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "out"]
    same = compare_checkpoints(tmp_path / "dcp", tmp_path / "out", template=template())
    assert (same.differences, same.same) == ((), len(state))


# --- the result ----------------------------------------------------------------------------------------


@pytest.mark.every(2)
@FORMATS
@pytest.mark.parametrize("parts", [(0, 1), (1, 0), (2, 0, 1)])
def test_parts_in_any_order_are_one_checkpoint(tmp_path: Folder, run: Any, parts: tuple[int, ...]) -> None:
    state = source(tmp_path / "dcp")
    for place, number in enumerate(parts):
        assert not (tmp_path / "out").exists()
        done = run(tmp_path, (number, len(parts)))
        assert done.waiting == tuple(sorted(parts[place + 1 :]))
        assert done.files == (() if done.waiting else (tmp_path / "out",))
    check(tmp_path, state)


def test_chunks_are_the_shards_of_the_template(tmp_path: Folder) -> None:
    import orbax.checkpoint as ocp

    state = source(tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "out", template=template(), to="flax", format="orbax", mesh=MESH)
    found = ocp.PyTreeCheckpointer().metadata(tmp_path / "out").item_metadata.tree
    chunks = {name: found[name]["kernel"].storage.chunk_shape for name in ("first", "second", "third")}
    assert chunks == {"first": (16, 4), "second": (4, 16), "third": (16, 16)}
    with nnx.use_eager_sharding(False):
        want = to_flax(state, nnx.eval_shape(NnxNet))
    with jax.set_mesh(jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        loaded = load_flax(tmp_path / "out", template())
    assert loaded.first.kernel.sharding.spec == PartitionSpec(None, "x")
    assert bits(loaded.first.kernel[...]) == bits(want.first.kernel[...])


def test_orbax_itself_restores_it_under_other_shardings(tmp_path: Folder) -> None:
    import orbax.checkpoint as ocp

    state = source(tmp_path / "dcp")
    for number in range(2):
        to_orbax(tmp_path, (number, 2))
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("b", "a"))
    struct = jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32", sharding=sharding)
    bias = jax.ShapeDtypeStruct(
        (WIDTH,), "float32", sharding=jax.sharding.NamedSharding(mesh, PartitionSpec())
    )
    tree = {
        "first": {"kernel": struct, "bias": bias},
        "second": {"kernel": struct, "bias": bias},
        "third": {"kernel": struct},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "out", tree)
    bare = ocp.PyTreeCheckpointer().restore(tmp_path / "out")
    for name in tree:
        want = bits(state[f"{name}.weight"].t())
        assert found[name]["kernel"].sharding == sharding
        assert bits(found[name]["kernel"])[2] == bits(bare[name]["kernel"])[2] == want[2]


@pytest.mark.slow
def test_torch_loads_what_parts_wrote(tmp_path: Folder) -> None:
    want = {name: tensor for name, tensor in torch_state().items() if name != "conjugate"}
    save_state_dict(tmp_path / "m.pt", want)
    for number in range(3):
        convert(tmp_path / "m.pt", tmp_path / "out", to="torch", format="dcp", memory=64, part=(number, 3))
    found = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=tmp_path / "out")
    assert_same(found, want)
    assert_same(load_state_dict(tmp_path / "out"), want)


def test_a_leaf_larger_than_the_memory_goes_through_in_slices(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    as_numpy = _orbax_stream._as_numpy
    monkeypatch.setattr(
        _orbax_stream, "_as_numpy", lambda block: sizes.append(block.nbytes) or as_numpy(block)
    )
    state = source(tmp_path / "dcp")
    to_orbax(tmp_path)
    assert max(sizes) <= MEMORY // 4 < state["first.weight"].nbytes
    check(tmp_path, state)


def test_more_parts_than_blocks_and_a_part_that_is_run_twice(tmp_path: Folder) -> None:
    save_flax(tmp_path / "dcp.safetensors", {"params": {"w": jax.numpy.ones(3)}})
    for number in (0, 0, 1, 2):
        done = convert(
            tmp_path / "dcp.safetensors", tmp_path / "out", to="flax", format="orbax", part=(number, 3)
        )
    assert done.files
    assert load_flax(tmp_path / "out")["params"]["w"].tolist() == [1, 1, 1]


# --- kills ---------------------------------------------------------------------------------------------


class Killed(KeyboardInterrupt):
    pass


def killed_after(blocks: int) -> Any:
    """Stops once that many blocks are stored, without a chance to clean up, as a kill does."""

    def tick(_: int) -> None:
        nonlocal blocks
        blocks -= 1
        if blocks < 0:
            raise Killed

    return lambda _: tick


@FORMATS
def test_a_part_that_is_killed_at_any_block_is_resumed(tmp_path: Folder, run: Any) -> None:
    state = source(tmp_path / "dcp")
    blocks = 0

    def count(_: int) -> None:
        nonlocal blocks
        blocks += 1

    run(tmp_path, (1, 2), progress=lambda _: count)
    assert blocks > 4
    for after in range(blocks):
        with pytest.raises(Killed):
            run(tmp_path, (1, 2), resume=after > 0, progress=killed_after(after))
        assert not (tmp_path / "out").exists()
    assert run(tmp_path, (0, 2)).waiting == (1,)
    assert not run(tmp_path, (1, 2), resume=True).waiting
    check(tmp_path, state)


def test_a_resumed_part_writes_only_what_is_missing(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = source(tmp_path / "dcp")
    with pytest.raises(Killed):
        to_orbax(tmp_path, (0, 2), progress=killed_after(3))
    written = []
    as_numpy = _orbax_stream._as_numpy
    monkeypatch.setattr(_orbax_stream, "_as_numpy", lambda block: written.append(block) or as_numpy(block))
    to_orbax(tmp_path, (0, 2), resume=True)
    again = len(written)
    to_orbax(tmp_path, (1, 2))
    assert 0 < again < len(written) - again
    check(tmp_path, state)


@FORMATS
def test_a_single_conversion_is_resumed_too(tmp_path: Folder, run: Any) -> None:
    state = source(tmp_path / "dcp")
    with pytest.raises(Killed):
        run(tmp_path, resume=True, progress=killed_after(3))
    run(tmp_path, resume=True)
    check(tmp_path, state)


@FORMATS
def test_a_single_conversion_of_another_source_is_not_resumed_and_what_is_there_is_kept(
    tmp_path: Folder, run: Any
) -> None:
    source(tmp_path / "dcp")
    with pytest.raises(Killed):
        run(tmp_path, resume=True, progress=killed_after(3))
    state = source(tmp_path / "dcp")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"cannot resume: .* It is kept; start without resume to replace it"
    ):
        run(tmp_path, resume=True)
    assert sorted(tmp_path.rglob("*")) == before
    run(tmp_path)
    check(tmp_path, state)


def test_the_target_may_lie_in_the_folder_of_the_source(tmp_path: Folder) -> None:
    state = source(tmp_path / "dcp")
    for number in range(2):
        convert(tmp_path / "dcp", tmp_path / "dcp" / "again", to="torch", format="dcp", part=(number, 2))
    assert_same(load_state_dict(tmp_path / "dcp" / "again"), state)


@pytest.mark.every(2)
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("step", ["before the stores move", "after the stores moved", "after Orbax is done"])
def test_a_joiner_that_is_killed_anywhere_is_no_loss(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, step: str, resume: bool
) -> None:
    import orbax.checkpoint as ocp

    state = source(tmp_path / "dcp")
    to_orbax(tmp_path, (0, 2))
    with monkeypatch.context() as crash:

        def kill(*_: Any, **__: Any) -> None:
            raise Killed

        if step == "before the stores move":
            crash.setattr(_orbax_stream, "_finish_with_orbax", kill)
        elif step == "after the stores moved":
            crash.setattr(ocp.PyTreeCheckpointHandler, "finalize", kill)
        else:
            crash.setattr(_parts, "publish", kill)
        with pytest.raises(Killed):
            to_orbax(tmp_path, (1, 2))
    assert not (tmp_path / "out").exists()
    assert not to_orbax(tmp_path, (0, 2), resume=resume).waiting
    check(tmp_path, state)


@pytest.mark.parametrize("resume", [True, False])
def test_a_joiner_of_dcp_that_is_killed_is_no_loss(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    from torchjax_bridge.weights.files import _dcp_write

    state = source(tmp_path / "dcp")
    to_dcp(tmp_path, (0, 2))
    for name, module in (("_write_metadata", _dcp_write), ("publish", _parts)):
        with monkeypatch.context() as crash:
            crash.setattr(module, name, lambda *_: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                to_dcp(tmp_path, (1, 2), resume=True)
    for number in (0, 1):
        if not (tmp_path / "out").exists():
            to_dcp(tmp_path, (number, 2), resume=resume)
    check(tmp_path, state)


@pytest.mark.every(2)
@FORMATS
@pytest.mark.parametrize("part", [None, (1, 2)])
@pytest.mark.parametrize("half", [False, True])
def test_a_process_that_is_killed_after_the_swap_leaves_the_new_checkpoint(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, run: Any, part: tuple[int, int] | None, half: bool
) -> None:
    source(tmp_path / "dcp")
    run(tmp_path)
    shutil.rmtree(tmp_path / "dcp")
    state = source(tmp_path / "dcp", seed=1)
    if part is not None:
        run(tmp_path, (0, 2), overwrite=True, resume=True)

    def kill(whole: Folder, target: Folder) -> None:
        _atomic._swap(whole, target)
        if half:  # of the old checkpoint, which lies where the new one was, is removed
            next(path for path in sorted(whole.rglob("*")) if path.is_file()).unlink()
        raise Killed

    with monkeypatch.context() as crash:
        crash.setattr(_parts, "publish", kill)
        with pytest.raises(Killed):
            run(tmp_path, part, overwrite=True, resume=True)
    done = run(tmp_path, part, overwrite=True, resume=True)
    assert done.files == (tmp_path / "out",)
    check(tmp_path, state)


@FORMATS
def test_what_appears_at_the_target_meanwhile_is_not_lost(tmp_path: Folder, run: Any) -> None:
    source(tmp_path / "dcp")

    def appear(route: Any) -> Any:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        return lambda nbytes: None

    with pytest.raises(CheckpointError, match=r"it holds 'notes\.txt'"):
        run(tmp_path, progress=appear)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"it holds 'notes\.txt'"):
        convert(tmp_path / "dcp", tmp_path / "out", to="torch", progress=appear)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_source_below_a_folder_that_is_named_as_a_part_is_watched(tmp_path: Folder) -> None:
    inside = tmp_path / "x.part"
    inside.mkdir()
    source(inside / "dcp")
    to_orbax(inside, (0, 2))
    shutil.rmtree(inside / "dcp")
    source(inside / "dcp", seed=1)
    with pytest.raises(CheckpointError, match="part 0 of 2 is from another source"):
        to_orbax(inside, (1, 2))


def test_a_target_may_be_named_by_way_of_another_folder(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = source(tmp_path / "dcp")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    convert("../dcp", "../out", to="flax", format="orbax", template=template(), memory=MEMORY)
    (tmp_path / "sub").rmdir()
    check(tmp_path, state)


# --- what has no effect ------------------------------------------------------------------------------------


def test_options_without_effect_are_refused(tmp_path: Folder) -> None:
    source(tmp_path / "dcp")
    bare = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    for options, words in (
        ({"to": "torch", "format": "dcp", "mesh": MESH}, "mesh= has no effect"),
        ({"to": "flax", "template": template(), "mesh": MESH}, "mesh= has no effect"),
        ({"to": "torch", "format": "dcp", "shard_size": 100}, "shard_size has no effect"),
        (
            {"to": "flax", "format": "orbax", "template": template(), "shard_size": 1},
            "shard_size has no effect",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert(tmp_path / "dcp", tmp_path / "out", **options)  # type: ignore[arg-type]
    to_orbax(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the template"):
        convert(tmp_path / "out", tmp_path / "again.safetensors", to="flax", template=bare)
    convert(tmp_path / "out", tmp_path / "again.safetensors", to="flax", template=template())


def test_what_a_killed_process_wrote_and_never_committed_is_dropped(tmp_path: Folder) -> None:
    state = source(tmp_path / "dcp")
    to_orbax(tmp_path, (0, 2))
    orphan = tmp_path / ".out.part" / "ocdbt.process_0" / "d" / "0123456789abcdef"
    orphan.write_bytes(bytes(1000))
    to_orbax(tmp_path, (1, 2))
    assert not list((tmp_path / "out").rglob(orphan.name))
    check(tmp_path, state)


def test_an_index_of_many_chunks_lies_in_nodes_of_which_a_commit_writes_few(tmp_path: Folder) -> None:
    import tensorstore as ts

    # One node for all would be written anew with each commit, and a cache would hold every version of it.
    values, rows = random_bits(torch.float32, (1500, 512), 0), AbstractMesh((1500,), ("x",))
    save_file({"params.w": values}, tmp_path / "in.safetensors", {"format": "flax"})
    struct = jax.ShapeDtypeStruct((1500, 512), "float32", sharding=NamedSharding(rows, PartitionSpec("x")))

    def run(**options: Any) -> None:
        options |= {"to": "flax", "format": "orbax", "template": {"params": {"w": struct}}, "resume": True}
        convert(tmp_path / "in.safetensors", tmp_path / "out", **options)

    with pytest.raises(Killed):
        run(progress=killed_after(1400))
    store = tmp_path / ".out.part" / "ocdbt.process_0"
    manifest = ts.ocdbt.dump(ts.KvStore.open(f"file://{store}/").result()).result()
    assert manifest["versions"][-1]["root_height"] > 0
    run()
    assert bits(torch.from_dlpack(load_flax(tmp_path / "out")["params"]["w"])) == bits(values)


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0,), "0/2", (0.0, 1)])
def test_what_is_no_part_is_refused(tmp_path: Folder, part: Any) -> None:
    source(tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="is no part: for four of them, pass"):
        to_orbax(tmp_path, part)


def test_parts_are_for_orbax_and_dcp(tmp_path: Folder) -> None:
    source(tmp_path / "dcp")
    with pytest.raises(
        CheckpointError, match="safetensors is not written in parts: choose the format orbax or dcp"
    ):
        convert(tmp_path / "dcp", tmp_path / "out", to="flax", template=template(), part=(0, 2))
    with pytest.raises(CheckpointError, match="pt is not written in parts"):
        convert(tmp_path / "dcp", tmp_path / "m.pt", to="torch", part=(0, 2))


@FORMATS
def test_a_source_that_changed_between_parts_is_refused(tmp_path: Folder, run: Any) -> None:
    source(tmp_path / "dcp")
    run(tmp_path, (0, 2))
    state = source(tmp_path / "dcp")
    with pytest.raises(
        CheckpointError, match="part 0 of 2 is from another source or other settings than part 1"
    ):
        run(tmp_path, (1, 2))
    with pytest.raises(CheckpointError, match="part 0 of 2 is from another source"):
        run(tmp_path, (0, 2), resume=True)
    for number in (0, 1):  # without resume, a part replaces its own earlier run
        run(tmp_path, (number, 2))
    check(tmp_path, state)


def test_a_source_that_changes_while_a_part_reads_it_is_refused(tmp_path: Folder) -> None:
    source(tmp_path / "dcp")

    def touch(_: int) -> None:
        (tmp_path / "dcp" / "__0_0.distcp").touch()

    with pytest.raises(CheckpointError, match="the source was changed while it was read: start again"):
        to_orbax(tmp_path, (0, 2), progress=lambda _: touch)
    assert not list((tmp_path / ".out.part").glob("ocdbt*"))


def test_a_part_of_another_number_of_parts_or_of_other_settings_is_refused(tmp_path: Folder) -> None:
    source(tmp_path / "dcp")
    to_orbax(tmp_path, (0, 2))
    for number in (0, 1):
        with pytest.raises(CheckpointError, match=f"holds part 0 of 2, and this is part {number} of 3"):
            to_orbax(tmp_path, (number, 3))
    with pytest.raises(CheckpointError, match="part 0 of 2 is from another source or other settings"):
        to_orbax(tmp_path, (1, 2), dtype=torch.bfloat16)


@pytest.mark.every(2)
@FORMATS
@pytest.mark.parametrize("finished", [0, 1])
def test_a_run_of_all_keeps_the_parts_that_are_there(tmp_path: Folder, run: Any, finished: int) -> None:
    state = source(tmp_path / "dcp")
    run(tmp_path, (finished, 2))
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=f"part {finished} of 2, and this is all of it. It is kept"):
            run(tmp_path, resume=resume)
    run(tmp_path, (1 - finished, 2))
    check(tmp_path, state)


@pytest.mark.every(2)
@FORMATS
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_part_that_is_missing_or_cut_is_named_and_can_be_run_again(
    tmp_path: Folder, run: Any, damage: str
) -> None:
    state = source(tmp_path / "dcp")
    run(tmp_path, (0, 2))
    folder = tmp_path / ".out.part"
    stored = [*folder.glob("ocdbt.process_0/d/*"), *folder.glob("__0_0.distcp")]
    largest = max(stored, key=lambda file: file.stat().st_size)
    if damage == "cut":
        largest.write_bytes(largest.read_bytes()[:100])
    else:
        shutil.rmtree(folder / "ocdbt.process_0") if run is to_orbax else largest.unlink()
    with pytest.raises(CheckpointError, match=r"part 0 of 2.*Run part 0 of 2 again with resume"):
        run(tmp_path, (1, 2))
    assert not (tmp_path / "out").exists()
    run(tmp_path, (0, 2), resume=True)
    check(tmp_path, state)


@pytest.mark.parametrize(
    "line", [b"{not json\n", b"\n", b"[1,2]\n", b"\xff\x00\n", b'["a", [0], [1], 0, "x"]\n']
)
def test_a_journal_with_a_damaged_line_is_read_up_to_it_and_the_part_can_be_run_again(
    tmp_path: Folder, line: bytes
) -> None:
    state = source(tmp_path / "dcp")
    to_dcp(tmp_path, (0, 2))
    journal = tmp_path / ".out.part" / "places-0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    (tmp_path / ".out.part" / "part-x.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"part 0 of 2 lacks \d+ blocks .* Run part 0 of 2 again with resume"
    ):
        to_dcp(tmp_path, (1, 2))
    to_dcp(tmp_path, (0, 2), resume=True)
    check(tmp_path, state)


def test_a_damaged_state_of_a_part_says_which_to_run_again(tmp_path: Folder) -> None:
    source(tmp_path / "dcp")
    to_dcp(tmp_path, (0, 2))
    for content in ("[1]", "{"):
        (tmp_path / ".out.part" / "part-0.json").write_text(content)
        with pytest.raises(
            CheckpointError, match=r"part-0\.json is damaged. Remove it, and run part 0 again"
        ):
            to_dcp(tmp_path, (1, 2))


@FORMATS
def test_a_part_that_another_process_writes_is_refused(tmp_path: Folder, run: Any) -> None:
    state = source(tmp_path / "dcp")
    inner: list[str] = []

    def meanwhile(_: int) -> None:
        if not inner:
            for part in ((0, 2), None):
                try:
                    run(tmp_path, part)
                except CheckpointError as err:
                    inner.append(str(err))
            run(tmp_path, (1, 2))

    run(tmp_path, (0, 2), progress=lambda _: meanwhile)
    assert ["another process is writing" in said for said in inner] == [True, True]
    check(tmp_path, state)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@FORMATS
def test_a_disk_without_room_is_an_error_and_the_part_is_resumed(tmp_path: Folder, run: Any) -> None:
    state = source(tmp_path / "dcp")
    run(tmp_path, (1, 2))
    with full_disk(600), pytest.raises(CheckpointError, match="out"):
        run(tmp_path, (0, 2))
    assert not (tmp_path / "out").exists()
    run(tmp_path, (0, 2), resume=True)
    check(tmp_path, state)


@FORMATS
def test_a_disk_without_room_leaves_nothing_of_a_single_conversion(tmp_path: Folder, run: Any) -> None:
    source(tmp_path / "dcp")
    with full_disk(600), pytest.raises(CheckpointError, match="out"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


@FORMATS
def test_a_disk_without_room_leaves_what_a_single_conversion_is_to_keep(tmp_path: Folder, run: Any) -> None:
    state, blocks = source(tmp_path / "dcp"), []
    with full_disk(3000), pytest.raises(CheckpointError, match="out"):
        run(tmp_path, resume=True, progress=lambda _: blocks.append)
    assert (tmp_path / ".out.part").is_dir()
    run(tmp_path, resume=True)
    check(tmp_path, state)


@pytest.mark.parametrize("layer", [(4, 1), (1, 1)])
@pytest.mark.parametrize("memory", [1, 1024])
def test_tensors_of_one_element_are_converted(tmp_path: Folder, layer: tuple[int, int], memory: int) -> None:
    module, structs = nn.Linear(*layer), nnx.eval_shape(lambda: nnx.Linear(*layer, rngs=nnx.Rngs(0)))
    save_state_dict(tmp_path / "dcp", module.state_dict(), format="dcp")
    convert(tmp_path / "dcp", tmp_path / "out", to="flax", format="orbax", template=structs, memory=memory)
    same = compare_checkpoints(tmp_path / "dcp", tmp_path / "out", template=structs)
    assert (same.differences, same.same) == ((), 2)


def test_blocks_are_committed_in_batches_of_about_so_many_bytes() -> None:
    leaf = Leaf("a", ("a",), torch.float32, (10,), lambda: torch.zeros(10))
    blocks = [Block(leaf, (1,), (slice(place, place + 1),)) for place in range(10)]
    assert [len(batch) for batch in _orbax_stream._batches(blocks, 12)] == [3, 3, 3, 1]


def test_a_mesh_that_no_leaf_of_the_template_names_is_refused(tmp_path: Folder) -> None:
    state = source(tmp_path / "dcp")

    class Plain(nnx.Module):
        def __init__(self) -> None:
            for name, bias in (("first", True), ("second", True), ("third", False)):
                setattr(self, name, nnx.Linear(WIDTH, WIDTH, use_bias=bias, rngs=nnx.Rngs(0)))

    plain = nnx.eval_shape(Plain)
    with pytest.raises(
        CheckpointError, match="mesh= gives 'x' a size, but no leaf of the template names an axis"
    ):
        to_orbax(tmp_path, template=plain)
    convert(tmp_path / "dcp", tmp_path / "out", template=plain, to="flax", format="orbax")
    check(tmp_path, state)


@pytest.mark.parametrize("shape", [(4,), (8, 4)])
def test_a_template_of_other_shapes_is_refused(tmp_path: Folder, shape: tuple[int, ...]) -> None:
    save_file({"params.w": torch.ones(4, 4)}, tmp_path / "in.safetensors", {"format": "flax"})
    struct = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(MESH, PartitionSpec("x")))
    with pytest.raises(
        CheckpointError, match=r"mismatch: \(4, 4\) in the file, .* in the template @ params.w"
    ):
        convert(
            tmp_path / "in.safetensors",
            tmp_path / "out",
            to="flax",
            format="orbax",
            template={"params": {"w": struct}},
        )


def test_a_sharding_that_does_not_divide_is_named(tmp_path: Folder) -> None:
    source(tmp_path / "dcp")
    with pytest.raises(
        CheckpointError, match=r"'first\.kernel' of the template cannot be sharded as it says"
    ):
        convert(
            tmp_path / "dcp",
            tmp_path / "out",
            to="flax",
            format="orbax",
            template=template(AbstractMesh((3,), ("x",))),
        )


def test_the_state_of_a_part_is_json_that_names_its_work(tmp_path: Folder) -> None:
    source(tmp_path / "dcp")
    to_orbax(tmp_path, (0, 2))
    state = json.loads((tmp_path / ".out.part" / "part-0.json").read_text())
    assert (state["of"], state["done"], len(state["work"])) == (2, True, 64)


# --- one file, of a source in parts --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_leaf_of_many_chunks_is_written_to_one_file_in_slices(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from torchjax_bridge.weights.files import _dcp

    largest = 0
    box_of = _dcp._Reader.box

    def watched(self: Any, flat: str, tensor: Any, box: Any) -> torch.Tensor:
        nonlocal largest
        values = box_of(self, flat, tensor, box)
        largest = max(largest, values.nbytes)
        return values

    monkeypatch.setattr(_dcp._Reader, "box", watched)
    state = source(tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / name, to="torch", memory=MEMORY)
    assert 0 < largest < state["first.weight"].nbytes // 2
    assert_same(load_state_dict(tmp_path / name), state)


def test_large_leaves_are_compared_in_slices(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchjax_bridge.weights.files._verify._PART_BYTES", 128)
    state = source(tmp_path / "dcp")
    save_state_dict(tmp_path / "same.pt", state)
    assert compare_checkpoints(tmp_path / "dcp", tmp_path / "same.pt").same == len(state)
    state["first.weight"][3, 5] = 1e9
    state["first.weight"][9, 2] = float("nan")
    save_state_dict(tmp_path / "other.pt", state)
    (difference,) = compare_checkpoints(tmp_path / "dcp", tmp_path / "other.pt").differences
    assert (difference.name, difference.elements) == ("first.weight", 2)
