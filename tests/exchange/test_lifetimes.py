"""Memory is not reused while work that reads it is queued. The CPU and streams of Python's stand in for CUDA."""

import gc
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import torch

from torchjax_bridge.exchange import _lifetimes

HOST = jax.devices("cpu")[0]


class Stream:
    """A stream whose work is done when it is told so."""

    def __init__(self) -> None:
        self.done = False

    def record_event(self):
        return SimpleNamespace(query=lambda: self.done)


@pytest.fixture
def stream(monkeypatch):
    now = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _lifetimes._in_flight.clear()
    yield now
    _lifetimes._in_flight.clear()


def exported():
    owner = torch.from_dlpack(jnp.arange(64.0) + 0)
    tensor = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(owner))
    _lifetimes.hold_for_torch(tensor, owner)
    return tensor, weakref.ref(owner)


@pytest.mark.parametrize(
    "cross_once_more",
    [
        lambda: _lifetimes.hold_for_torch(torch.ones(1), torch.ones(1)),
        lambda: _lifetimes.record_xla_stream(torch.ones(1), HOST),
    ],
    ids=["to_torch", "to_jax"],
)
def test_an_array_lives_until_torch_has_read_it(stream, cross_once_more, monkeypatch):
    monkeypatch.setattr(_lifetimes, "_compute_streams", {HOST: None})
    tensor, memory = exported()
    del tensor
    gc.collect()
    assert memory() is not None, "torch's queued kernels still read it"
    stream.done = True
    cross_once_more()
    assert memory() is None


def test_an_array_is_kept_if_cuda_cannot_be_asked(stream):
    def lost():
        raise RuntimeError("operation not permitted when stream is capturing")

    tensor, memory = exported()
    del tensor
    _lifetimes._in_flight[0][0].query = lost
    with pytest.raises(RuntimeError, match="not permitted"):
        _lifetimes._release()
    assert memory() is not None


def test_a_view_and_a_graph_hold_the_array_and_the_event_comes_after_them(stream):
    stream.done = True
    tensor, memory = exported()
    view = tensor[8:]
    weight = torch.ones(56, requires_grad=True)
    loss = (weight * view).sum()
    del tensor, view
    assert memory() is not None, "the graph saves it for the backward pass"
    loss.backward()
    del loss
    assert memory() is None


def test_arrays_are_let_go_in_any_order_of_their_streams(stream):
    slow, first = exported()
    del slow
    stream.done = True
    _lifetimes._in_flight.appendleft((SimpleNamespace(query=lambda: False), torch.ones(1)))
    _lifetimes._release()
    assert len(_lifetimes._in_flight) == 2, "the first has not passed"
    _lifetimes._in_flight.popleft()
    _lifetimes._release()
    assert first() is None


def test_an_array_that_a_cuda_graph_reads_is_kept_for_good(stream, monkeypatch):
    monkeypatch.setattr(_lifetimes, "_kept", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stream.done = True
    tensor, memory = exported()
    del tensor
    _lifetimes._release()
    assert memory() is not None
    assert not _lifetimes._in_flight, "an event of a capture may not be queried"


def test_a_forked_child_asks_cuda_nothing(stream, monkeypatch):
    monkeypatch.setattr(_lifetimes, "_kept", [])
    monkeypatch.setattr(_lifetimes, "forked", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: pytest.fail("there is no CUDA"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", torch.cuda.current_stream)
    _lifetimes._in_flight.clear()
    tensor, memory = exported()
    del tensor
    assert memory() is not None


def test_torchs_allocator_is_told_the_stream_of_xla(monkeypatch):
    told, asked = [], []
    monkeypatch.setattr(_lifetimes, "_compute_streams", {})
    monkeypatch.setattr(_lifetimes, "_compute_stream", lambda device: asked.append(device) or 123)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device.type))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: told.append(stream))
    for _ in range(2):
        _lifetimes.record_xla_stream(torch.ones(4), HOST)
    assert told == [(123, "cpu")] * 2
    assert asked == [HOST], "the stream is looked up once"


def test_memory_that_is_not_of_torchs_allocator_is_left_to_its_owner(monkeypatch):
    def refuse(self, stream):
        raise RuntimeError(said)

    monkeypatch.setattr(_lifetimes, "_compute_streams", {HOST: object()})
    monkeypatch.setattr(torch.Tensor, "record_stream", refuse)
    said = "it != ptr_info.end() INTERNAL ASSERT FAILED: ptr not found in ptr_info"  # of cudaMallocAsync
    _lifetimes.record_xla_stream(torch.ones(4), HOST)
    said = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory"):
        _lifetimes.record_xla_stream(torch.ones(4), HOST)


def test_the_stream_of_xla_is_found_whatever_the_memory_of_the_result_holds(monkeypatch):
    def fake(note, struct):
        def call(x):
            note(SimpleNamespace(stream=7), None, x)
            return jax.lax.bitcast_convert_type(jnp.full(struct.shape, -1, jnp.int32), struct.dtype)

        return call

    monkeypatch.setattr(_lifetimes, "buffer_callback", fake)
    with jax.debug_nans(True):  # the bits of a NaN, if it were floats
        assert _lifetimes._compute_stream(HOST) == 7


def test_without_a_stream_of_xla_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(_lifetimes, "_compute_streams", {})
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: pytest.fail("there is no stream"))
    _lifetimes.record_xla_stream(torch.ones(4), HOST)  # asks XLA, whose CPU client has none
    assert _lifetimes._compute_streams == {HOST: None}
    monkeypatch.setattr(_lifetimes, "_compute_streams", {})
    monkeypatch.setattr(_lifetimes, "buffer_callback", None)
    _lifetimes.record_xla_stream(torch.ones(4), HOST)
    assert _lifetimes._compute_streams == {HOST: None}
