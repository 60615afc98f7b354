"""On CUDA a link copies on a stream of its own, in the order of both frameworks' work, and the host never waits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from benchmarks._rehearsal import rehearsing
from torchjax_bridge import link, to_flax
from torchjax_bridge.weights.linking import _streams

pytestmark = pytest.mark.gpu

# Large enough to keep a GPU busy; where the CPU stands in, nothing is to be slow.
WIDTH = 64 if rehearsing() else 2048


def _pair(width: int = 512) -> tuple[nn.Linear, nnx.Linear]:
    module = nn.Linear(width, width).cuda()
    with jax.default_device(jax.devices("gpu")[0]):
        return module, nnx.Linear(width, width, rngs=nnx.Rngs(0))


def test_a_push_and_a_pull_stay_on_the_gpu() -> None:
    module, model = _pair()
    both = link(module, model)
    both.push()
    assert model.kernel.get_value().devices() == {jax.devices("gpu")[0]}
    assert np.array_equal(np.asarray(model.kernel[...]), module.weight.detach().t().cpu())
    model.kernel.set_value(model.kernel[...] * 2)
    both.pull()
    assert module.weight.is_cuda
    assert np.array_equal(np.asarray(model.kernel[...]), module.weight.detach().t().cpu())


def test_a_push_sees_all_work_before_it_and_none_after_it() -> None:
    module, model = _pair(WIDTH)
    both = link(module, model)
    both.push()
    total = jax.jit(lambda kernel: kernel.astype(jnp.float32).sum())
    sums = []
    for step in range(20):
        with torch.no_grad():
            for _ in range(20):  # keeps the stream busy while the host goes on
                module.weight.copy_(module.weight @ torch.eye(WIDTH, device="cuda"))
            module.weight.fill_(float(step))
        both.push()
        sums.append(total(model.kernel.get_value()))
        with torch.no_grad():
            module.weight.fill_(-1.0)
    assert [float(one) for one in sums] == [float(step) * WIDTH * WIDTH for step in range(20)]


def test_a_pull_sees_the_computation_of_jax_before_it() -> None:
    module, model = _pair(WIDTH)
    both = link(module, model)
    both.push()
    double = jax.jit(
        lambda kernel: jax.lax.fori_loop(0, 50, lambda _, k: k @ jnp.eye(WIDTH), kernel) * 0 + 3.0
    )
    for _ in range(5):
        model.kernel.set_value(double(model.kernel.get_value()))
        both.pull()
        assert float(module.weight.sum()) == 3.0 * WIDTH * WIDTH
        module.weight.data.zero_()
        both.push()


def test_the_host_does_not_wait() -> None:
    module, model = _pair(2 * WIDTH)
    both = link(module, model)
    for _ in range(3):  # so that torch's allocator has all the memory and asks the driver for none
        both.push()
        both.pull()
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        torch.cuda._sleep(2_000_000_000)  # about a second
        marker = torch.cuda.current_stream().record_event()
        both.push()
        assert not marker.query()
        both.pull()
        assert not marker.query()
    torch.cuda.synchronize()
    assert np.array_equal(np.asarray(model.kernel[...]), module.weight.detach().t().cpu())


def test_the_work_is_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    module, model = _pair()
    used: list[torch.cuda.Stream] = []
    forward = type(link(module, model).plan.moves[0].layout).forward

    def record(self: object, tensors: object) -> object:
        used.append(torch.cuda.current_stream())
        return forward(self, tensors)  # type: ignore[arg-type]

    both = link(module, model)
    monkeypatch.setattr(type(both.plan.moves[0].layout), "forward", record)
    current = torch.cuda.current_stream()
    both.push()
    assert used
    assert all(stream != current for stream in used)
    assert torch.cuda.current_stream() == current


def test_a_cast_and_many_pushes_hold_memory_flat() -> None:
    module, model = _pair(1024)
    both = link(module, model, dtype=jnp.bfloat16)
    for _ in range(5):
        both.push()
    jax.block_until_ready(model.kernel.get_value())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        both.push()
        both.pull()
    jax.block_until_ready(model.kernel.get_value())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 8 * module.weight.nbytes
    assert np.array_equal(
        np.asarray(model.kernel.get_value()).astype(np.float32),
        module.weight.detach().t().cpu().bfloat16().float(),
    )
    assert _streams._streams
    assert to_flax(module, model).kernel.get_value().dtype == jnp.float32
