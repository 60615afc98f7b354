"""CUDA: shared memory, order kept on streams, memory kept until it is read, and a host that never waits.

These need a CUDA device that torch and JAX both see, and skip elsewhere.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import torch

from benchmarks._rehearsal import rehearsing
from torchjax_bridge.errors import ShareError
from torchjax_bridge.exchange import cuda_choice, jax_device, to_jax, to_torch
from torchjax_bridge.exchange._dtypes import TORCH_TO_JAX

pytestmark = pytest.mark.gpu

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")


# Of matrices that keep a GPU busy for tens of milliseconds; where the CPU stands in, nothing is to be slow.
WIDTH = 64 if rehearsing() else 4096


def long_kernels(turns=40):
    """Queue tens of milliseconds of work on torch's current stream; gives a scalar 1.0 that depends on it."""
    x = torch.full((WIDTH, WIDTH), 1.0 / WIDTH, device="cuda")
    y = torch.ones(WIDTH, WIDTH, device="cuda")
    for _ in range(turns):
        y = y @ x
    return y[0, 0]


@jax.jit
def long_computation(x):
    mean = jnp.full((WIDTH, WIDTH), 1.0 / WIDTH)
    y = jax.lax.fori_loop(0, 40, lambda _, y: y @ mean, jnp.ones((WIDTH, WIDTH)))
    return x * y[0, 0]


@pytest.mark.parametrize("dtype", TORCH_TO_JAX, ids=str)
def test_every_dtype_is_shared_on_the_device(x64_on, dtype):
    tensor = torch.randint(0, 2, (64,)).to(dtype).cuda()
    array = to_jax(tensor, copy=False)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array.devices() == {jax_device(tensor.device)}
    assert next(iter(array.devices())).platform == "gpu"
    back = to_torch(array, copy=False)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.device == tensor.device
    assert back.dtype is dtype
    assert torch.equal(back.cpu().view(torch.uint8), tensor.cpu().view(torch.uint8))


def test_channels_last_is_shared_with_its_layout():
    tensor = torch.randn(2, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    array = to_jax(tensor, copy=False)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert torch.equal(torch.from_numpy(jax.device_get(array).copy()), tensor.cpu())
    row_major = to_jax(tensor, copy=True)
    assert row_major.format.layout.major_to_minor == (0, 1, 2, 3)


def test_a_kernel_still_running_on_a_side_stream_is_waited_for_by_jax():
    side = torch.cuda.Stream()
    tensor = torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        tensor += long_kernels()
        done = side.record_event()
        array = to_jax(tensor)
        running = not done.query()
    assert running, "the kernels were over before the crossing: the test shows nothing"
    assert float(jnp.sum(array)) == pytest.approx(1000.0, rel=1e-3)


def test_a_copy_behind_a_running_kernel_holds_the_final_values():
    side = torch.cuda.Stream()
    tensor = torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        tensor += long_kernels()
        array = to_jax(tensor, copy=True)
    assert float(jnp.sum(array)) == pytest.approx(1000.0, rel=1e-3)


@pytest.mark.parametrize("stream", ["default", "side"])
def test_a_jax_computation_still_running_is_waited_for_by_torch(stream):
    x = jnp.ones(1000)
    long_computation(x).block_until_ready()
    chosen = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    with torch.cuda.stream(chosen):
        tensor = to_torch(long_computation(x))
        total = tensor.sum()
    chosen.synchronize()
    assert total.item() == pytest.approx(1000.0, rel=1e-3)


def test_the_host_returns_while_the_producer_still_works():
    x = jnp.ones(1000)
    long_computation(x).block_until_ready()
    array = long_computation(x)
    to_torch(array)
    assert not array.is_ready(), "the export waited, or the computation was too short to tell"
    array.block_until_ready()


def test_the_profiler_sees_no_host_synchronisation():
    tensor, array = torch.ones(1000, device="cuda"), jnp.ones(1000)
    for _ in range(3):
        to_torch(to_jax(tensor))
        to_torch(array)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        long_kernels(turns=2)
        crossed = to_jax(tensor)
        back = to_torch(crossed), to_torch(array)
        long_kernels(turns=2)
    assert back[0].data_ptr() == tensor.data_ptr()
    calls = {event.key for event in profile.key_averages()}
    assert any("Launch" in call for call in calls), "the profiler saw no CUDA calls at all"
    # The profiler itself synchronises the device once when it stops.
    assert calls & set(WAITS) <= {"cudaDeviceSynchronize"}


def test_pinned_memory_is_shared_as_host_memory():
    tensor = torch.arange(1024.0).pin_memory()
    array = to_jax(tensor, copy=False)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert next(iter(array.devices())).platform == "cpu"
    assert array.tolist() == tensor.tolist()


def test_an_array_in_pinned_host_memory_is_copied_to_its_device():
    device = jax.devices("gpu")[0]
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    array = jax.device_put(jnp.arange(1024.0), sharding)
    tensor = to_torch(array)
    assert tensor.is_cuda
    assert tensor.cpu().tolist() == to_torch(array, device="cpu").tolist() == list(range(1024))
    with pytest.raises(ShareError, match="pinned_host"):
        to_torch(array, copy=False)


def test_the_fast_path_passed_its_trial_on_the_device(dlpack_path):
    found = cuda_choice()
    assert found is not None
    assert found.path == dlpack_path, found.reason


# --- lifetimes: a long kernel, a dropped reference, memory that is filled anew -----------------------------

SIZE = 1 << 22


@pytest.mark.parametrize("stream", ["default", "side"])
def test_a_dropped_tensor_is_not_reused_before_jax_has_read_it(stream):
    late = jax.jit(lambda spin, x: x + 0 * spin)
    late(long_computation(jnp.ones(SIZE)), to_jax(torch.ones(SIZE, device="cuda"))).block_until_ready()
    chosen = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(chosen):
        tensor = torch.full((SIZE,), 7.0, device="cuda")
        address = tensor.data_ptr()
        spin = long_computation(jnp.ones(SIZE))
        array = to_jax(tensor, copy=False)
        result = late(spin, array)
        assert not result.is_ready(), "JAX was done before the tensor was dropped: the test shows nothing"
        del tensor, array
        refilled = [torch.full((SIZE,), -1.0, device="cuda") for _ in range(4)]
    assert float(result.min()) == float(result.max()) == 7.0
    assert address not in {one.data_ptr() for one in refilled}
    torch.cuda.synchronize()
    torch.ones(SIZE, device="cuda")  # the allocator looks at its events, and has the block again


@pytest.mark.parametrize("stream", ["default", "side"])
def test_a_dropped_array_is_not_reused_before_torch_has_read_it(stream):
    fill = jax.jit(lambda value: jnp.full(SIZE, value))
    fill(0.0).block_until_ready()
    chosen = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    with torch.cuda.stream(chosen):
        long_kernels(turns=1)
        torch.cuda.synchronize()
        array = fill(7.0)
        tensor = to_torch(array, copy=False)
        spin = long_kernels()
        result = tensor + 0 * spin
        done = chosen.record_event()
        del tensor, array
        refilled = [fill(-1.0) for _ in range(4)]
        refilled[-1].block_until_ready()
        assert not done.query(), "torch was done before the memory was filled anew: the test shows nothing"
    chosen.synchronize()
    assert result.min().item() == result.max().item() == 7.0


def test_what_was_held_goes_back_to_jax_at_a_later_crossing():
    device = jax.devices("gpu")[0]
    if device.memory_stats() is None:
        pytest.skip("JAX does not count its memory here")
    array = jnp.full(SIZE, 1.0).block_until_ready()
    before = device.memory_stats()["bytes_in_use"]
    tensor = to_torch(array)
    del array, tensor
    torch.cuda.synchronize()
    to_torch(jnp.ones(1))
    assert device.memory_stats()["bytes_in_use"] < before


def test_a_process_ends_well_while_memory_is_shared():
    lines = (
        "import torch, jax.numpy as jnp",
        "from torchjax_bridge import to_jax, to_torch",
        "read = torch.ones(9, device='cuda')",
        "to_jax(read).block_until_ready()",  # torch frees it after XLA's stream is gone
        "lent = torch.ones(9, device='cuda')",
        "shared, taken = to_jax(lent), to_torch(jnp.ones(9))",
        "back = to_torch(shared)",
        "to_torch(jnp.zeros(9))",
    )
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_device_moves_between_host_and_device_both_ways():
    host = torch.arange(64.0)
    array = to_jax(host, device="cuda")
    assert next(iter(array.devices())).platform == "gpu"
    assert array.tolist() == host.tolist()
    assert to_torch(array, device="cpu").tolist() == host.tolist()
    assert to_jax(host.cuda(), device="cpu").tolist() == host.tolist()
    assert to_torch(jnp.arange(64.0), device="cuda").device.type == "cuda"
    with pytest.raises(ShareError, match="was asked for"):
        to_jax(host, device="cuda", copy=False)
    with pytest.raises(ShareError, match="was asked for"):
        to_torch(array, device="cpu", copy=False)


def test_a_tensor_on_another_device_than_the_current_one_crosses():
    if torch.cuda.device_count() < 2 or len(jax.devices("gpu")) < 2:
        pytest.skip("one CUDA device only")
    tensor = torch.arange(64.0, device="cuda:1")
    with torch.cuda.device(0):
        array = to_jax(tensor, copy=False)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_torch(array, copy=False).device == tensor.device


def test_unaligned_gapped_and_conjugate_tensors_are_copied_on_the_device():
    base = torch.arange(128.0, device="cuda")
    for tensor in (base[1:], base[::2], torch.complex(base, base).conj(), base[:1].expand(8)):
        array = to_jax(tensor)
        assert next(iter(array.devices())).platform == "gpu"
        assert array.tolist() == tensor.tolist()
