import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from torchjax_bridge.errors import DtypeError
from torchjax_bridge.exchange import jax_dtype, to_jax, to_torch, torch_dtype
from torchjax_bridge.exchange._dtypes import JAX_TO_TORCH, NEEDS_X64, TORCH_TO_JAX

EVERY_TORCH_DTYPE = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
EVERY_JAX_ONLY_DTYPE = [
    np.dtype(getattr(ml_dtypes, name))
    for name in [
        "int2",
        "uint2",
        "int4",
        "uint4",
        "float4_e2m1fn",
        "float8_e3m4",
        "float8_e4m3",
        "float8_e4m3b11fnuz",
    ]
]
PAIRS = list(TORCH_TO_JAX.items())


@pytest.fixture(autouse=True)
def dlpack_path():
    """The table is the same on both paths."""


@pytest.mark.parametrize(("of_torch", "of_jax"), PAIRS, ids=str)
def test_the_two_halves_of_the_table_are_inverse(of_torch, of_jax):
    assert jax_dtype(of_torch) == of_jax
    assert torch_dtype(of_jax) is of_torch
    assert JAX_TO_TORCH[TORCH_TO_JAX[of_torch]] is of_torch


@pytest.mark.parametrize(("of_torch", "of_jax"), PAIRS, ids=str)
def test_paired_dtypes_have_one_width_and_one_name(of_torch, of_jax):
    assert of_torch.itemsize == of_jax.itemsize
    assert str(of_torch) == f"torch.{of_jax.name}"


@pytest.mark.parametrize("dtype", EVERY_TORCH_DTYPE, ids=str)
def test_every_torch_dtype_has_a_counterpart_or_an_error_with_advice(dtype):
    if dtype in TORCH_TO_JAX:
        assert isinstance(jax_dtype(dtype), np.dtype)
    else:
        with pytest.raises(DtypeError, match=r"JAX has no dtype for torch\.\w+\. (Call|Cast|It packs)"):
            jax_dtype(dtype)


@pytest.mark.parametrize("dtype", EVERY_JAX_ONLY_DTYPE, ids=str)
def test_a_dtype_that_only_jax_has_raises_and_advises_a_cast(dtype):
    with pytest.raises(DtypeError, match=rf"torch has no dtype for {dtype}. Cast it to jnp\.\w+"):
        torch_dtype(dtype)


def test_the_error_for_a_prng_key_dtype_advises_key_data():
    with pytest.raises(DtypeError, match=r"jax\.random\.key_data"):
        torch_dtype(jax.random.key(0).dtype)


def test_the_64_bit_dtypes_are_those_that_need_x64():
    wide = {
        dtype
        for dtype, of_jax in TORCH_TO_JAX.items()
        if dtype.itemsize > (8 if dtype.is_complex else 4) and of_jax.kind in "iufc"
    }
    assert set(NEEDS_X64) == wide
    for dtype, narrow in NEEDS_X64.items():
        with jax.enable_x64(False):
            stays = jax.dtypes.canonicalize_dtype(TORCH_TO_JAX[dtype])
        if narrow is not None:
            assert TORCH_TO_JAX[narrow] == stays


@pytest.mark.parametrize("alias", [jnp.float32, np.float32, "float32", np.dtype("float32"), torch.float32])
def test_every_spelling_of_a_dtype_is_understood(alias):
    assert torch_dtype(alias) is torch.float32
    assert jax_dtype(alias) == np.dtype("float32")


@pytest.mark.parametrize("junk", ["no such dtype", object(), b"x", 3])
def test_what_is_no_dtype_raises_a_dtype_error(junk):
    with pytest.raises(DtypeError, match="is not a dtype"):
        torch_dtype(junk)
    with pytest.raises(DtypeError, match="is not a dtype"):
        jax_dtype(junk)


def test_a_dtype_that_crosses_is_the_dtype_of_the_crossed_tensor(x64_on):
    for of_torch, of_jax in PAIRS:
        array = to_jax(torch.zeros(16, dtype=of_torch))
        assert array.dtype == of_jax
        assert to_torch(array).dtype is of_torch


def test_an_np_dtype_without_counterpart_raises_in_both_directions():
    for name in ("U3", "O", "datetime64[s]"):
        with pytest.raises(DtypeError):
            torch_dtype(np.dtype(name))
        with pytest.raises(DtypeError):
            jax_dtype(np.dtype(name))


def test_none_is_no_dtype():
    # numpy reads None as float64.
    for function in (torch_dtype, jax_dtype):
        with pytest.raises(DtypeError, match="None"):
            function(None)


@pytest.mark.parametrize("text", ["fl,32", "float32,(", "(2,", "i4,,", ",", "no such"])
def test_a_string_that_is_no_dtype_raises_a_dtype_error(text: str) -> None:
    for read in (jax_dtype, torch_dtype):
        with pytest.raises(DtypeError):
            read(text)
