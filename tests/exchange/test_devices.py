import types

import jax
import pytest
import torch

from torchjax_bridge.errors import DeviceError
from torchjax_bridge.exchange import _devices, jax_device, torch_device


@pytest.fixture(autouse=True)
def dlpack_path():
    """The map is the same on both paths."""


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu"), "cpu:0", torch.device("cpu", 0)])
def test_the_cpu_is_the_first_host_device(name):
    assert jax_device(name) == jax.devices("cpu")[0]


@pytest.mark.parametrize("index", range(4))
def test_every_host_device_is_torchs_one_cpu(index):
    assert torch_device(jax.devices("cpu")[index]) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu", 0), torch.device("cpu")])
def test_the_torch_cpu_has_no_index(name):
    assert torch_device(name) == torch.device("cpu")


@pytest.mark.parametrize("index", range(4))
def test_cpu_with_an_index_is_that_host_device(index):
    assert jax_device(f"cpu:{index}") == jax.devices("cpu")[index]


def test_a_host_device_that_jax_does_not_have_raises():
    for index in (9, 128, 254):  # from 128 on, torch's own index is negative
        with pytest.raises(DeviceError, match=rf"'cpu:{index}'.*'jax_num_cpu_devices', {index + 1}"):
            jax_device(f"cpu:{index}")


def test_a_jax_device_is_returned_as_it_is():
    device = jax.devices("cpu")[2]
    assert jax_device(device) is device


@pytest.mark.parametrize("junk", ["gpu0", "no device", 3.5, None, b"cpu", ("cpu", 0)])
def test_what_is_no_device_raises(junk):
    for function in (jax_device, torch_device):
        with pytest.raises(DeviceError, match="is no device"):
            function(junk)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_a_device_that_shares_nothing_with_jax_raises_and_says_to_move(name):
    with pytest.raises(DeviceError, match=r"Move the tensor to the CPU first"):
        jax_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_on_a_machine_without_it_raises_and_lists_what_jax_sees():
    for name in ("cuda:0", "cuda"):
        with pytest.raises(DeviceError, match=r"TFRT_CPU_0|CpuDevice|cpu"):
            jax_device(name)


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_where_jax_has_no_backend_at_all_the_error_says_so(monkeypatch, error):
    def nothing(**_):
        raise error("JAX_PLATFORMS names what is not installed")

    monkeypatch.setattr(_devices.jax, "local_devices", nothing)
    with pytest.raises(DeviceError, match=r"sees no device at all.*JAX_PLATFORMS"):
        jax_device("cpu")


def test_cuda_devices_are_matched_by_their_hardware_number(monkeypatch):
    # local_hardware_id is what DLPack counts; ids are global over processes and may start elsewhere.
    gpus = [
        types.SimpleNamespace(id=9, local_hardware_id=1),
        types.SimpleNamespace(id=8, local_hardware_id=0),
    ]
    monkeypatch.setattr(_devices, "_jax_gpus", lambda: gpus)
    assert jax_device("cuda:0") is gpus[1]
    assert jax_device(torch.device("cuda", 1)) is gpus[0]
    with pytest.raises(DeviceError, match=r"cuda:2"):
        jax_device("cuda:2")


@pytest.mark.gpu
def test_every_cuda_device_maps_to_jax_and_back():
    for index in range(min(torch.cuda.device_count(), len(jax.devices("gpu")))):
        device = torch.device("cuda", index)
        assert torch_device(jax_device(device)) == device
        assert jax_device(torch_device(jax_device(device))) == jax_device(device)


@pytest.mark.gpu
def test_cuda_without_an_index_is_torchs_current_device():
    assert jax_device("cuda") == jax_device(torch.device("cuda", torch.cuda.current_device()))
    assert torch_device("cuda") == torch.device("cuda", torch.cuda.current_device())
