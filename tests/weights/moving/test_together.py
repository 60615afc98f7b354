"""Many small tensors that are copied by one call keep their bits, whatever JAX is set to, and compile once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import numpy as np
import pytest
import torch

from torchjax_bridge.exchange import to_torch
from torchjax_bridge.weights.moving import Together

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32,
]  # fmt: skip


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bits, among them those of NaNs with payloads and of subnormal numbers."""
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def _some(dtype: torch.dtype = torch.float32, count: int = 40) -> dict[int, torch.Tensor]:
    return {place: _random((3, 5), dtype).t() for place in range(count)}


def _twice(tensors: dict[int, torch.Tensor], cast: torch.dtype | None = None) -> dict[int, jax.Array]:
    together = Together(tensors, cast)
    assert together.copy(tensors) == {}
    return together.copy(tensors)


@contextmanager
def _compiled() -> Iterator[list[str]]:
    found: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda name, _, **__: found.append(name) if "backend_compile" in name else None
    )
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_kept_in_memory_of_its_own(dtype: torch.dtype) -> None:
    base = _random((6, 8), dtype)
    views = [
        base,
        base.t(),
        base[::2, 1::3],
        base[0],
        base[0, 0],
        base[:0],
        base.view(2, 3, 8).permute(2, 0, 1),
    ]
    tensors = dict(enumerate(views * 20))
    expected = {place: _bits(tensor) for place, tensor in tensors.items()}
    copies = _twice(tensors)
    assert copies.keys() == tensors.keys()
    base.view(torch.uint8).zero_()
    for place, array in copies.items():
        assert array.shape == tensors[place].shape
        assert array.committed
        back = to_torch(array, copy=False)
        assert back.dtype is dtype
        assert _bits(back) == expected[place]
        assert not array.size or array.unsafe_buffer_pointer() != tensors[place].data_ptr()


def test_floating_point_values_are_cast_as_torch_casts_them() -> None:
    tensors = _some() | {100: torch.arange(3, dtype=torch.int32), 101: torch.randn(2, dtype=torch.float64)}
    copies = _twice(tensors, torch.bfloat16)
    assert copies.keys() == tensors.keys()
    for place, array in copies.items():
        expected = tensors[place].bfloat16() if tensors[place].is_floating_point() else tensors[place]
        assert _bits(to_torch(array)) == _bits(expected)


def test_what_is_large_or_may_need_care_is_left_to_others() -> None:
    others = {
        100: torch.zeros(1 << 13),
        101: torch.zeros(3, dtype=torch.int64),
        102: torch.zeros(3, dtype=torch.complex64),
    }
    assert _twice(_some() | others).keys() == _some().keys()
    assert _twice(_some(count=31)) == {}


def test_a_group_with_a_neg_bit_or_with_a_tensor_that_is_not_here_is_left_to_others() -> None:
    tensors = _some()
    negated = tensors | {7: torch.zeros(3, 5, dtype=torch.complex64).conj().imag.t()}
    together = Together(tensors, None)
    together.copy(tensors)
    assert negated[7].is_neg()
    assert together.copy(negated) == {}
    assert together.copy({place: tensors[place] for place in range(39)}) == {}
    assert together.copy(tensors).keys() == tensors.keys()


def test_programs_are_compiled_at_the_second_copy_and_shared_by_shapes() -> None:
    tensors = _some(count=130)
    together = Together(tensors, None)
    with _compiled() as found:
        together.copy(tensors)
        assert not found
        together.copy(tensors)
        assert len(found) <= 2  # one for 64 tensors, one for the rest
        del found[:]
        together.copy(tensors)
        together.copy({place: tensors[place] for place in range(64)})
        _twice(_some(count=130))
        assert not found


@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.transfer_guard("disallow"),
        lambda: jax.debug_nans(True),
        lambda: jax.debug_infs(True),
        lambda: jax.disable_jit(),
        lambda: jax.enable_x64(True),
        lambda: jax.default_device(jax.devices()[1]),
        lambda: jax.set_mesh(jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])),
    ],
    ids=["guard", "nans", "infs", "disable_jit", "x64", "default_device", "mesh"],
)
def test_settings_of_jax_change_nothing(setting: Any) -> None:
    shape = (2, len(str(setting)) + 3)  # a program of its own, so that it is compiled within
    tensors = {place: torch.full(shape, float("nan")) for place in range(40)}
    tensors[0][0] = float("inf")
    entered: AbstractContextManager[Any] = setting()
    with entered:
        copies = _twice(tensors)
        again = _twice(tensors)
    for arrays in (copies, again):
        assert arrays.keys() == tensors.keys()
        for place, array in arrays.items():
            assert array.devices() == {jax.devices("cpu")[0]}
            assert isinstance(array.sharding, jax.sharding.SingleDeviceSharding)
            assert np.array_equal(array, tensors[place], equal_nan=True)
