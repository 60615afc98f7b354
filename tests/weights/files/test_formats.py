"""What is saved is loaded, to the bit, by us and by the libraries whose formats these are."""

import json
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.torch
import torch
from flax import nnx, serialization
from torch import nn

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import load_flax, load_state_dict, open_checkpoint, save_flax, save_state_dict

from .bits import assert_same, bits, flax_tree, torch_state

Folder = pathlib.Path


def _flat(tree: object) -> dict[str, object]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- there and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.pth", "m.bin", "folder"])
def test_a_state_dict_of_every_dtype_and_shape_comes_back_to_the_bit(tmp_path: Folder, name: str) -> None:
    state = torch_state()
    save_state_dict(tmp_path / name, state)
    assert_same(load_state_dict(tmp_path / name), state)


@pytest.mark.parametrize(
    ("name", "format"), [("m.safetensors", None), ("m.msgpack", None), ("folder", None), ("folder", "orbax")]
)
def test_flax_variables_come_back_to_the_bit(tmp_path: Folder, name: str, format: str | None) -> None:
    tree = flax_tree()
    save_flax(tmp_path / name, tree, format=format)
    back = load_flax(tmp_path / name)
    if format == "orbax":  # which keeps no difference between "0" and 0
        back["batch_stats"]["0"] = back["batch_stats"].pop("0", back["batch_stats"].get(0))
    assert_same(_flat(back), _flat(tree))


@pytest.mark.parametrize("save", ["ours", "theirs"])
def test_safetensors_agrees_with_the_reference_library(tmp_path: Folder, save: str) -> None:
    file = tmp_path / "m.safetensors"
    state = {name: t.contiguous() for name, t in torch_state().items() if t.dtype != torch.float8_e8m0fnu}
    state = {name: t.resolve_conj() for name, t in state.items()}
    if save == "ours":
        save_state_dict(file, state, metadata={"note": "x"})
        assert_same(safetensors.torch.load_file(file), state)
    else:
        safetensors.torch.save_file(state, file)
        assert_same(load_state_dict(file), state)


def test_flax_safetensors_is_what_the_reference_library_reads(tmp_path: Folder) -> None:
    save_flax(
        tmp_path / "m.safetensors", {"params": {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}}
    )
    found = safetensors.flax.load_file(tmp_path / "m.safetensors")
    assert sorted(found) == ["params.a.bias", "params.a.kernel"]


def test_msgpack_agrees_with_flax_both_ways(tmp_path: Folder) -> None:
    tree = flax_tree()
    save_flax(tmp_path / "ours.msgpack", tree)
    assert_same(_flat(serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes())), _flat(tree))
    (tmp_path / "theirs.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert_same(_flat(load_flax(tmp_path / "theirs.msgpack")), _flat(tree))


def test_msgpack_chunks_of_large_arrays_are_read_and_written(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"params": {"w": np.arange(1000, dtype=np.float32).reshape(10, 100), "b": np.ones(3, np.float32)}}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 256)
    (tmp_path / "theirs.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    assert_same(_flat(load_flax(tmp_path / "theirs.msgpack")), _flat(tree))
    monkeypatch.setattr("torchjax_bridge.weights.files._msgpack._CHUNK_BYTES", 256)
    save_flax(tmp_path / "ours.msgpack", jax.tree.map(jnp.asarray, tree))
    assert_same(_flat(serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes())), _flat(tree))


def test_a_torch_file_of_ours_is_one_of_torch_save(tmp_path: Folder) -> None:
    state = torch_state()
    save_state_dict(tmp_path / "m.pt", state)
    for mapped in (False, True):
        assert_same(torch.load(tmp_path / "m.pt", weights_only=True, mmap=mapped), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_read_from_a_map_or_whole_if_it_is_from_before_torch_1_6(
    tmp_path: Folder, zipped: bool
) -> None:
    state = {"a": torch.randn(3, 4).t(), "b": torch.arange(5)}
    torch.save(state, tmp_path / "m.th", _use_new_zipfile_serialization=zipped)
    assert_same(load_state_dict(tmp_path / "m.th"), state)


def test_the_third_party_resnet20_is_read(shared: Folder) -> None:
    file = next(shared.rglob("resnet20*.th"))
    state = load_state_dict(file)
    assert state["module.conv1.weight"].shape == (16, 3, 3, 3)
    assert open_checkpoint(file).note == "the entry 'state_dict'"


# --- ties, wrappers, templates -------------------------------------------------------------------------


def test_tied_tensors_stay_tied_in_a_torch_file_and_are_whole_in_safetensors(tmp_path: Folder) -> None:
    tied = torch.randn(8, 4)
    state = {"embed": tied, "head": tied}
    for name in ("m.pt", "m.safetensors"):
        save_state_dict(tmp_path / name, state)
        back = load_state_dict(tmp_path / name)
        assert_same(back, state)
    back = load_state_dict(tmp_path / "m.pt")
    assert back["embed"].data_ptr() == back["head"].data_ptr()
    assert (tmp_path / "m.pt").stat().st_size < 3000


def test_a_name_that_save_model_dropped_is_there_again(tmp_path: Folder) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    safetensors.torch.save_model(model, tmp_path / "m.safetensors")
    assert_same(load_state_dict(tmp_path / "m.safetensors"), model.state_dict())


def test_the_only_state_dict_in_a_torch_file_is_found_and_several_must_be_told_apart(
    tmp_path: Folder,
) -> None:
    state = {"w": torch.ones(2)}
    torch.save({"epoch": 3, "net": state, "optimizer": {"state": {0: {}}}}, tmp_path / "one.pt")
    assert_same(load_state_dict(tmp_path / "one.pt"), state)
    torch.save({"model": state, "ema": {"w": torch.zeros(2)}}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"several state_dicts \('model', 'ema'\)"):
        load_state_dict(tmp_path / "two.pt")
    assert_same(load_state_dict(tmp_path / "two.pt", key="ema"), {"w": torch.zeros(2)})


def test_a_template_is_filled_and_left_untouched(tmp_path: Folder) -> None:
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    abstract = nnx.eval_shape(
        lambda: nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    )
    for name, format in (("m.safetensors", None), ("m.msgpack", None), ("orbax", "orbax")):
        save_flax(tmp_path / name, model, format=format)
        filled = load_flax(tmp_path / name, abstract)
        assert bits(filled.layers[0].kernel.get_value()) == bits(model.layers[0].kernel.get_value())
        assert isinstance(abstract.layers[0].kernel.get_value(), jax.ShapeDtypeStruct)


def test_an_error_lists_every_leaf_that_does_not_fit_the_template(tmp_path: Folder) -> None:
    save_flax(tmp_path / "m.safetensors", nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(CheckpointError) as caught:
        load_flax(tmp_path / "m.safetensors", nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0)))
    assert "unexpected: (3,) @ bias" in str(caught.value)
    assert "mismatch: (2, 3) in the file, (3, 3) in the template @ kernel" in str(caught.value)


def test_orbax_states_of_nnx_and_steps_of_a_manager_are_read(tmp_path: Folder) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
    found = load_flax(tmp_path / "state")
    assert bits(found["kernel"]) == bits(model.kernel.get_value())
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(7, args=ocp.args.StandardSave({"params": {"w": jnp.ones(3)}}))
    assert sorted(load_flax(tmp_path / "steps")["params"]) == ["w"]


@pytest.mark.parametrize("how", ["v1", "v1 steps", "one item", "prefixed steps", "padded steps"])
def test_orbax_is_found_in_every_layout_of_its_own(tmp_path: Folder, how: str) -> None:
    import orbax.checkpoint as ocp

    tree = {"params": {"w": jnp.arange(6.0), "layers": {"b": jnp.ones((2, 3))}}}
    if how.startswith("v1"):
        v1 = getattr(ocp, "v1", None)
        if v1 is None:
            pytest.skip("this Orbax has no v1")
        with warnings.catch_warnings():  # Orbax warns of its own names
            warnings.simplefilter("ignore")
            if how == "v1":
                v1.save_pytree(tmp_path / "m", tree)
            else:
                with v1.training.Checkpointer(tmp_path / "m") as checkpointer:
                    checkpointer.save_pytree(3, tree)
    else:
        item = "weights" if how == "one item" else "default"
        options = {
            "prefixed steps": ocp.CheckpointManagerOptions(step_prefix="ckpt"),
            "padded steps": ocp.CheckpointManagerOptions(step_format_fixed_length=8),
        }
        names = (item,) if how == "one item" else None
        with ocp.CheckpointManager(tmp_path / "m", item_names=names, options=options.get(how)) as manager:
            saved = ocp.args.StandardSave(tree)
            manager.save(7, args=ocp.args.Composite(weights=saved) if names else saved)
            manager.wait_until_finished()
    assert_same(load_flax(tmp_path / "m")["params"]["layers"], tree["params"]["layers"])


def test_orbax_leaves_come_in_groups_and_in_any_order(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves larger than a group, and more groups than are cached."""
    monkeypatch.setattr("torchjax_bridge.weights.files._orbax._GROUP_BYTES", 100)
    tree = {"params": {f"l{n}": jnp.arange(8.0 * (1 + n % 5)) + n for n in range(30)}}
    save_flax(tmp_path / "m", tree, format="orbax")
    leaves = list(open_checkpoint(tmp_path / "m").leaves.values())
    for leaf in (*leaves[::7], *reversed(leaves), *leaves):
        assert bits(leaf.read().numpy()) == bits(tree["params"][leaf.path[-1]]), leaf.name


def test_a_value_in_orbax_that_is_not_an_array_is_named(tmp_path: Folder) -> None:
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "m", {"params": {"w": jnp.ones(2)}, "name": "x"})
    with pytest.raises(CheckpointError, match="'name' is not an array"):
        load_flax(tmp_path / "m")


def test_a_bare_parameter_tree_fits_linen_variables(tmp_path: Folder) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(
        serialization.msgpack_serialize({"d": {"kernel": np.ones((2, 3))}})
    )
    template = {"params": {"d": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}}
    with jax.enable_x64(True):
        filled = load_flax(tmp_path, template)
    assert filled["params"]["d"]["kernel"].shape == (2, 3)


# --- memory --------------------------------------------------------------------------------------------


def test_data_starts_on_a_64_byte_boundary_so_that_jax_shares_the_map(tmp_path: Folder) -> None:
    tree = {"params": {"odd": jnp.ones(3), "w": jnp.ones((16, 16)), "v": jnp.ones((8, 8), jnp.bfloat16)}}
    save_flax(tmp_path / "m.safetensors", tree)
    raw = (tmp_path / "m.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    offsets = {name: header[name]["data_offsets"][0] for name in header if name != "__metadata__"}
    assert offsets["params.w"] % 64 == 0
    assert offsets["params.v"] % 64 == 0
    leaf = open_checkpoint(tmp_path / "m.safetensors").leaves["params.w"]
    tensor = leaf.read()
    from torchjax_bridge import to_jax

    assert to_jax(tensor, copy=False).unsafe_buffer_pointer() == tensor.data_ptr()


def test_a_loaded_tensor_is_a_view_of_the_map_and_writing_to_it_leaves_the_file_alone(
    tmp_path: Folder,
) -> None:
    save_state_dict(tmp_path / "m.safetensors", {"a": torch.zeros(4), "b": torch.zeros(4)})
    first = load_state_dict(tmp_path / "m.safetensors")
    assert first["a"].untyped_storage().data_ptr() == first["b"].untyped_storage().data_ptr()
    first["a"].fill_(1)
    assert load_state_dict(tmp_path / "m.safetensors")["a"].sum() == 0
    own = load_state_dict(tmp_path / "m.safetensors", copy=True)
    assert own["a"].untyped_storage().data_ptr() != own["b"].untyped_storage().data_ptr()


def test_an_unaligned_tensor_is_read_right(tmp_path: Folder) -> None:
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}  # fmt: skip
    raw = json.dumps(header).encode()
    data = b"\x05" + np.array([1.5, -2.0], np.float32).tobytes()
    (tmp_path / "m.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert load_state_dict(tmp_path / "m.safetensors")["b"].tolist() == [1.5, -2.0]


# --- shards --------------------------------------------------------------------------------------------


def test_shards_and_their_index_are_those_of_model_hubs(tmp_path: Folder) -> None:
    state = {f"l.{n}.weight": torch.randn(16, 16) for n in range(5)}
    save_state_dict(tmp_path / "m", state, shard_size=2048)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 1024
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    found = {}
    for file in set(index["weight_map"].values()):
        found |= safetensors.torch.load_file(tmp_path / "m" / file)
    assert_same(found, state)
    assert_same(load_state_dict(tmp_path / "m"), state)
    assert_same(load_state_dict(tmp_path / "m" / "model.safetensors.index.json"), state)


def test_sharded_torch_files_of_model_hubs_are_read(tmp_path: Folder) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    places = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(load_state_dict(tmp_path), {"a": torch.ones(2), "b": torch.zeros(2)})


# --- what is refused -----------------------------------------------------------------------------------


def test_loading_with_the_wrong_function_names_the_right_one(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "t.pt", {"w": torch.ones(1)})
    save_flax(tmp_path / "f.msgpack", {"params": {"w": jnp.ones(1)}})
    with pytest.raises(CheckpointError, match="load_state_dict"):
        load_flax(tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="load_flax"):
        load_state_dict(tmp_path / "f.msgpack")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "folder"])
@pytest.mark.parametrize(
    "value", [torch.arange(2.0)[::2], torch.tensor(2.5).expand(1), torch.tensor(3.0)[None].t()]
)
def test_one_element_of_any_stride_is_saved(tmp_path: Folder, name: str, value: torch.Tensor) -> None:
    save_state_dict(tmp_path / name, {"x": value, "y": torch.ones(2)})
    assert torch.equal(load_state_dict(tmp_path / name)["x"], value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_file_of_one_rank_is_refused_and_not_read_as_the_whole(tmp_path: Folder) -> None:
    writer = pytest.importorskip("torch.distributed.checkpoint.hf_storage").HuggingFaceStorageWriter
    state = {"weight": torch.randn(4, 6)}
    storage = writer(str(tmp_path / "out"), fqn_to_index_mapping={"weight": 1}, save_distributed=True)
    torch.distributed.checkpoint.save(state, storage_writer=storage, no_dist=True)
    (file,) = (tmp_path / "out").glob("shard*.safetensors")
    with pytest.raises(
        CheckpointError, match=r"what one rank has of each tensor .* enable_consolidation=True"
    ):
        load_state_dict(file)


def test_a_format_that_cannot_hold_the_weights_is_refused(tmp_path: Folder) -> None:
    with pytest.raises(CheckpointError, match="msgpack holds flax weights"):
        save_state_dict(tmp_path / "m", {"w": torch.ones(1)}, format="msgpack")
    with pytest.raises(CheckpointError, match="the name of a pt file"):
        save_state_dict(tmp_path / "m.pt", {"w": torch.ones(1)}, format="safetensors")
    with pytest.raises(CheckpointError, match=r"no torch\.complex128"):
        save_state_dict(tmp_path / "m.safetensors", {"w": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="without elements"):
        save_flax(tmp_path / "m", {"params": {"w": jnp.zeros((0, 2))}}, format="orbax")
    assert list(tmp_path.iterdir()) == []


def test_reading_files_imports_neither_safetensors_nor_msgpack_nor_orbax() -> None:
    code = (
        "import sys, torchjax_bridge.weights.files as f, torch, tempfile\n"
        "d = tempfile.mkdtemp()\n"
        "before = set(sys.modules)\n"
        "f.save_state_dict(d + '/m.safetensors', {'w': torch.ones(2)}); f.load_state_dict(d + '/m.safetensors')\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'safetensors', 'orbax', 'msgpack', 'tensorstore'}, new\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
