"""The crossing on CUDA, where there is none: CPU memory and functions that note their streams stand in for it."""

from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import torch
from jaxlib import _jax

from torchjax_bridge.errors import ExchangeError, ShareError
from torchjax_bridge.exchange import _dlpack_cuda, _tensors, choice, cuda_choice

IMPORT, EXPORT = _jax.dlpack_managed_tensor_to_buffer, _jax.buffer_to_dlpack_managed_tensor


@pytest.fixture
def streams(monkeypatch):
    """What the capsule functions were told; torch's current stream is the legacy default stream."""
    told: dict[str, list] = {"import": [], "export": [], "held": [], "recorded": []}

    def array_from_capsule(capsule, device, stream, copy, *kind):
        told["import"].append((stream, *kind))
        return IMPORT(capsule, device, None, copy, *(1 for _ in kind))

    def capsule_from_array(array, stream=None):
        told["export"].append(stream)
        return EXPORT(array)

    array_from_capsule.__doc__ = IMPORT.__doc__
    monkeypatch.setattr(_jax, "dlpack_managed_tensor_to_buffer", array_from_capsule)
    monkeypatch.setattr(_jax, "buffer_to_dlpack_managed_tensor", capsule_from_array)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(_dlpack_cuda, "_current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(_dlpack_cuda, "hold_for_torch", lambda *pair: told["held"].append(pair))
    monkeypatch.setattr(_dlpack_cuda, "record_xla_stream", lambda *pair: told["recorded"].append(pair))
    yield told
    _dlpack_cuda.set_cuda_path(None)


def test_both_directions_share_memory_and_guard_its_lifetime(streams, dlpack_path):
    tensor = torch.arange(64.0)
    array = _dlpack_cuda.import_cuda(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert [one[0] is tensor for one in streams["recorded"]] == [True]
    back = _dlpack_cuda.export_cuda(array)
    assert back.data_ptr() == tensor.data_ptr()
    ((seen, owner),) = streams["held"]
    assert seen is back
    array.delete()
    del back, seen
    assert owner.tolist() == tensor.tolist(), "what is held does not go with the array or the tensor"
    assert _dlpack_cuda._chosen.path == dlpack_path == choice().path


def test_torchs_default_stream_is_written_as_dlpack_writes_it(streams):
    _dlpack_cuda.set_cuda_path("fast")
    _dlpack_cuda.export_cuda(jnp.ones(4) + 0)
    assert streams["export"][-1] == 1


def test_a_client_without_streams_for_others_is_told_none(streams):
    _dlpack_cuda.set_cuda_path("fast")
    _dlpack_cuda.import_cuda(torch.ones(16))  # JAX's CPU client says UNIMPLEMENTED
    assert streams["import"][-1][0] is None


def test_another_error_of_the_stream_is_not_swallowed():
    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: lost")

    with pytest.raises(jax.errors.JaxRuntimeError, match="lost"):
        _dlpack_cuda._stream_of(SimpleNamespace(get_stream_for_external_ready_events=broken))


def test_a_cuda_graph_captures_no_crossing(streams, monkeypatch):
    array = _dlpack_cuda.import_cuda(torch.ones(16))
    told = {name: len(calls) for name, calls in streams.items()}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for cross, value in ((_dlpack_cuda.import_cuda, torch.ones(16)), (_dlpack_cuda.export_cuda, array)):
        with pytest.raises(ExchangeError, match="while a CUDA graph is captured"):
            cross(value)
    assert told == {name: len(calls) for name, calls in streams.items()}, "no stream was touched"


def test_a_private_function_that_fails_on_the_gpu_alone_takes_the_public_path_there(streams, monkeypatch):
    def broken(*_):
        raise RuntimeError("not on this device")

    broken.__doc__ = IMPORT.__doc__
    monkeypatch.setattr(_jax, "dlpack_managed_tensor_to_buffer", broken)
    _dlpack_cuda.set_cuda_path("")
    monkeypatch.setattr(jax.dlpack, "from_dlpack", lambda tensor: "public")
    assert _dlpack_cuda.import_cuda(torch.ones(16)) == "public"
    assert _dlpack_cuda._chosen.path == "public"
    assert "not on this device" in _dlpack_cuda._chosen.reason
    _dlpack_cuda.set_cuda_path("fast")
    with pytest.raises(ExchangeError, match="TORCHJAX_BRIDGE_DLPACK=fast, but"):
        _dlpack_cuda.import_cuda(torch.ones(16))


def test_without_a_gpu_there_is_no_choice_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_choice() is None


def test_an_array_in_host_memory_is_copied_to_its_device_or_refused(streams):
    (device,) = jnp.ones(1).devices()
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    array = jax.device_put(jnp.arange(16.0), sharding)
    with pytest.raises(BufferError, match="'pinned_host'"):
        _dlpack_cuda.export_cuda(array)
    with pytest.raises(ShareError, match=r"'w' .*memory of kind 'pinned_host'"):
        _tensors._in_device_memory(array, False, ("w",))
    moved = _tensors._in_device_memory(array, None, ())
    assert (moved.sharding.memory_kind, moved.tolist()) == ("device", array.tolist())
    assert _tensors._in_device_memory(moved, False, ()) is moved
