"""A row-major copy of a permuted tensor has the same bits, in slabs or not."""

import itertools
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from torchjax_bridge.weights.moving import _relayout
from torchjax_bridge.weights.moving._relayout import copy_into

DTYPES = (
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.bool,
    torch.float64,
    torch.complex64,
)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is copied in slabs, of a few rows each."""
    monkeypatch.setattr(_relayout, "_SMALL_BYTES", 64)
    monkeypatch.setattr(_relayout, "_LARGE_BYTES", 0)
    monkeypatch.setattr(_relayout, "_SLAB_BYTES", 1 << 11)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """With one thread, every tensor would be left to ``copy_``."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all, signalling NaNs included."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape)) * size
    top = 2 if dtype is torch.bool else 256
    raw = np.random.default_rng(seed).integers(0, top, count).astype(np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check(source: torch.Tensor) -> None:
    target = torch.empty(source.shape, dtype=source.dtype)
    assert copy_into(target, source) is target
    assert _bytes(target) == _bytes(source)


@pytest.mark.usefixtures("small_slabs")
@hypothesis.settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_every_order_of_axes_of_every_dtype_is_copied_to_the_bit(data: st.DataObject) -> None:
    lengths = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 64])
    shape = tuple(data.draw(st.lists(lengths, min_size=1, max_size=5)))
    hypothesis.assume(np.prod(shape) <= 100_000)
    dtype = data.draw(st.sampled_from(DTYPES))
    axes = data.draw(st.permutations(range(len(shape))))
    _check(_random_bits(shape, dtype, len(shape)).permute(axes))


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("axes", list(itertools.permutations(range(4))), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_order_of_axes_of_a_kernel_is_copied_to_the_bit(
    axes: tuple[int, ...], dtype: torch.dtype
) -> None:
    _check(_random_bits((40, 24, 3, 5), dtype, 0).permute(axes))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((700, 1100), (1, 0)),
        ((1024, 512), (1, 0)),
        ((256, 128, 3, 3), (2, 3, 1, 0)),
        ((3, 3, 384, 512), (3, 2, 0, 1)),
        ((512, 300, 3, 3), (2, 3, 0, 1)),
        ((1024, 512, 1, 1), (2, 3, 1, 0)),
        ((16, 60_000), (1, 0)),
        ((60_000, 16), (1, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slabs_of_full_size(shape: tuple[int, ...], axes: tuple[int, ...], dtype: torch.dtype) -> None:
    _check(_random_bits(shape, dtype, 1).permute(axes))


@pytest.mark.usefixtures("small_slabs")
def test_a_view_that_is_not_a_permuted_block_is_copied_too() -> None:
    block = torch.arange(64 * 96, dtype=torch.float32).reshape(64, 96)
    _check(block[:, ::2].t())
    _check(block[::3].t())
    _check(block[:, 5:71].t())
    _check(block[:1].expand(50, 96).t())
    _check(block[3:40].t())
    _check(torch.empty(0, 40).t())


def test_slabs_are_used_only_if_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    transposed = _relayout._transposed

    def record(block: torch.Tensor, count: int, rows: int, columns: int) -> torch.Tensor:
        used.append(count * rows * columns)
        return transposed(block, count, rows, columns)

    monkeypatch.setattr(_relayout, "_transposed", record)
    _check(torch.rand(1024, 1030).t())
    assert sum(used) == 1024 * 1030
    used.clear()
    torch.set_num_threads(1)
    _check(torch.rand(1024, 1030).t())
    torch.set_num_threads(2)
    _check(torch.rand(64, 64).t())
    _check(torch.rand(1024, 1024))
    _check(torch.rand(64, 64, 3, 3).permute(2, 3, 1, 0))
    assert not used


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_view_with_the_negative_bit_is_copied_by_its_values(dtype: torch.dtype) -> None:
    values = torch.randn(48, 64).to(dtype)
    target = copy_into(torch.empty(64, 48, dtype=dtype), torch._neg_view(values).t())
    assert torch.equal(target, -values.t())
