"""Memory that does not grow, and a cost that does not depend on the size."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch

from torchjax_bridge.exchange import to_jax, to_torch

STATM = Path("/proc/self/statm")
PAGE = 4096
MEGABYTE = 2**20

needs_proc = pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")


def resident():
    gc.collect()
    return int(STATM.read_text().split()[1]) * PAGE


def growth(turn, warm_up, turns):
    """Bytes by which the process grew over `turns` calls, after `warm_up` of them."""
    for _ in range(warm_up):
        turn()
    before = resident()
    for _ in range(turns):
        turn()
    return resident() - before


@needs_proc
@pytest.mark.slow
def test_a_million_crossings_do_not_grow_the_process(dlpack_path):
    tensor = torch.ones(64, 64)
    # Each turn is two crossings; the public path takes ten times as long, and gets a tenth.
    turns = 500_000 if dlpack_path == "fast" else 50_000
    assert growth(lambda: to_torch(to_jax(tensor)), 5_000, turns) < 4 * MEGABYTE


@needs_proc
def test_shared_crossings_leak_nothing():
    tensor, array = torch.ones(64, 64), jnp.ones((64, 64))
    assert growth(lambda: (to_jax(tensor), to_torch(array)), 500, 2_000) < 2 * MEGABYTE


@needs_proc
def test_copies_refusals_and_trees_leak_nothing():
    unaligned, graph = torch.ones(1025)[1:], torch.ones(3, requires_grad=True)

    def turn():
        to_jax({"a": unaligned, "b": [unaligned]})
        to_torch(to_jax(unaligned, copy=True), copy=True)
        with pytest.raises(TypeError):
            to_jax([graph, unaligned])

    assert growth(turn, 200, 500) < 4 * MEGABYTE


@needs_proc
def test_sharing_a_large_tensor_takes_no_memory():
    tensor = torch.ones(64 * MEGABYTE // 4)
    before = resident()
    array = to_jax(tensor)
    back = to_torch(array)
    assert resident() - before < 8 * MEGABYTE
    assert back.data_ptr() == tensor.data_ptr()


@needs_proc
def test_a_large_tensor_is_freed_with_its_last_reference():
    before = resident()
    array = to_jax(torch.ones(64 * MEGABYTE // 4))
    back = to_torch(array)
    assert resident() - before > 60 * MEGABYTE
    jax.block_until_ready(array)
    del array, back
    assert resident() - before < 8 * MEGABYTE
