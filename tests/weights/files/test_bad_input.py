"""A damaged file is refused with one error, and nothing is written."""

import json
import os
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Callable

import jax.numpy as jnp
import pytest
import torch
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import (
    convert,
    load_flax,
    load_state_dict,
    open_checkpoint,
    save_flax,
    save_state_dict,
)

Folder = pathlib.Path


def _safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def _entry(shape: list, begin: object, end: object, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path: Folder, match: str) -> None:
    """Reading and converting raise one error of one line each, and write nothing."""
    before = sorted(path.parent.iterdir())
    for act in (lambda: open_checkpoint(path), lambda: convert(path, path.parent / "out", to="torch")):
        with pytest.raises(CheckpointError, match=match) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


# --- safetensors ---------------------------------------------------------------------------------------

_GOOD = {"a": _entry([2], 0, 8)}

_BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "shorter than a length": (b"\1\0\0", "truncated"),
    "length beyond the file": (_safetensors(_GOOD, bytes(8), length=10_000), "truncated"),
    "length of 2**64 - 1": (_safetensors(_GOOD, bytes(8), length=2**64 - 1), "truncated"),
    "length too short": (_safetensors(_GOOD, bytes(8), length=5), "damaged"),
    "no JSON": (_safetensors(b"{'a': 1}"), "damaged"),
    "no UTF-8": (_safetensors(b'{"\xff": 1}'), "damaged"),
    "a lone surrogate": (
        _safetensors(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), "damaged"),
    "no object": (_safetensors([1, 2]), "not an object"),
    "nested too deep": (_safetensors(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "damaged|offsets"),
    "a number of many digits": (_safetensors(b'{"a":' + b"9" * 10_000 + b"}"), "damaged|offsets"),
    "the same name twice": (
        _safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                     b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), "'a' comes twice"),
    "the same field twice": (
        _safetensors(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"), "comes twice"),
    "an entry that is none": (_safetensors({"a": 3}), "two offsets"),
    "a field too many": (_safetensors({"a": {**_entry([2], 0, 8), "code": 1}}, bytes(8)), "two offsets"),
    "a negative size": (_safetensors({"a": _entry([-2], 0, 8)}, bytes(8)), "two offsets"),
    "a fractional size": (_safetensors({"a": _entry([2.0], 0, 8)}, bytes(8)), "two offsets"),
    "a size that is a truth value": (_safetensors({"a": _entry([True], 0, 4)}, bytes(4)), "two offsets"),
    "a size beyond 64 bits": (_safetensors({"a": _entry([2**70], 0, 8)}, bytes(8)), "two offsets"),
    "a product beyond 64 bits": (_safetensors({"a": _entry([2**40, 2**40], 0, 8)}, bytes(8)), "takes"),
    "sizes that multiply to 2**64": (_safetensors({"a": _entry([2**32, 2**30], 0, 0)}), "takes"),
    "one offset": (
        _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)), "two offsets"),
    "a negative offset": (_safetensors({"a": _entry([2], -8, 0)}, bytes(8)), "two offsets"),
    "offsets in the wrong order": (_safetensors({"a": _entry([2], 8, 0)}, bytes(8)), "takes"),
    "offsets beyond the data": (_safetensors({"a": _entry([2], 0, 8)}, bytes(4)), "truncated"),
    "offsets that hold too much": (_safetensors({"a": _entry([2], 0, 12)}, bytes(12)), "takes 8 bytes"),
    "overlapping data": (_safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, bytes(12)), "overlaps"),
    "the same data for two": (_safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 0, 8)}, bytes(8)), "overlaps"),
    "a gap": (_safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 12, 20)}, bytes(20)), "gap"),
    "data before the first": (_safetensors({"a": _entry([2], 8, 16)}, bytes(16)), "gap"),
    "bytes behind the last": (_safetensors(_GOOD, bytes(9)), "belong to no tensor"),
    "an unknown dtype": (_safetensors({"a": _entry([2], 0, 8, "F4")}, bytes(8)), "dtype 'F4'"),
    "metadata that is no text": (_safetensors({"__metadata__": {"n": 1}, **_GOOD}, bytes(8)), "strings"),
    "metadata that is no map": (_safetensors({"__metadata__": [], **_GOOD}, bytes(8)), "strings"),
}  # fmt: skip


@pytest.mark.parametrize("name", _BAD)
def test_a_damaged_safetensors_file_is_refused(tmp_path: Folder, name: str) -> None:
    raw, match = _BAD[name]
    (tmp_path / "m.safetensors").write_bytes(raw)
    refused(tmp_path / "m.safetensors", match)


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "whole.safetensors", {"a": torch.ones(3), "b": torch.ones(2, 2)})
    raw = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(raw)):
        cut.write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(cut)


# --- indexes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "not a plain file name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a plain file name"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "not a plain file name"),
        ({"weight_map": {"a": "..\\x.safetensors"}}, "not a plain file name"),
        ({"weight_map": {"a": ".."}}, "not a plain file name"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "not a plain file name"),
        ({"weight_map": {"a": 3}}, "not a plain file name"),
        ({"weight_map": {"a": "gone.safetensors"}}, "does not exist"),
        (
            {"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "z": "x.safetensors"}},
            "'z'.*does not hold it",
        ),
        ({"weight_map": {"b": "x.safetensors"}}, "'a'.*but the index does not"),
        ({"weight_map": {}}, "no 'weight_map'"),
        ({"weight_map": []}, "no 'weight_map'"),
        ([], "not an object"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Folder, index: object, match: str) -> None:
    folder = tmp_path / "m"
    save_state_dict(tmp_path / "secret.safetensors", {"a": torch.ones(1)})
    folder.mkdir()
    save_state_dict(folder / "x.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    refused(folder / "m.safetensors.index.json", match)


def test_an_index_with_a_name_twice_is_refused(tmp_path: Folder) -> None:
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    refused(tmp_path / "m.safetensors.index.json", "comes twice")


# --- torch files ---------------------------------------------------------------------------------------


class Bomb:
    """Pickles into a call."""

    def __init__(self, path: Folder) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path: Folder, how: str) -> None:
    file, trap = tmp_path / "m.pt", tmp_path / "trap"
    content = {"w": torch.ones(1), "x": Bomb(trap)}
    if how == "bare pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    refused(file, "pickled|damaged")
    assert not trap.exists()


def test_a_class_in_a_torch_file_is_named_with_the_way_out(tmp_path: Folder) -> None:
    import argparse

    torch.save({"w": torch.ones(1), "args": argparse.Namespace(lr=1)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", r"argparse\.Namespace.*add_safe_globals")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.pt")
    assert (
        f"{tmp_path}/m-tensors.pt" in caught.value.__notes__[0]
    )  # the line that writes it: tests/test_cli.py


def test_programs_are_called_what_they_are(tmp_path: Folder) -> None:
    net, example = torch.nn.Linear(2, 3), torch.ones(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, example).save(tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "it is a TorchScript archive, not a file of torch.save")
    (tmp_path / "m.pt").unlink()
    torch.export.save(torch.export.export(net, (example,)), tmp_path / "m.pt2")
    refused(tmp_path / "m.pt2", r"it is a program of torch\.export, not a file of torch.save")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"w": 3}, "holds w"),
        ({}, "holds nothing"),
        ({"w": torch.ones(2, 2).to_sparse()}, "only dense tensors"),
        ({"w": torch.empty(2, device="meta")}, "without values"),
    ],
)
def test_a_torch_file_without_weights_is_refused(tmp_path: Folder, content: object, match: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", match)


def test_a_truncated_torch_file_is_refused(tmp_path: Folder) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(100)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
        raw = (tmp_path / "whole.pt").read_bytes()
        for size in (1, 3, 20, len(raw) // 2, len(raw) - 30, len(raw) - 1):
            (tmp_path / "cut.pt").write_bytes(raw[:size])
            with pytest.raises(CheckpointError, match=r"cut\.pt"):
                load_state_dict(tmp_path / "cut.pt")


def test_a_zip_that_is_no_torch_file_is_refused(tmp_path: Folder) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("../evil.txt", "x")
    refused(tmp_path / "m.pt", r"m\.pt")


# --- msgpack, orbax, everything else -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"\x81\xa1a\x01", "is an int, not an array"),
        (b"\x81\xa1a\xc7\x02\x05ab", "type 5 is not an array"),
        (b"\x82\xa1a\x80\xa1a\x80", "comes twice"),
        (b"\x81\x90\x80", "has a list as its name"),
        (b"\x81\xa1a\xc1", "begins no value"),
        (b"\xdf\xff\xff\xff\xff", "truncated"),
        (b"\xdd\xff\xff\xff\xff", "truncated|holds no arrays"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1\xff\x80", "UTF-8"),
        (b"\x80" + b"\0", "bytes follow"),
        (b"\x80", "holds no arrays"),
        (b"\x81\xa1a" * 70 + b"\x80", "deep"),
    ],
)
def test_a_damaged_msgpack_file_is_refused(tmp_path: Folder, raw: bytes, match: str) -> None:
    (tmp_path / "m.msgpack").write_bytes(raw)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(tmp_path / "m.msgpack")


def _array(shape: bytes, name: bytes, data: bytes) -> bytes:
    inner = b"\x93" + shape + bytes([0xA0 | len(name)]) + name + b"\xc4" + bytes([len(data)]) + data
    return b"\x81\xa1a\xc7" + bytes([len(inner)]) + b"\x01" + inner


def test_an_array_in_msgpack_that_contradicts_itself_is_refused(tmp_path: Folder) -> None:
    for raw, match in (
        (_array(b"\x91\x02", b"float32", bytes(8)), None),
        (_array(b"\x91\x03", b"float32", bytes(8)), "takes 12 bytes, not 8"),
        (_array(b"\x91\xff", b"float32", bytes(8)), "not a shape"),
        (_array(b"\x91\xcf" + b"\xff" * 8, b"float32", b""), "not a shape"),
        (_array(b"\x91\x02", b"object", bytes(16)), "'object'"),
        (_array(b"\x91\x02", b"V8", bytes(16)), "'V8'"),
        (_array(b"\x91\x02", b"float32,O", bytes(8)), "float32,O"),
    ):
        (tmp_path / "m.msgpack").write_bytes(raw)
        if match is None:
            assert load_flax(tmp_path / "m.msgpack")["a"].shape == (2,)
            continue
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(tmp_path / "m.msgpack")


def test_a_damaged_orbax_checkpoint_is_refused_or_gives_the_right_values(tmp_path: Folder) -> None:
    want = jnp.arange(1000.0)
    save_flax(tmp_path / "m", {"params": {"w": want}}, format="orbax")
    refusals = 0
    for file in [path for path in (tmp_path / "m").rglob("*") if path.is_file() and path.stat().st_size]:
        raw = file.read_bytes()
        file.write_bytes(raw[: len(raw) // 2])
        try:  # Orbax keeps files that reading values does not need
            assert (load_flax(tmp_path / "m")["params"]["w"] == want).all()
        except CheckpointError:
            refusals += 1
        file.write_bytes(raw)
    assert refusals >= 3


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Folder) -> None:
    (tmp_path / "notes.txt").write_text("hello, I am a text")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, match in (
        ("nothing", "there is no checkpoint"),
        ("notes.txt", "not a safetensors, torch or msgpack file"),
        ("empty", "nothing in it"),
        (".", "holds no checkpoint: it has"),
        ("pipe", "neither a file nor a folder"),
    ):
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(tmp_path / name)
    for name in ("a.safetensors", "b.safetensors"):
        save_state_dict(tmp_path / name, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="several checkpoints"):
        open_checkpoint(tmp_path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state_dict(tmp_path / "m.safetensors", {"w": torch.ones(1)})

    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("torchjax_bridge.weights.files._mapped.os.open", denied)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(tmp_path / "m.safetensors")


# --- fuzzing -------------------------------------------------------------------------------------------

_QUICK = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


def _valid(kind: str, folder: Folder) -> bytes:
    path = folder / f"valid.{kind}"
    if kind == "safetensors":
        save_state_dict(
            path, {"a.weight": torch.ones(2, 3), "b": torch.arange(4), "c": torch.ones(1).bfloat16()}
        )
    elif kind == "msgpack":
        path.write_bytes(
            serialization.msgpack_serialize({"params": {"a": jnp.ones((2, 3)), "b": jnp.arange(4)}})
        )
    elif kind == "pt":
        torch.save({"a": torch.ones(2, 3), "b": torch.arange(4)}, path)
    elif kind == "th":
        torch.save({"a": torch.ones(2, 3)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_text('{"metadata": {"total_size": 24}, "weight_map": {"a": "x.safetensors"}}')
    return path.read_bytes()


def _mutate(raw: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """Overwrite, insert or delete at places; a place is a share of the length."""
    for place, how, what in changes:
        at = int(place * len(raw))
        raw = raw[:at] + what + raw[at + (len(what) if how == 0 else 0 if how == 1 else len(what) + how) :]
    return raw


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "index.json", "pt", "th"])
@pytest.mark.parametrize("examples", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_mutated_file_crashes_hangs_or_writes(tmp_path: Folder, kind: str, examples: int) -> None:
    valid = _valid(kind, tmp_path)
    save_state_dict(tmp_path / "x.safetensors", {"a": torch.ones(2, 3)})
    name = "m.safetensors.index.json" if kind == "index.json" else f"m.{kind}"
    changes = st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4
    )

    @settings(_QUICK, max_examples=examples)
    @given(changes)
    def attempt(found: list[tuple[float, int, bytes]]) -> None:
        (tmp_path / name).write_bytes(_mutate(valid, found))
        before = sorted(tmp_path.iterdir())
        try:
            leaves = open_checkpoint(tmp_path / name).leaves
            for leaf in leaves.values():
                tensor = leaf.read()
                assert tensor.dtype == leaf.dtype
                assert tuple(tensor.shape) == leaf.shape
                tensor.clone()
        except CheckpointError:
            pass
        assert sorted(tmp_path.iterdir()) == before

    attempt()


@pytest.mark.slow
@_QUICK
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4),
    max_leaves=12,
), st.binary(max_size=16))  # fmt: skip
def test_no_json_for_a_header_crashes_the_reader(tmp_path_factory, header: object, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(_safetensors(header, data))
    try:
        for leaf in open_checkpoint(path).leaves.values():
            leaf.read()
    except CheckpointError:
        pass
