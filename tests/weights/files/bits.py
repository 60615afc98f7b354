"""Comparing tensors by their bits, and small trees of every dtype, for the tests of files."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch

DTYPES = (
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64,
)  # fmt: skip


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bit pattern, NaN payloads included; booleans are 0 or 1."""
    count = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    top = 2 if dtype is torch.bool else 256
    raw = np.random.default_rng(seed).integers(0, top, count, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def bits(value: object) -> tuple[object, tuple[int, ...], bytes]:
    """What makes a tensor or array what it is."""
    if isinstance(value, jax.Array | np.ndarray):
        array = np.ascontiguousarray(value)
        return str(array.dtype), array.shape, array.tobytes()
    tensor = value.detach().resolve_conj().contiguous()
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(one: Mapping[str, object], other: Mapping[str, object]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert bits(one[name]) == bits(other[name]), name


def torch_state() -> dict[str, torch.Tensor]:
    """Every dtype, and every shape that files get wrong."""
    state = {f"d.{n}": random_bits(dtype, (3, 5), n) for n, dtype in enumerate(DTYPES)}
    state |= {
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0),
        "hollow": torch.zeros(3, 0, 2),
        "transposed": torch.randn(64, 48).t(),
        "strided": torch.randn(10, 10)[::2, ::3],
        "ünï/code": torch.ones(1),
    }
    state["conjugate"] = torch.randn(4, dtype=torch.complex64).conj()
    return state


def flax_tree() -> dict[str, object]:
    """linen variables with names that a flat file must not confuse."""
    return {
        "params": {
            "Dense_0": {"kernel": jnp.arange(64.0).reshape(4, 16), "bias": jnp.ones(3, jnp.bfloat16)},
            "layers": {0: {"scale": jnp.zeros(2)}, 1: {"scale": jnp.ones(2)}},
        },
        "batch_stats": {"0": {"mean": jnp.full(2, jnp.nan)}, "x.y": jnp.ones(16, jnp.int32)},
    }
