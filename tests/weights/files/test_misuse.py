"""Mistakes of a caller: each is one error that says what to do, and nothing is written or guessed."""

import json
import pathlib
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import serialization

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import (
    convert,
    load_flax,
    load_state_dict,
    open_checkpoint,
    save_flax,
    save_state_dict,
)

from .bits import assert_same

Folder = pathlib.Path


def _safetensors(path: Folder, names: dict[str, int], notes: dict[str, str]) -> Folder:
    """A file of float32 vectors of these lengths."""
    header: dict[str, Any] = {"__metadata__": notes}
    place = 0
    for name, size in names.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [place, place + 4 * size]}
        place += 4 * size
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + np.arange(place // 4, dtype="f4").tobytes())
    return path


# --- views with other values of the same memory --------------------------------------------------------


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_a_conjugate_or_negative_view_is_not_taken_for_its_base(tmp_path: Folder, name: str) -> None:
    value = torch.randn(3, 2, dtype=torch.complex64)
    state = {"a": value, "b": value.conj(), "c": value.imag, "d": value.conj().imag}
    assert state["d"].is_neg()
    save_state_dict(tmp_path / name, state)
    found = load_state_dict(tmp_path / name)
    for key, tensor in state.items():
        assert torch.equal(found[key].resolve_conj(), tensor.resolve_conj().resolve_neg())


def test_a_conjugate_view_in_a_torch_file_is_not_taken_for_its_base(tmp_path: Folder) -> None:
    value = torch.randn(3, dtype=torch.complex64)
    torch.save({"a": value, "b": value.conj()}, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors", to="torch")
    found = load_state_dict(tmp_path / "m.safetensors")
    assert torch.equal(found["b"], value.conj().resolve_conj())
    assert torch.equal(load_state_dict(tmp_path / "m.pt")["b"], value.conj())


# --- what cannot be saved ------------------------------------------------------------------------------


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize(("make", "match"), [
    (_nested, "'w' is nested"),
    (_quantized, "'w' is torch.qint8"),
    (lambda: torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    (_fake, "'w' is a FakeTensor"),
    (lambda: torch.ones(2, device="meta"), "'w' is on the meta device"),
    (lambda: np.ones(2), "'w' is an ndarray"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_what_is_no_plain_tensor_is_refused_by_name(
    tmp_path: Folder, make: Any, match: str, name: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        save_state_dict(tmp_path / name, {"w": make()})
    assert not list(tmp_path.iterdir())


def test_saving_inside_a_transform_and_keys_that_are_no_strings_are_refused(tmp_path: Folder) -> None:
    def inside(value: torch.Tensor) -> torch.Tensor:
        save_state_dict(tmp_path / "m.pt", {"w": value})
        return value

    with pytest.raises(CheckpointError, match="'w' has no values inside"):
        torch.func.vmap(inside)(torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="keys of a state_dict are strings"):
        save_state_dict(tmp_path / "m.pt", {1: torch.ones(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize(("options", "match"), [
    ({"to": "jax"}, "pass 'flax' or 'torch'"),
    ({"to": "torch", "format": "pytorch"}, "'pytorch' is not a format: choose from safetensors"),
    ({"to": "torch", "dtype": "bf16"}, "such as torch.bfloat16"),
    ({"to": "torch", "dtype": torch.int8}, "such as torch.bfloat16"),
    ({"to": "torch", "shard_size": 0}, "above 0"),
    ({"to": "torch", "memory": -1}, "above 0"),
])  # fmt: skip
def test_an_option_that_means_nothing_is_refused(
    tmp_path: Folder, options: dict[str, Any], match: str
) -> None:
    save_state_dict(tmp_path / "a.safetensors", {"w.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "a.safetensors", tmp_path / "b", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["m.ckpt", "m.npz", "m.PT", "m.Safetensors"])
def test_a_folder_with_the_suffix_of_a_file_is_refused(tmp_path: Folder, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' has neither a suffix of a format"):
        save_state_dict(tmp_path / name, {"w": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_notes_that_no_header_holds_are_refused(tmp_path: Folder) -> None:
    state = {"w": torch.ones(1)}
    with pytest.raises(CheckpointError, match="'epoch': 3 is not a pair of strings"):
        save_state_dict(tmp_path / "m.safetensors", state, metadata={"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="pt has none"):
        save_state_dict(tmp_path / "m.pt", state, metadata={"epoch": "3"})
    with pytest.raises(CheckpointError, match="msgpack has none"):
        save_flax(tmp_path / "m.msgpack", {"params": {"w": jnp.ones(1)}}, metadata={"epoch": "3"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_a_name_that_is_no_text_is_refused(tmp_path: Folder, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a name for a tensor"):
        save_state_dict(tmp_path / name, {"\ud800.weight": torch.ones(1)})
    assert not list(tmp_path.iterdir())


# --- ambiguous files -----------------------------------------------------------------------------------


def test_two_files_of_different_suffixes_are_not_chosen_between(tmp_path: Folder) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(a.pt, b.pth\)"):
        load_state_dict(tmp_path)
    save_state_dict(tmp_path / "model.safetensors", {"w": torch.full((1,), 2.0)})
    assert load_state_dict(tmp_path)["w"] == 2.0  # as the readers of model hubs choose


def test_a_note_is_not_read_as_a_tensor(tmp_path: Folder) -> None:
    with pytest.raises(CheckpointError, match="'best': 'w' would be read as a tensor 'best'"):
        save_state_dict(tmp_path / "m.safetensors", {"w": torch.ones(1)}, metadata={"best": "w"})
    save_flax(tmp_path / "m.safetensors", {"params": {"w": jnp.ones(1)}}, metadata={"a": "params.w"})
    assert set(load_flax(tmp_path / "m.safetensors")) == {"params"}


def test_a_tie_noted_in_one_shard_does_not_hide_the_tensor_of_another(tmp_path: Folder) -> None:
    _safetensors(tmp_path / "1.safetensors", {"b": 2}, {"format": "pt"})
    _safetensors(tmp_path / "2.safetensors", {"a": 3}, {"format": "pt", "b": "a"})
    places = {"b": "1.safetensors", "a": "2.safetensors"}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert load_state_dict(tmp_path)["b"].shape == (2,)


def test_two_names_for_one_place_in_the_tree_are_refused(tmp_path: Folder) -> None:
    notes = {"format": "flax", "torchjax_bridge.paths": json.dumps({"x": ["q"], "y": ["q"]})}
    with pytest.raises(CheckpointError, match="'x' and 'y' have the same path"):
        load_flax(_safetensors(tmp_path / "m.safetensors", {"x": 1, "y": 1}, notes))


def test_an_entry_whose_name_has_dots_is_found(tmp_path: Folder) -> None:
    torch.save({"a.b": {"w": torch.ones(1)}, "c": {"w": torch.zeros(1)}}, tmp_path / "m.pt")
    assert load_state_dict(tmp_path / "m.pt", key="a.b")["w"] == 1.0


def test_extra_state_that_is_no_tensor_is_left_out_and_said(tmp_path: Folder) -> None:
    torch.save({"w": torch.ones(1), "m._extra_state": {"scale": 3}}, tmp_path / "m.pt")
    assert set(load_state_dict(tmp_path / "m.pt")) == {"w"}
    assert (
        open_checkpoint(tmp_path / "m.pt").note
        == "a state_dict, without what is not a tensor: m._extra_state"
    )


# --- files that look like another format ---------------------------------------------------------------


def test_a_msgpack_file_whose_ninth_byte_is_a_brace_is_read(tmp_path: Folder) -> None:
    raw = serialization.to_bytes({"scale": np.arange(27, dtype=np.float32).reshape(3, 3, 3)})
    assert raw[8:9] == b"{"
    (tmp_path / "m.msgpack").write_bytes(raw)
    assert load_flax(tmp_path / "m.msgpack")["scale"][2, 2, 2] == 26


def test_an_array_of_many_axes_goes_through_msgpack(tmp_path: Folder) -> None:
    value = jnp.arange(6.0).reshape((2, *(1,) * 15, 3))
    save_flax(tmp_path / "m.msgpack", {"params": {"w": value}})
    assert np.array_equal(load_flax(tmp_path / "m.msgpack")["params"]["w"], value)
    restored = serialization.msgpack_restore((tmp_path / "m.msgpack").read_bytes())
    assert np.array_equal(restored["params"]["w"], value)


# --- files that would take forever ---------------------------------------------------------------------


def test_a_name_that_comes_twice_among_many_is_found_at_once(tmp_path: Folder) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [*range(100_000), 99_999]
    raw = ("{" + ",".join(f'"{name}":{entry}' for name in names) + "}").encode()
    (tmp_path / "m.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError, match="'99999' comes twice"):
        open_checkpoint(tmp_path / "m.safetensors")  # looking each name up in a list takes minutes


@pytest.mark.parametrize("framework", ["pt", "flax"])
def test_a_name_nested_beyond_any_model_is_refused(tmp_path: Folder, framework: str) -> None:
    name = ".".join("a" * 50_000)
    path = _safetensors(tmp_path / "m.safetensors", {name: 1}, {"format": framework})
    with pytest.raises(CheckpointError, match="nested 50000 deep"):
        open_checkpoint(path)
    torch.save({name: torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="nested 50000 deep"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("source", [None, [("w", torch.ones(2))], torch.ones(2)])
def test_what_names_no_weights_is_refused_before_anything_is_written(tmp_path: Folder, source: Any) -> None:
    with pytest.raises(CheckpointError, match=r"pass an nn\.Module or its state_dict"):
        save_state_dict(tmp_path / "m.pt", source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, "20KB", 1.5])
def test_a_shard_size_that_is_no_number_of_bytes_is_refused(tmp_path: Folder, size: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"shard_size must be a number of bytes above 0, such as 10\*\*9; got"
    ):
        save_state_dict(tmp_path / "m", {"w": torch.ones(2)}, shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("usual", "others"),
    [
        ("model.safetensors", ["model.fp16.safetensors", "consolidated.safetensors", "optimizer.pt"]),
        ("pytorch_model.bin", ["training_args.bin", "optimizer.pt", "scheduler.pt"]),
    ],
)
def test_the_weights_of_a_hub_are_found_beside_what_else_it_keeps(
    tmp_path: Folder, usual: str, others: list[str]
) -> None:
    want = {"w": torch.randn(3)}
    save_state_dict(tmp_path / usual, want)
    for name in [*others, "config.json", "tokenizer.json"]:
        (tmp_path / name).write_bytes(b"no weights")
    assert_same(load_state_dict(tmp_path), want)
    save_flax(tmp_path / "flax_model.msgpack", {"params": {"w": jnp.ones(3)}})
    if usual == "pytorch_model.bin":  # the weights of two frameworks: which is meant?
        with pytest.raises(CheckpointError, match="several checkpoints"):
            load_state_dict(tmp_path)
