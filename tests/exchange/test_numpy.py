"""NumPy arrays, numbers and strings: what is shared, copied, passed through and refused."""

import dataclasses
import decimal
import enum
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from torchjax_bridge import as_torch_function, to_jax, to_torch
from torchjax_bridge.errors import DtypeError, NarrowingError, ShareError, UnsupportedLeafError
from torchjax_bridge.exchange._dtypes import TORCH_TO_JAX

BOTH_WAYS = {"to_jax": to_jax, "to_torch": to_torch}
both = pytest.mark.parametrize("convert", BOTH_WAYS.values(), ids=BOTH_WAYS)
RESULT_CLASS = {to_jax: jax.Array, to_torch: torch.Tensor}


def aligned(*shape, dtype=np.float32, offset=0):
    """An array with random bits whose address is ``offset`` bytes past a multiple of 64."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 255, size + 128, dtype=np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + size].view(dtype).reshape(shape)


def address(thing):
    return {jax.Array: lambda: thing.unsafe_buffer_pointer(), torch.Tensor: lambda: thing.data_ptr()}[
        jax.Array if isinstance(thing, jax.Array) else torch.Tensor
    ]()


def bits(thing):
    if isinstance(thing, torch.Tensor):
        thing = to_jax(thing)
    return np.ascontiguousarray(np.asarray(thing)).tobytes()


@pytest.fixture
def x64_on():
    with jax.enable_x64(True):
        yield


@pytest.mark.every(3)
@both
@pytest.mark.parametrize("dtype", TORCH_TO_JAX.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (8,), (3, 5), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("copy", [None, False, True])
def test_an_array_of_every_dtype_crosses_bit_for_bit(x64_on, convert, dtype, shape, copy):
    array = aligned(*shape, dtype=dtype)
    there = convert(array, copy=copy)
    assert isinstance(there, RESULT_CLASS[convert])
    assert there.shape == shape
    assert there.dtype == (dtype if convert is to_jax else {v: k for k, v in TORCH_TO_JAX.items()}[dtype])
    assert bits(there) == array.tobytes()
    if array.size:
        assert (address(there) == array.ctypes.data) is (copy is not True)


LAYOUTS = {
    "transposed": lambda: aligned(4, 6).T,
    "steps": lambda: aligned(4, 8)[:, ::2],
    "broadcast": lambda: np.broadcast_to(aligned(4), (3, 4)),
    "reversed": lambda: aligned(4, 6)[::-1, ::-1],
    "another byte order": lambda: aligned(4, 6).astype(">f4"),
    "a field of a record": lambda: np.zeros(5, [("a", "f4"), ("b", "u1")])["a"],
    "no multiple of an element": lambda: np.frombuffer(bytes(range(41)), np.uint8)[1:].view(np.float32),
    "read-only": lambda: np.frombuffer(bytes(range(64)), np.float32),
    "bfloat16 in another byte order": lambda: (
        np.arange(4).astype(">f4").astype(np.dtype(ml_dtypes.bfloat16).newbyteorder(">"))
    ),
    "bfloat16 reversed": lambda: aligned(8, dtype=ml_dtypes.bfloat16)[::-1],
    "float8 transposed": lambda: aligned(4, 8, dtype=ml_dtypes.float8_e4m3fn).T,
    "bool reversed": lambda: np.array([True, False, False])[::-1],
    "0-d, another byte order": lambda: np.array(3.0, ">f4"),
}


@both
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_an_array_of_every_layout_keeps_its_values_and_leaves_the_input_alone(convert, make):
    array = make()
    before = array.tobytes()
    wanted = np.array(array.astype(array.dtype.newbyteorder("=")), order="C")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared, copied = convert(array), convert({"a": array}, copy=True)["a"]
    for there in (shared, copied):
        assert there.shape == array.shape
        assert bits(there) == wanted.tobytes()
    assert address(copied) != array.ctypes.data
    if convert is to_torch:
        copied.zero_()
        assert array.tobytes() == before
        assert copied.is_contiguous()


@pytest.mark.parametrize("name", ["reversed", "another byte order", "a field of a record"])
@both
def test_copy_false_names_why_torch_cannot_view_the_array(convert, name):
    why = {
        "reversed": "negative",
        "another byte order": "bytes are in another order",
        "a field of a record": "multiples",
    }
    with pytest.raises(ShareError, match=rf"'obs' with (JAX|torch) under copy=False.*{why[name]}"):
        convert({"obs": LAYOUTS[name]()}, copy=False)


def test_a_read_only_array_is_shared_with_jax_and_copied_for_torch(tmp_path):
    array = aligned(16)
    array.flags.writeable = False
    assert address(to_jax(array, copy=False)) == array.ctypes.data
    tensor = to_torch(array)
    before = array.tobytes()
    tensor.zero_()
    assert array.tobytes() == before
    with pytest.raises(ShareError, match="read-only"):
        to_torch([array], copy=False)
    np.save(tmp_path / "a.npy", np.arange(64.0, dtype=np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert address(to_jax(mapped)) == mapped.ctypes.data
    assert to_torch(mapped).tolist() == to_jax(mapped).tolist() == list(range(64))


def test_a_shared_array_outlives_its_name():
    array = aligned(1024)
    wanted = array.tobytes()
    there, back = to_jax(array, copy=False), to_torch(array, copy=False)
    array.flags.writeable = False
    again = to_jax(array, copy=False)
    del array
    junk = [np.zeros(1024, np.float32) for _ in range(50)]
    assert bits(there) == bits(back) == bits(again) == wanted
    del junk


def test_unaligned_memory_is_copied_for_jax_and_refused_under_copy_false():
    array = aligned(16, offset=16)
    assert address(to_jax(array)) != array.ctypes.data
    with pytest.raises(ShareError, match="16 bytes past a multiple of 64"):
        to_jax(array, copy=False)
    assert address(to_torch(array, copy=False)) == array.ctypes.data


def test_nothing_is_narrowed_silently_with_x64_off():
    assert to_jax(np.arange(3)).dtype == jnp.int32
    assert to_jax(np.arange(3, dtype=">i8")).tolist() == [0, 1, 2]
    with pytest.raises(NarrowingError, match=r"'k'.*cannot hold 1099511627776"):
        to_jax({"k": np.array([2**40])})
    wide = aligned(3, dtype=np.int64)
    wide[:] = 1
    with pytest.raises(ShareError, match=r"becomes torch\.int32 by a copy"):
        to_jax(wide, copy=False)
    for dtype, half in ((np.float64, "float32"), (">f8", "float32"), (np.complex128, "complex64")):
        with pytest.raises(DtypeError, match=rf"'k'.*needs x64, which is off. Cast it to \S*{half}"):
            to_jax({"k": np.zeros(2, dtype)})
    assert to_torch(np.zeros(2)).dtype is torch.float64


class Colour(enum.IntEnum):
    RED = 1


NUMBERS = {
    "bool": True, "int": 2**70, "float": 1.5, "complex": 2j, "str": "cart", "bytes": b"x", "IntEnum": Colour.RED,
    "np.float64": np.float64(0.1), "np.float32": np.float32(0.1), "np.int64": np.int64(2**40), "np.bool_": np.True_,
    "np.str_": np.str_("a"), "bfloat16": ml_dtypes.bfloat16(1.5), "np.longdouble": np.longdouble(1),
}  # fmt: skip


@both
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("copy", [None, False, True])
def test_numbers_and_strings_pass_through(convert, number, copy):
    assert convert(number, copy=copy) is number
    there = convert({"n": number, "none": None, "x": [aligned(2), number]}, copy=copy and True, device="cpu")
    assert there["n"] is there["x"][1] is number
    assert there["none"] is None


@both
def test_the_state_of_an_environment_crosses_there_and_back(convert):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        obs: Any
        reward: Any
        done: Any
        info: Any

    obs = aligned(4)
    state = State(
        obs, np.float64(1.0), False, {"episode": {"r": 3.5, "l": 7}, "final": [obs, None], "name": "x"}
    )
    there = convert(state)
    assert isinstance(there.obs, RESULT_CLASS[convert])
    assert there.obs is there.info["final"][0]
    assert (there.reward, there.done, there.info["episode"], there.info["name"]) == (
        1,
        False,
        {"r": 3.5, "l": 7},
        "x",
    )
    for back in (to_jax(there), to_torch(there)):
        assert bits(back.obs) == obs.tobytes()


REFUSED = {
    "object": (lambda: np.array([object(), 1]), r"dtype object.*tolist\(\)"),
    "str": (lambda: np.array(["a"]), r"dtype <U1.*tolist\(\)"),
    "bytes": (lambda: np.array([b"a"]), r"dtype \|S1.*tolist\(\)"),
    "record": (lambda: np.zeros(2, [("a", "f4")]), r"array\[name\] for name in"),
    "recarray": (lambda: np.rec.array(np.zeros(2, [("a", "f4")])), r"array\[name\] for name in"),
    "date": (lambda: np.array(["2020-01-01"], "M8[D]"), r"astype\(numpy.int64\)"),
    "duration": (lambda: np.array([1], "m8[s]"), r"astype\(numpy.int64\)"),
    "longdouble": (lambda: np.zeros(2, np.longdouble), r"astype\(numpy.float64\)"),
    "int4": (lambda: np.zeros(2, ml_dtypes.int4), "int4.*jnp.int8"),
    "float0": (lambda: np.zeros(2, jax.dtypes.float0), "integer input"),
    "masked": (lambda: np.ma.masked_array([1.0, 2.0], [True, False]), r"MaskedArray.*filled"),
    "matrix": (lambda: np.ones((2, 2)).view(type("Mine", (np.ndarray,), {})), r"Mine.*np.asarray\(it\)"),
    "a date alone": (lambda: np.datetime64("2020-01-01"), "Every leaf must be"),
    "a record alone": (lambda: np.zeros(2, [("a", "f4")])[0], "Every leaf must be"),
    "a decimal": (lambda: decimal.Decimal(1), "Every leaf must be"),
    "an enum": (lambda: enum.Enum("E", "A").A, "Every leaf must be"),
    "a function": (lambda: len, r"Every leaf must be.*equinox\.partition\(tree, equinox\.is_array\)"),
}


@both
@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_an_array_that_cannot_cross_raises_with_the_leaf_and_the_fix(convert, make, words, copy):
    with pytest.raises((DtypeError, UnsupportedLeafError), match=rf"(?s)'info\.k' with (JAX|torch).*{words}"):
        convert({"info": {"k": make()}, "fine": 1}, copy=copy)


def test_device_applies_to_arrays():
    array = aligned(4)
    assert to_jax(array, device="cpu").devices() == {jax.devices("cpu")[0]}
    assert to_torch(array, device="cpu").device == torch.device("cpu")


def test_residuals_of_an_array_are_not_the_callers_memory():
    f = as_torch_function(lambda x, a: x * a.astype(jnp.float32))
    for dtype in (np.float32, ml_dtypes.bfloat16, ">f4"):
        array = np.full(64, 3).astype(dtype)
        x = torch.ones(64, requires_grad=True)
        y = f(x, array)
        array[:] = 7
        y.sum().backward()
        assert x.grad.tolist() == [3.0] * 64
