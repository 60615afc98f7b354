import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from benchmarks._setting import Setting
from benchmarks.port import _source
from benchmarks.port._dropouts import dropouts_without_chance
from benchmarks.port._forward import DifferentOutputsError, difference
from benchmarks.port._measure import measure_port
from benchmarks.port.zoo import Entry, find
from examples.cifar10 import nnx_nets
from torchjax_bridge import to_flax
from torchjax_bridge.errors import BridgeError

QUICK = Setting("cpu", quick=True)
SOURCE = inspect.getsource(nnx_nets)


@pytest.fixture
def net() -> Entry:
    return find("example", "Net")


def port_by_hand(entry: Entry):
    """What `port` is to be, for the models whose twin a person wrote."""
    return lambda module, *inputs: SimpleNamespace(source=SOURCE, model=entry.twin(module))


def test_a_port_that_agrees_is_a_row_with_every_figure(net: Entry):
    row = measure_port(net, port_by_hand(net), QUICK)
    assert row.verdict == "yes"
    assert row.ported
    assert 0 < row.difference < 1e-5
    assert 0 < row.other_batch < 1e-5
    assert row.train == "agrees"
    assert row.classes == 3
    assert row.transpositions == 0
    assert row.lines == len(SOURCE.splitlines())
    assert row.torch_lines == 19
    assert row.batch == 64
    assert all(one > 0 for one in (row.port_seconds, row.torch_ms, row.port_ms, row.twin_ms))


def test_a_port_with_other_outputs_is_called_wrong(net: Entry):
    def port(module, *inputs):
        ported = port_by_hand(net)(module, *inputs)
        ported.model.fc3.bias[...] += 0.01
        return ported

    row = measure_port(net, port, QUICK)
    assert row.wrong
    assert not row.ported
    assert row.difference > 1e-3
    assert row.verdict == "no: it gives other outputs"


def test_outputs_that_are_not_numbers_are_wrong(net: Entry):
    def port(module, *inputs):
        ported = port_by_hand(net)(module, *inputs)
        ported.model.fc3.bias[...] = np.nan
        return ported

    assert measure_port(net, port, QUICK).wrong


def test_a_refusal_is_its_first_line(net: Entry):
    def port(module, *inputs):
        raise BridgeError("no translation of torch.fft.fft\n  net.py:59: y = torch.fft.fft(x)")

    row = measure_port(net, port, QUICK)
    assert row.why_not == "no translation of torch.fft.fft"
    assert not row.wrong
    assert row.torch_lines == 19


def test_a_refusal_with_a_list_is_its_first_reason(net: Entry):
    def port(module, *inputs):
        raise BridgeError("Net is not ported:\n- in 'fc1', net.py:5: x\n  a reason\n- in 'fc2'\n  another")

    said = "Net is not ported: in 'fc1', net.py:5: x a reason (and 1 more)"
    assert measure_port(net, port, QUICK).why_not == said


def test_another_error_is_told_apart_from_a_refusal(net: Entry):
    def port(module, *inputs):
        return {}["x"]

    assert measure_port(net, port, QUICK).why_not == "KeyError: 'x'"


def test_a_port_that_does_not_run_keeps_what_was_known(net: Entry):
    def port(module, *inputs):
        return SimpleNamespace(source=SOURCE, model=nnx.Linear(3, 2, rngs=nnx.Rngs(0)))

    row = measure_port(net, port, QUICK)
    assert row.why_not.startswith("ported, but ")
    assert row.classes == 3


class Torch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.bn = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.bn(self.fc(x)))


class Faithful(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(6, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.bn(self.fc(x)))


class WithoutDropout(Faithful):
    def __call__(self, x):
        return self.bn(self.fc(x))


class WithAnotherRate(Faithful):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        super().__init__(rngs=rngs)
        self.dropout.rate = 0.4


class WithoutBatchStatistics(Faithful):
    def __call__(self, x):
        return self.dropout(self.bn(self.fc(x), use_running_average=True))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("twin", "said"),
    [
        (Faithful, "agrees"),
        (WithoutDropout, "torch draws, the port does not"),
        (WithAnotherRate, "differs by"),
        (WithoutBatchStatistics, "differs by"),
    ],
)
def test_what_a_port_lacks_in_training_mode_alone_is_found(twin: type[nnx.Module], said: str):
    entry = Entry("a set", "a model", Torch, lambda batch: (torch.randn(batch, 6),))

    def port(module, *inputs):
        model = twin(rngs=nnx.Rngs(0))
        template = nnx.eval_shape(lambda: Faithful(rngs=nnx.Rngs(0)))
        nnx.update(model, nnx.state(to_flax(module, template), (nnx.Param, nnx.BatchStat)))
        return SimpleNamespace(source="", model=model)

    row = measure_port(entry, port, QUICK)
    assert row.ported
    assert row.train.startswith(said)


def test_a_dropout_of_attention_is_known_without_chance():
    q = torch.randn(2, 3, 4)
    expected = 0.75 * nn.functional.scaled_dot_product_attention(q, q, q)
    with dropouts_without_chance():
        for found in (
            nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.25),
            nn.functional.scaled_dot_product_attention(q, q, q, None, 0.25),
        ):
            torch.testing.assert_close(found, expected)
        given = [jnp.asarray(q.numpy())[:, :, None]] * 3
        flax = nnx.dot_product_attention(*given, dropout_rng=jax.random.key(0), dropout_rate=0.25)
        np.testing.assert_allclose(flax[:, :, 0], expected.numpy(), rtol=1e-5)
        attend = nn.MultiheadAttention(4, 2, dropout=0.25).train()
        torch.testing.assert_close(attend(q, q, q)[0], attend(q, q, q)[0])
    assert not torch.equal(attend(q, q, q)[0], attend(q, q, q)[0])


def test_maps_are_compared_channels_last_and_outputs_by_name():
    maps = torch.randn(2, 3, 4, 5)
    logits = torch.randn(2, 6)
    found = {"a": logits.numpy(), "out": maps.permute(0, 2, 3, 1).numpy()}
    assert difference({"out": maps, "a": logits}, found) == 0
    with pytest.raises(DifferentOutputsError, match="the port"):
        difference({"out": maps}, maps.numpy())
    with pytest.raises(DifferentOutputsError, match="the port"):
        difference((logits, logits), logits.numpy())


def test_each_output_is_measured_by_its_own_size():
    large, small = torch.full((2,), 1e6), torch.full((2,), 1e-3)
    assert difference((large, small), (large.numpy(), 2 * small.numpy())) == pytest.approx(1)


def test_counts_are_read_from_the_source():
    source = (
        "class A:\n    def f(self, x):\n        return jnp.swapaxes(x.T, 0, 1).reshape(2)\n\n\nclass B: ...\n"
    )
    assert _source.lines(source) == 6
    assert _source.classes(source) == 2
    assert _source.transpositions(source) == 2
    assert _source.transpositions("einsum('ij->ji', x)") == 0
