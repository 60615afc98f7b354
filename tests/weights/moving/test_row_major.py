"""A row-major copy has the same bits, whatever made it, and memory of its own."""

import itertools

import hypothesis
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import strategies as st
from torch import nn

from torchjax_bridge import to_flax, to_state_dict
from torchjax_bridge.weights.moving import _xla_copy
from torchjax_bridge.weights.moving._row_major import row_major_copies

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def _random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits at all, signalling NaNs included."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, count).astype(np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check(sources: list[torch.Tensor]) -> None:
    for copy, source in zip(row_major_copies(sources), sources, strict=True):
        assert (copy.dtype, copy.shape) == (source.dtype, source.shape)
        assert copy.is_contiguous()
        assert _bytes(copy) == _bytes(source)
        assert copy.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


@hypothesis.settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data(), x64=st.booleans())
def test_every_dtype_and_order_of_axes_keeps_its_bits_whatever_x64_is(
    laid_out: list[torch.Size], data: st.DataObject, x64: bool
) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 8, 17, 32]), min_size=1, max_size=4)))
    axes = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from(DTYPES))
    with jax.enable_x64(x64):
        _check([_random_bits(shape, dtype, seed).permute(axes) for seed in range(2)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_xla_copies_large_strided_tensors(laid_out: list[torch.Size], dtype: torch.dtype) -> None:
    _check(
        [_random_bits((24, 40), dtype).t(), _random_bits((24, 40), dtype), _random_bits((9, 40), dtype).t()]
    )
    wide = dtype.itemsize > 8
    assert sorted(laid_out) == ([] if wide else [torch.Size([40, 9]), torch.Size([40, 24])])


def test_leaves_of_full_size_are_shared_among_threads() -> None:
    kernels = [
        _random_bits((512, 600), torch.float32).t(),
        _random_bits((1024, 512, 1, 1), torch.bfloat16).permute(2, 3, 1, 0),
        _random_bits((512, 256, 3, 3), torch.float32).permute(2, 3, 1, 0),
    ]
    assert all(map(_xla_copy.is_fastest_for, kernels))
    assert not _xla_copy.is_fastest_for(_random_bits((256, 256, 3, 3), torch.float32).permute(2, 3, 1, 0))
    assert not _xla_copy.is_fastest_for(_random_bits((64, 64), torch.float32).t())
    assert not _xla_copy.is_fastest_for(_random_bits((3, 3, 512, 512), torch.float32).permute(3, 2, 0, 1))
    _check(kernels)


def test_a_view_that_is_not_a_permuted_block_is_copied_too(laid_out: list[torch.Size]) -> None:
    block = _random_bits((64, 96), torch.float32)
    _check(
        [block[:, ::2].t(), block[::3].t(), block[:, 5:71].t(), block[:1].expand(50, 96).t(), block[3:40].t()]
    )
    assert laid_out


def test_a_neg_or_conj_bit_is_resolved(laid_out: list[torch.Size]) -> None:
    values = torch.randn(48, 64)
    pair = torch.complex(values, values.roll(1, 0))
    negative, conjugate, _ = row_major_copies([torch._neg_view(values).t(), pair.t().conj(), values.t()])
    assert torch.equal(negative, -values.t())
    assert torch.equal(conjugate, pair.t().conj().resolve_conj())
    assert not negative.is_neg()
    assert not conjugate.is_conj()


def test_a_trace_a_guard_and_a_default_device_of_jax_change_nothing(laid_out: list[torch.Size]) -> None:
    sources = [_random_bits((24, 40), torch.float32, n).t() for n in range(2)]

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        _check(sources)
        return x

    traced(jax.numpy.zeros(2))
    with jax.transfer_guard("disallow_explicit"), jax.default_device(jax.devices("cpu")[-1]):
        _check(sources)
    assert len(laid_out) == 4


def test_a_transfer_guard_of_the_configuration_does_not_forbid_the_copy(laid_out: list[torch.Size]) -> None:
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow_explicit")  # a setting that every thread sees
    try:
        _check([_random_bits((24, 40), torch.float32, n).t() for n in range(2)])
    finally:
        jax.config.update("jax_transfer_guard", before)
    assert len(laid_out) == 2


def test_xla_copies_with_one_thread_of_torch_too(laid_out: list[torch.Size]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _check([_random_bits((24, 40), torch.float32).t()])
    finally:
        torch.set_num_threads(before)
    assert laid_out == [torch.Size([40, 24])]


def test_torch_copies_if_jax_has_no_cpu(laid_out: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_xla_copy, "_cpu_device", lambda: None)
    _check([_random_bits((24, 40), torch.float32, n).t() for n in range(2)])
    assert not laid_out


def test_weights_copied_by_xla_survive_a_round_trip_and_share_no_memory(laid_out: list[torch.Size]) -> None:
    module = nn.Sequential(*(nn.Linear(20, 30) if n % 2 else nn.Linear(30, 20) for n in range(4)))
    before = {key: _bytes(value) for key, value in module.state_dict().items()}
    layers = [nnx.Linear(*((20, 30) if n % 2 else (30, 20)), rngs=nnx.Rngs(0)) for n in range(4)]
    twin = to_flax(module, nnx.Sequential(*layers))
    back = to_state_dict(twin, module)
    assert len(laid_out) == 8
    for parameter in module.parameters():
        parameter.detach().zero_()
    kernels = [np.array(layer.kernel[...]) for layer in twin.layers]
    assert {key: _bytes(value) for key, value in back.items()} == before
    for value in back.values():
        value.zero_()
    for layer, kernel in itertools.zip_longest(twin.layers, kernels):
        np.testing.assert_array_equal(np.asarray(layer.kernel[...]), kernel)
        assert kernel.any()


def test_the_terms_of_a_sum_do_not_share_memory_with_the_template() -> None:
    module = nn.LSTM(3, 4, batch_first=True)
    twin = to_flax(module, nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))))
    back = to_state_dict(twin, module)
    for key, value in module.state_dict().items():
        assert torch.equal(back[key], value), key
        assert back[key].data_ptr() != value.data_ptr(), key
