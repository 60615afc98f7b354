"""Where another layer gives a width and code may flatten a map all the same: a question, which a run answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from torchjax_bridge import plan
from torchjax_bridge.weights import Flatten, Plan
from torchjax_bridge.weights.flatten import record_orders


class Model(nn.Module):
    """A convolution to 16 channels, beside a Linear that gives 64, as many as 16 maps of 2 by 2 have."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.wide = nn.Conv2d(3, 6, 1)
        self.conv = nn.Conv2d(6, 16, 3)
        self.act = nn.ReLU()
        self.side = nn.Linear(5, 64)
        self.fc = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)])
        self.head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 10))

    def encode(self, x: Any) -> Any:
        return self.conv(self.wide(x)).flatten(1)

    @staticmethod
    def flat(x: Any) -> Any:
        return torch.flatten(x, 1)

    def features(self, x: Any, last: bool = False) -> Any:
        for block in self.blocks:
            x = block(x)
        return F.relu(x) if last else x


class Twin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        def conv(inputs: int, outputs: int, size: int) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (size, size), padding="VALID", rngs=rngs)

        self.wide, self.conv = conv(3, 6, 1), conv(6, 16, 3)
        self.side, self.fc = nnx.Linear(5, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
        self.blocks = nnx.List([conv(16, 16, 1), conv(16, 16, 1)])
        norm = nnx.BatchNorm(64, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Sequential(lambda x: x, norm, nnx.Linear(64, 10, rngs=rngs))


INPUTS = torch.randn(2, 3, 4, 4), torch.randn(2, 5)


def _plan(forward: Callable[..., Any], *rules: Any, inputs: Any = None) -> Plan:
    kind = type("Own", (Model,), {"forward": forward})
    return plan(kind(), nnx.eval_shape(lambda: Twin(nnx.Rngs(0))), rules=rules, inputs=inputs)


def _asked(forward: Callable[..., Any], *rules: Any) -> list[str]:
    faults = _plan(forward, *rules).faults
    assert all("Pass inputs=<what the torch model takes>" in fault.message for fault in faults)
    return [fault.path for fault in faults]


def _function(self: Any, x: Any, y: Any) -> Any:
    x = torch.flatten(self.act(self.conv(self.wide(x))), 1)
    return self.fc(x + self.side(y))


def _method(self: Any, x: Any, y: Any) -> Any:
    x = F.relu(self.conv(self.wide(x))).flatten(start_dim=1)
    x = x * torch.sigmoid(self.side(y))
    return self.fc(x)


def _view(self: Any, x: Any, y: Any) -> Any:
    image, x = x, self.conv(self.wide(x))
    x += self.conv(self.wide(image))
    x = x.view(x.size(0), -1)
    return self.fc(F.dropout(x, 0.1, self.training))


def _reshape(self: Any, x: Any, y: Any) -> Any:
    return self.fc(torch.reshape(self.conv(self.wide(x)), (-1, 64)))


def _through_methods(self: Any, x: Any, y: Any) -> Any:
    hidden = self.encode(x)
    return self.fc(hidden), self.side(y)


def _loop(self: Any, x: Any, y: Any) -> Any:
    x = self.conv(self.wide(x))
    for block in self.blocks:
        x = block(x)
    return self.fc(x.flatten(1))


def _unknown_map(self: Any, x: Any, y: Any) -> Any:
    return self.fc(torch.cat(self.conv(self.wide(x)).chunk(2, 1)[::-1], 1).flatten(1))


def _sizes(self: Any, x: Any, y: Any) -> Any:
    x = self.conv(self.wide(x))
    batch, channels, height, width = x.shape
    return self.fc(x.view(batch, channels * height * width))


def _in_a_dict(self: Any, x: Any, y: Any) -> Any:
    x = self.conv(self.wide(x)).flatten(1)
    return {"logits": self.fc(x), "features": x}


def _in_a_list(self: Any, x: Any, y: Any) -> Any:
    x = self.conv(self.wide(x)).flatten(1)
    return [self.fc(F.dropout(x, 0.1)) for _ in range(3)]


def _static(self: Any, x: Any, y: Any) -> Any:
    return self.fc(self.flat(self.conv(self.wide(x))))


@pytest.mark.parametrize(
    "forward",
    [
        _function,
        _method,
        _view,
        _reshape,
        _through_methods,
        _loop,
        _unknown_map,
        _sizes,
        _in_a_dict,
        _in_a_list,
        _static,
    ],
)
def test_a_flatten_in_a_forward_is_asked_about_though_another_layer_gives_as_much(
    forward: Callable[..., Any],
) -> None:
    assert "fc" in _asked(forward)
    assert "fc" not in _asked(forward, Flatten("fc", (16, 2, 2)))
    made = _plan(forward, inputs=INPUTS)
    assert Flatten("fc", (16, 2, 2)) in made.flattened
    # What the run does not call is asked about as before.
    assert {fault.path for fault in made.faults} <= {"head.1", "head.2"}


def _into_a_sequential(self: Any, x: Any, y: Any) -> Any:
    return self.head(self.features(self.conv(self.wide(x)), last=True).flatten(1))


def test_a_flatten_is_followed_into_the_sequential_that_reads_it() -> None:
    assert {"head.1", "head.2"} <= set(_asked(_into_a_sequential))
    made = _plan(_into_a_sequential, Flatten("fc", None), inputs=INPUTS)
    assert made.ok
    assert made.flattened == (Flatten("head.1", (16, 2, 2)), Flatten("head.2", (16, 2, 2)))


def _vectors(self: Any, x: Any, y: Any) -> Any:
    return self.fc(self.side(y).flatten(1)), self.conv(self.wide(x))


def _branches(self: Any, x: Any, y: Any) -> Any:
    x = self.conv(self.wide(x))
    x = x.flatten(1) if self.training else self.side(y)
    return self.fc(x)


def _mean(self: Any, x: Any, y: Any) -> Any:
    return self.fc(self.side(y[:, None]).mean(1).view(y.size(0), -1)), self.conv(self.wide(x))


def _last(self: Any, x: Any, y: Any) -> Any:
    return self.fc(self.side(y[:, None])[:, -1].flatten(1)), self.conv(self.wide(x))


def _joined(self: Any, x: Any, y: Any) -> Any:
    both = torch.stack([self.side(y), self.side(2 * y)], 1)
    return self.fc(both.max(1)[0].reshape(-1, 64)), self.conv(self.wide(x))


def _of_a_set(self: Any, x: Any, y: Any) -> Any:
    members = self.side(y).view(len(x), -1, 64)
    return self.fc(torch.max(members, 1).values.view(-1, 64)), self.conv(self.wide(x))


def _attended(self: Any, x: Any, y: Any) -> Any:
    return self.fc(torch.mm(y @ y.T, self.side(y)).view(2, -1)), self.conv(self.wide(x))


@pytest.mark.parametrize("forward", [_vectors, _branches, _mean, _last, _joined, _of_a_set, _attended])
def test_a_doubt_is_no_question_once_a_run_shows_that_no_map_is_flattened(
    forward: Callable[..., Any],
) -> None:
    assert "fc" in _asked(forward)
    made = _plan(forward, inputs=INPUTS)
    assert made.flattened == ()
    assert "fc" not in {fault.path for fault in made.faults}


class Narrow(nn.Module):
    """A map of as many numbers as a layer in front of it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 16, 3)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.conv1(x)).flatten(1))


class NarrowTwin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 64, (3, 3), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(64, 16, (3, 3), padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(64, 10, rngs=rngs)


def test_the_channels_of_another_layer_do_not_explain_what_a_forward_flattens() -> None:
    template = nnx.eval_shape(lambda: NarrowTwin(nnx.Rngs(0)))
    (fault,) = plan(Narrow(), template).faults
    assert fault.path == "fc"
    assert 'Flatten("fc", (16, 2, 2))' in fault.message
    assert plan(Narrow(), template, rules=[Flatten("fc", (16, 2, 2))]).ok
    assert plan(Narrow(), template, inputs=torch.ones(1, 3, 6, 6)).flattened == (Flatten("fc", (16, 2, 2)),)


class Wide(Narrow):
    """Two maps side by side, pooled to a point: as wide as no layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(80, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.conv1(x)[..., 1:-1, 1:-1], self.conv2(self.conv1(x))], 1)
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class WideTwin(NarrowTwin):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.fc = nnx.Linear(80, 10, rngs=rngs)


def test_a_map_that_a_run_pools_to_a_point_is_not_asked_about_whatever_its_width() -> None:
    template = nnx.eval_shape(lambda: WideTwin(nnx.Rngs(0)))
    assert [fault.path for fault in plan(Wide(), template).faults] == ["fc"]
    made = plan(Wide(), template, inputs=torch.ones(1, 3, 9, 9))
    assert made.ok
    assert made.flattened == ()


def test_a_model_without_source_is_asked_about_too() -> None:
    namespace: dict[str, Any] = {}
    exec("def forward(self, x, y):\n    return self.fc(self.conv(self.wide(x)).flatten(1))", namespace)
    assert "fc" in _asked(namespace["forward"])
    assert Flatten("fc", (16, 2, 2)) in _plan(namespace["forward"], inputs=INPUTS).flattened


def flat(x: Any) -> Any:
    return x.flatten(1)


def _by_a_function(self: Any, x: Any, y: Any) -> Any:
    return self.fc(flat(self.conv(self.wide(x))))


def test_a_function_that_a_forward_calls_may_flatten() -> None:
    assert "fc" in _asked(_by_a_function)


def _by_other_means(self: Any, x: Any, y: Any) -> Any:
    return self.fc(self.conv(self.wide(x)).as_strided((len(x), 64), (64, 1)))


def test_whatever_the_code_names_a_map_may_be_flattened() -> None:
    kind = type("Own", (Plain,), {"forward": _by_other_means})
    assert "fc" in [fault.path for fault in plan(kind(), nnx.eval_shape(lambda: Twin(nnx.Rngs(0)))).faults]


class Plain(nn.Module):
    """The layers of `Model`, without its methods."""

    __init__ = Model.__init__


class Frames(nn.Module):
    """An LSTM over the frames of a film, of which one Linear reads the outputs and another the last states."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
        self.lstm = nn.LSTM(8, 24, bidirectional=True, batch_first=True)
        self.each, self.states = nn.Linear(48, 10), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> Any:
        maps = self.conv(x.reshape(-1, *x.shape[2:]))
        out, (hidden, _) = self.lstm(self.pool(maps).flatten(1).view(len(x), -1, 8))
        return self.each(out.reshape(-1, 48)), self.states(hidden.transpose(0, 1).reshape(len(x), -1))


def test_what_a_recurrent_layer_gives_is_no_map() -> None:
    orders = record_orders(Frames(), (torch.ones(2, 4, 3, 8, 8),), {})
    assert {order.kind for order in orders.reads.values()} == {"plain"}
    assert len(orders.reads) == 3


def test_a_plan_without_inputs_runs_nothing() -> None:
    def forward(self: Any, x: Any, y: Any) -> Any:
        raise AssertionError

    kind = type("Own", (Plain,), {"forward": forward})
    assert plan(kind(), nnx.eval_shape(lambda: Twin(nnx.Rngs(0)))).moves


def test_a_scripted_module_is_asked_about_too() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(64, 64)))
    pair = nnx.Sequential(
        nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=nnx.Rngs(0)),
        lambda x: x,
        nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
    )
    assert not plan(scripted, pair).ok


# --- maps that are made of vectors -----------------------------------------------------------------------


class Decoder(nn.Module):
    """Linears that give 64 numbers, of which a map of 16 channels can be made, and one that reads as many."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.more, self.side = nn.Linear(5, 64), nn.Linear(5, 64), nn.Linear(64, 3)
        self.up = nn.ConvTranspose2d(16, 4, 2)
        self.tail = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 4, 2))
        self.apart = nn.Unflatten(1, (16, 2, 2))


class DecoderTwin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lift, self.more = nnx.Linear(5, 64, rngs=rngs), nnx.Linear(5, 64, rngs=rngs)
        self.side = nnx.Linear(64, 3, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 4, (2, 2), padding="VALID", transpose_kernel=True, rngs=rngs)
        self.tail = nnx.Sequential(nnx.relu, nnx.Conv(16, 4, (2, 2), padding="VALID", rngs=rngs))


def _viewed(self: Any, z: Any) -> Any:
    h = F.relu(self.lift(z))
    return self.up(h.view(-1, 16, 2, 2)), self.side(h), self.more(z)


def _reshaped(self: Any, z: Any) -> Any:
    h = torch.reshape(self.lift(z), (len(z), 16, 2, 2))
    return self.tail(h), self.side(self.more(z))


def _by_a_shape(self: Any, z: Any) -> Any:
    return self.up(self.lift(z).view(-1, *self.apart.unflattened_size)), self.side(self.more(z))


def _by_a_module(self: Any, z: Any) -> Any:
    return self.up(self.apart(self.lift(z))), self.side(self.more(z))


def _of_a_sum(self: Any, z: Any) -> Any:
    h = self.lift(z) + torch.randn(64) * self.more(z).exp()
    return self.up(h.view(-1, 16, 2, 2)), self.side(h)


def _heads(self: Any, z: Any) -> Any:
    return self.lift(z).view(-1, 4, 4, 4).transpose(1, 2), self.side(self.more(z))


def _asked_of_decoder(forward: Callable[..., Any], *rules: Any) -> list[str]:
    kind = type("Own", (Decoder,), {"forward": forward})
    template = nnx.eval_shape(lambda: DecoderTwin(nnx.Rngs(0)))
    faults = plan(kind(), template, rules=rules).faults
    assert all("output=True" in fault.message and "Pass inputs=" in fault.message for fault in faults)
    return [fault.path for fault in faults]


@pytest.mark.parametrize(
    ("forward", "asked"),
    [
        (_viewed, ["lift"]),
        (_reshaped, ["lift"]),
        (_by_a_shape, ["lift"]),
        (_by_a_module, ["lift"]),
        (_of_a_sum, ["lift", "more"]),
        (_heads, []),
    ],
)
def test_a_map_that_a_forward_makes_is_asked_about_though_another_layer_reads_as_much(
    forward: Callable[..., Any], asked: list[str]
) -> None:
    assert {*asked} <= {*_asked_of_decoder(forward, Flatten("side", None))}
    kind = type("Own", (Decoder,), {"forward": forward})
    template = nnx.eval_shape(lambda: DecoderTwin(nnx.Rngs(0)))
    made = plan(kind(), template, inputs=torch.randn(3, 5))
    said = [Flatten(name, (16, 2, 2), output=True) for name in asked]
    assert [rule for rule in made.flattened if rule.output] == said
    assert made.ok
