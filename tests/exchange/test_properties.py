"""The exchange contract for generated tensors: values, memory, layout and refusals.

One example is a view (shape, strides, dtype, conj and neg bits, bytes); it is crossed at every alignment, for
every `copy` and with x64 on and off. One such crossing, there and back, is a case. What must come out is
worked out from the raw bytes with numpy and integer arithmetic, never with torch, JAX or the library.
"""

import ctypes
import itertools
import math

import hypothesis
import jax
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from torchjax_bridge.errors import DtypeError, NarrowingError, ShareError
from torchjax_bridge.exchange import to_jax, to_torch
from torchjax_bridge.exchange._dtypes import TORCH_TO_JAX

DTYPES = sorted(TORCH_TO_JAX, key=str)
ALIGNMENTS = (0, 4, 8, 16, 32)
COPIES = (None, False, True)
EXAMPLES = 700  # of 30 cases each; 21,000 cases on each path
DEEP_EXAMPLES = 17_000  # 510,000 cases on each path

# How a view's bytes are drawn for the dtypes that may be narrowed: all values fit in 32 bits, some lie at
# the edges, or all 64 bits are random.
INTEGERS = ("fit", "edge", "any")
EDGES = (2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), -1, 0)


@st.composite
def views(draw):
    """(dtype, shape, strides in elements, conj, neg, kind of integers, seed)."""
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["gap-free", "gap-free", "gaps", "expanded", "channels-last", "wild"]))
    if draw(st.integers(0, 49)) == 0:
        kind = "large"
        shape = draw(st.sampled_from([(100_003,), (257, 129), (33, 1, 65, 17)]))
    elif kind == "channels-last":
        shape = tuple(draw(st.lists(st.integers(0, 5), min_size=4, max_size=5)))
    else:
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=5)))
    rank = len(shape)

    if kind == "channels-last":
        order = [1, *range(rank - 1, 1, -1), 0]  # fastest axis first
    else:
        order = (
            draw(st.permutations(range(rank - 1, -1, -1))) if draw(st.booleans()) else range(rank - 1, -1, -1)
        )
    strides, step = [0] * rank, 1
    for axis in order:
        if kind == "gaps":
            step *= draw(st.integers(1, 3))
        strides[axis] = step
        step *= max(shape[axis], 1)
    for axis, size in enumerate(shape):
        if kind == "expanded" and draw(st.booleans()):
            strides[axis] = 0
        if size == 1 and draw(st.booleans()):
            strides[axis] = draw(st.integers(0, 99))
        if kind == "wild":
            strides[axis] = draw(st.integers(0, 20))

    conj = dtype.is_complex and draw(st.booleans())
    neg = (dtype.is_complex or dtype in (torch.float32, torch.float64)) and draw(st.integers(0, 3)) == 0
    integers = draw(st.sampled_from(INTEGERS))
    return dtype, shape, tuple(strides), conj, neg, integers, draw(st.integers(0, 2**32 - 1))


def element_offsets(shape, strides):
    """The offset in elements of every element, in row-major order."""
    offsets = np.zeros(shape, np.int64)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        along = [1] * len(shape)
        along[axis] = size
        offsets += (np.arange(size) * stride).reshape(along)
    return offsets.reshape(-1)


def some_bytes(dtype, count, integers, seed):
    """`count` elements of `dtype`, as bytes."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(rng.bytes(count * dtype.itemsize), np.uint8).copy()
    if dtype is torch.bool:
        return data & 1
    if dtype in (torch.int64, torch.uint64) and integers != "any":
        words = data.view(np.int64)
        words[:] = rng.integers(0, 2**31, count) - (2**30 if dtype is torch.int64 else 0)
        if integers == "edge" and count:
            edges = np.array(EDGES, np.int64)
            words[rng.integers(0, count, 1)] = edges[rng.integers(0, len(EDGES), 1)]
    return data


def without_nans(data, dtype):
    """Where torch itself negates, as for conj and neg views, the sign of a NaN is anyone's guess."""
    part = dtype.itemsize // (2 if dtype.is_complex else 1)
    floats = data.view({4: np.float32, 8: np.float64}[part])
    floats[np.isnan(floats)] = -0.0


def with_sign_bits(data, dtype, conj, neg):
    """The bytes of what conj and neg views mean: signs flipped, every other bit as it was."""
    if not (conj or neg):
        return data
    part = dtype.itemsize // (2 if dtype.is_complex else 1)
    words = data.copy().view({4: np.uint32, 8: np.uint64}[part])
    sign = words.dtype.type(1 << (8 * part - 1))
    if neg:
        words ^= sign
    if conj:
        words[1::2] ^= sign
    return words.view(np.uint8)


class View:
    """The drawn view on a raw buffer that can be shifted to any alignment, and what must come of it."""

    def __init__(self, drawn):
        self.dtype, self.shape, self.strides, self.conj, self.neg, integers, seed = drawn
        offsets = element_offsets(self.shape, self.strides)
        self.size = self.dtype.itemsize
        self.span = int(offsets.max()) + 1 if offsets.size else 0
        self.base = some_bytes(self.dtype, self.span, integers, seed)
        if self.conj or self.neg:
            without_nans(self.base, self.dtype)
        picked = self.base.reshape(-1, self.size)[offsets].reshape(-1) if offsets.size else self.base[:0]
        self.expected = with_sign_bits(picked, self.dtype, self.conj, self.neg).tobytes()
        self.empty = offsets.size == 0
        self.gap_free = self.span == offsets.size and (self.empty or np.bincount(offsets).max() == 1)
        self.wide = self.dtype.itemsize // (2 if self.dtype.is_complex else 1) == 8
        self.raw = np.empty(self.span * self.size + 128, np.uint8)
        self.home = -self.raw.ctypes.data % 64

    def at(self, offset):
        """The tensor, with its first element `offset` bytes past a multiple of 64; and its raw bytes."""
        start = self.home + offset
        memory = self.raw[start : start + self.span * self.size]
        memory[:] = self.base
        if self.span:
            flat = torch.frombuffer(self.raw, dtype=self.dtype, count=self.span, offset=start)
        else:
            flat = torch.empty(0, dtype=self.dtype)
        tensor = torch.as_strided(flat, self.shape, self.strides)
        if self.conj:
            tensor = tensor.conj()
        if self.neg:
            tensor = torch._neg_view(tensor)
        return tensor, memory

    def values(self):
        return np.frombuffer(self.expected, np.int64 if self.dtype is torch.int64 else np.uint64)

    def narrowed(self):
        """The bytes in 32 bits, or None where a value does not fit."""
        low, high = (-(2**31), 2**31 - 1) if self.dtype is torch.int64 else (0, 2**32 - 1)
        values = self.values()
        if values.size and not low <= int(values.min()) <= int(values.max()) <= high:
            return None
        return values.astype(np.int32 if self.dtype is torch.int64 else np.uint32).tobytes()

    def shareable(self, offset):
        resolved = not (self.conj or self.neg)
        return resolved and (self.empty or (self.gap_free and offset % 64 == 0))


def row_major(shape):
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def bytes_of(array):
    return np.asarray(array).tobytes()


def tensor_bytes(tensor):
    """The bytes of a gap-free tensor's elements in row-major order, read from its memory."""
    if not tensor.numel():
        return b""
    memory = (ctypes.c_uint8 * (tensor.numel() * tensor.dtype.itemsize)).from_address(tensor.data_ptr())
    if tensor.stride() == row_major(tensor.shape):
        return bytes(memory)
    words = np.frombuffer(memory, np.dtype((np.void, tensor.dtype.itemsize)))
    return words[element_offsets(tensor.shape, tensor.stride())].tobytes()


def cross(view, offset, copy, x64):
    """One case: the crossing and, where it succeeds, the way back."""
    tensor, memory = view.at(offset)
    expected, dtype = view.expected, view.dtype

    if view.wide and not x64:
        if dtype in (torch.float64, torch.complex128):
            with pytest.raises(DtypeError, match="needs x64"):
                to_jax(tensor, copy=copy)
            return
        if copy is False:
            with pytest.raises(ShareError):
                to_jax(tensor, copy=copy)
            return
        expected = view.narrowed()
        if expected is None:
            with pytest.raises(NarrowingError, match="cannot hold"):
                to_jax(tensor, copy=copy)
            return
        dtype = {torch.int64: torch.int32, torch.uint64: torch.uint32}[dtype]
        shares = False
    else:
        shares = copy is not True and view.shareable(offset)
        if copy is False and not shares:
            with pytest.raises(ShareError, match="copy=False"):
                to_jax(tensor, copy=copy)
            return

    array = to_jax(tensor, copy=copy)
    witness = to_jax(tensor, copy=copy) if shares else None  # JAX keeps what np.asarray read of `array`
    assert array.shape == view.shape
    assert array.dtype == TORCH_TO_JAX[dtype]
    assert bytes_of(array) == expected
    back = to_torch(array, copy=copy)
    assert back.dtype is dtype
    assert back.shape == view.shape

    if view.empty:
        return
    # memory: by pointer, and by writing to the source and looking
    assert (array.unsafe_buffer_pointer() == tensor.data_ptr()) == shares
    assert (back.data_ptr() == array.unsafe_buffer_pointer()) == (copy is not True)
    if not shares:
        assert array.format.layout.major_to_minor == tuple(range(len(view.shape)))
        assert back.stride() == row_major(view.shape)
    np.bitwise_xor(memory, 1, out=memory)
    if shares:
        flipped = np.frombuffer(expected, np.uint8) ^ 1
        assert bytes_of(witness) == flipped.tobytes()
    else:
        assert bytes_of(array) == expected
    assert tensor_bytes(back) == (flipped.tobytes() if shares and copy is not True else bytes_of(array))
    if copy is True:
        back.zero_()
        assert bytes_of(array) == expected


@pytest.mark.parametrize("dlpack_path", ["fast", "public"], indirect=True)
def test_every_generated_view_keeps_the_contract(dlpack_path, record_property):
    cases = 0
    deep = hypothesis.settings.default.max_examples >= DEEP_EXAMPLES

    @hypothesis.settings(max_examples=DEEP_EXAMPLES if deep else EXAMPLES, deadline=None)
    @hypothesis.given(views())
    def run(drawn):
        nonlocal cases
        view = View(drawn)
        for x64 in (False, True):
            with jax.enable_x64(x64):
                for offset, copy in itertools.product(ALIGNMENTS, COPIES):
                    cross(view, offset, copy, x64)
                    cases += 1

    run()
    record_property("cases", cases)
    assert cases >= 30 * (DEEP_EXAMPLES if deep else EXAMPLES)
