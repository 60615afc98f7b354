"""Crossings from many threads at once."""

import gc
import threading

import jax
import numpy as np
import pytest
import torch

from torchjax_bridge.errors import NarrowingError
from torchjax_bridge.exchange import to_jax, to_torch

ROUNDS = 150


@pytest.fixture
def _only_new_garbage():
    """A collection looks at what the test makes, and not at all that the tests before it left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_only_new_garbage")
def test_eight_threads_cross_while_one_collects_garbage():
    stop, failures = threading.Event(), []
    start = threading.Barrier(9)

    def cross(number):
        # Half of the threads keep x64 on, which is a setting of the thread.
        wide = bool(number % 2)
        rng = np.random.default_rng(number)
        start.wait()
        with jax.enable_x64(wide):
            for turn in range(ROUNDS):
                tensor = torch.full((int(rng.integers(1, 300)),), number * 1000 + turn)
                array = to_jax(tensor)
                assert array.dtype == (np.int64 if wide else np.int32)
                back = to_torch({"a": [array]})["a"][0]
                shared = back.data_ptr() == tensor.data_ptr()
                assert shared == (wide and tensor.data_ptr() % 64 == 0)
                del array
                other = to_jax(torch.full((16,), float(turn)), copy=True)
                assert back.tolist() == tensor.tolist()
                assert other.tolist() == [float(turn)] * 16
                try:
                    to_jax(torch.tensor([2**40 + turn]))
                except NarrowingError:
                    assert not wide
                else:
                    assert wide

    def guarded(number):
        try:
            cross(number)
        except BaseException as err:
            failures.append(err)

    def collect():
        start.wait()
        while not stop.is_set():
            gc.collect()

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(8)]
    collector = threading.Thread(target=collect)
    for thread in (*threads, collector):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    collector.join()
    assert failures == []


def test_a_tensor_made_in_one_thread_is_freed_in_another():
    arrays = [to_jax(torch.full((1000,), float(i))) for i in range(50)]
    tensors = [to_torch(array) for array in arrays]
    seen = []

    def use_and_drop():
        while tensors:
            seen.append(tensors.pop()[0].item())
        arrays.clear()
        gc.collect()

    thread = threading.Thread(target=use_and_drop)
    thread.start()
    thread.join()
    assert sorted(seen) == [float(i) for i in range(50)]
