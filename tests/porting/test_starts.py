"""A new model of an emitted class starts as a new model of torch's does; where it does not, the file says so."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import port
from torchjax_bridge.porting import Port

_To = Literal["nnx", "linen"]
_LIBRARIES: tuple[_To, ...] = ("nnx", "linen")
_CHOICE = "the port's own choice"
N, D = 300, 64  # so many draws that their mean and deviation are sure


class Draws(nn.Module):
    """Parameters that start as draws, in the ways that authors write."""

    def __init__(self, dim: int, std: float) -> None:
        super().__init__()
        self.dim, self.std = dim, std
        self.plain = nn.Parameter(torch.randn(1, N, dim))
        self.scaled = nn.Parameter(dim**-0.5 * torch.randn(N, dim))
        self.divided = nn.Parameter(torch.randn(N, dim) / math.sqrt(dim))
        self.moved = nn.Parameter(0.5 - 0.1 * torch.randn(N, dim))
        self.method = nn.Parameter(torch.empty(N, dim).normal_(std=0.3))
        self.even = nn.Parameter(torch.rand(N, dim) * 2 - 1)
        self.bounded = nn.Parameter(torch.Tensor(N, dim).uniform_(-self.std, self.std))
        self.cut = nn.Parameter(torch.zeros(N, dim))
        nn.init.trunc_normal_(self.cut, mean=0.1, std=1.0)
        self.hardly_cut = nn.Parameter(torch.zeros(N, dim))
        nn.init.trunc_normal_(self.hardly_cut, std=0.02)
        self.xavier = nn.Parameter(torch.empty(N, dim))
        self.xavier_normal = nn.Parameter(torch.empty(N, dim, 3))
        self.kaiming = nn.Parameter(torch.empty(N, dim))
        self.kaiming_normal = nn.Parameter(torch.empty(N, dim, 3))
        self.orthogonal = nn.Parameter(torch.empty(N, dim))
        self.data = nn.Parameter(torch.zeros(N, dim))
        self.data.data.normal_(0, 0.7)
        self.set = nn.Parameter(torch.zeros(N, dim))
        self.set.data = torch.randn(N, dim) * self.std
        self.twice = nn.Parameter(torch.ones(N, dim))
        nn.init.normal_(self.twice)
        self.maybe = nn.Parameter(torch.randn(N, dim) * 3) if std else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.xavier)
        nn.init.xavier_normal_(self.xavier_normal, gain=2.0)
        nn.init.kaiming_uniform_(self.kaiming, a=math.sqrt(5))
        nn.init.kaiming_normal_(self.kaiming_normal, mode="fan_out", nonlinearity="relu")
        nn.init.orthogonal_(self.orthogonal)
        with torch.no_grad():
            self.twice.uniform_(2, 4)
        if self.maybe is not None:
            self.maybe.data.mul_(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for parameter in self.parameters():
            x = x + parameter.mean()
        return x


class Listed(nn.Module):
    """Parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList([nn.Parameter(3 * torch.randn(20, 8)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.tables[0].mean() + self.tables[1].mean()


def test_parameters_of_a_list_start_as_the_list_is_made() -> None:
    source = port(Listed(), torch.randn(2, 4)).source
    assert "3.0 * jax.random.normal(rngs.params(), (20, 8))" in source
    assert "In a new model" not in source


class Constants(nn.Module):
    """Parameters that start as constants and regular tables."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(value * torch.ones(8))
        self.full = nn.Parameter(torch.full((8, 1), 0.25))
        self.temperature = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))
        self.logarithm = nn.Parameter(torch.log(10 * torch.ones(8)))
        self.eye = nn.Parameter(2 * torch.eye(8))
        self.steps = nn.Parameter(torch.arange(8) / 4)
        self.line = nn.Parameter(torch.linspace(-1, 1, 8).view(1, -1))
        self.few = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.filled = nn.Parameter(torch.empty(8))
        self.filled.data.fill_(self.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for parameter in self.parameters():
            x = x + parameter.mean()
        return x


class Buffers(nn.Module):
    """Buffers that ``forward`` reads and never writes."""

    def __init__(self) -> None:
        super().__init__()
        position, rates = (
            torch.arange(64)[:, None],
            torch.exp(torch.arange(0, 16, 2) * (-math.log(10000.0) / 16)),
        )
        table = torch.zeros(64, 16)
        table[:, 0::2], table[:, 1::2] = torch.sin(position * rates), torch.cos(position * rates)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("waves", table)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("ids", torch.arange(100).expand(1, -1))
        self.register_buffer("hides", torch.ones(20, 20, dtype=torch.bool).tril())
        self.register_buffer("tenth", torch.full((5,), 0.1))
        self.register_buffer("none", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for buffer in self.buffers():
            x = x + buffer.float().mean()
        return x * self.scale


class Counting(nn.Module):
    """A buffer that training changes, and one whose values follow no rule."""

    count: torch.Tensor
    table: torch.Tensor
    level: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("level", torch.full((3,), 2.0))
        self.register_buffer("table", torch.rand(10, 10).cumsum(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
            self.level *= 0.9
        return x * self.scale + self.count + self.table.mean() + self.level.mean()


def _fresh(ported: Port, x: torch.Tensor, to: _To, seed: int = 0) -> dict[str, Any]:
    """The variables of a new model of an emitted class, by name."""
    if to == "nnx":
        model = type(ported.model)(rngs=nnx.Rngs(seed))
        return {name: value[...] for name, value in vars(model).items() if isinstance(value, nnx.Variable)}
    module, _ = ported.model
    variables = module.init(jax.random.key(seed), jnp.asarray(x.numpy()))
    return {**variables.get("params", {}), **variables.get("buffers", {})}


@pytest.mark.parametrize("to", _LIBRARIES)
def test_draws_have_the_scale_of_torchs(to: _To) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    trained = Draws(D, 0.05)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(3).add_(1)
    ported = port(trained, x, to=to, verify=False)
    assert _CHOICE not in ported.source
    have = _fresh(ported, x, to)
    for name, parameter in Draws(D, 0.05).named_parameters():
        want, got = parameter.detach().numpy(), np.asarray(have[name])
        assert got.shape == want.shape
        std = want.std()
        assert abs(got.std() / std - 1) < 0.04, name
        assert abs(got.mean() - want.mean()) < 0.04 * std + 1e-9, name
        for share in (0, 10, 50, 90, 100):
            gap = abs(np.percentile(got, share) - np.percentile(want, share))
            assert gap < (0.05 if 0 < share < 100 else 1.5) * std, (name, share)
    square = np.asarray(have["orthogonal"])
    np.testing.assert_allclose(square.T @ square, np.eye(D), atol=1e-5)


@pytest.mark.parametrize("to", _LIBRARIES)
def test_constants_are_those_of_the_code_and_not_of_the_weights(to: _To) -> None:
    x = torch.randn(2, 4)
    trained = Constants(1e-6)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn(parameter.shape))
    ported = port(trained, x, to=to, verify=False)
    assert ported.source == port(Constants(1e-6), x, to=to, verify=False).source
    assert _CHOICE not in ported.source
    have = _fresh(ported, x, to)
    for name, parameter in Constants(1e-6).named_parameters():
        np.testing.assert_allclose(np.asarray(have[name]), parameter.detach().numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("to", _LIBRARIES)
def test_constant_buffers_are_equal_bit_for_bit(to: _To) -> None:
    net, x = Buffers(), torch.randn(2, 4)
    ported = port(net, x, to=to)
    assert "In a new model" not in ported.source
    have = _fresh(ported, x, to)
    for name, buffer in net.named_buffers():
        got = np.asarray(have[name])
        assert got.dtype == (np.int32 if buffer.dtype == torch.int64 else buffer.numpy().dtype)
        if name == "waves":  # of which float32 rounds the angles
            np.testing.assert_allclose(got, buffer.numpy(), atol=1e-5)
        else:
            np.testing.assert_array_equal(got, buffer.numpy())
    assert "sinusoids(64, 16, 8, mixed=True)" in ported.source


@pytest.mark.parametrize("to", _LIBRARIES)
def test_a_buffer_without_a_rule_starts_as_zeros_and_the_header_says_so(to: _To) -> None:
    net, x = Counting(), torch.randn(2, 4)
    net.count += 7  # as after some steps
    net.level *= 0.5
    ported = port(net, x, to=to)
    have = _fresh(ported, x, to)
    said = " ".join(ported.source.split())
    assert (
        "In a new model the buffer ``Counting.table`` starts as zeros: the values come with the weights."
        in said
    )
    np.testing.assert_array_equal(np.asarray(have["table"]), np.zeros((10, 10)))
    assert (float(have["count"]), have["level"].tolist()) == (0.0, [2.0] * 3)


class Scale(nn.Module):
    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.start = init
        self.gamma = nn.Parameter(init * torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Queries(nn.Module):
    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(dim**-0.5 * torch.randn(count, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.queries.sum(0)[:1]


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Scale(4, 0.5), Scale(4, 1e-5)
        self.c, self.d = Queries(3, 16), Queries(5, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


@pytest.mark.parametrize("to", _LIBRARIES)
def test_numbers_are_the_authors_arguments(to: _To) -> None:
    source = port(Scales(), torch.randn(2, 4), to=to).source
    own = "self." if to == "linen" else ""
    if to == "nnx":
        assert "self.gamma = nnx.Param(jnp.full((4,), init))" in source
        assert "dim**-0.5 * jax.random.normal(rngs.params(), (count, dim))" in source
    else:
        assert f"initializers.normal({own}dim**-0.5), ({own}count, {own}dim))" in source
        assert (
            "initializers.constant(self.value), (4,))" in source
        )  # linen's modules have an init of their own
    assert "In a new model" not in source


def _small(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.normal_().clamp_(-1, 1)


class Unread(nn.Module):
    """Parameters of which nobody can say how they start without running the code."""

    def __init__(self, std: float, early: bool = True) -> None:
        super().__init__()
        self.argument = nn.Parameter(std * torch.randn(4))
        self.branch = nn.Parameter(torch.randn(4))
        if early:
            nn.init.normal_(self.branch, std=0.1)
        self.looped = nn.Parameter(torch.randn(4))
        for _ in range(2):
            self.looped.data += torch.randn(4)
        self.alias = nn.Parameter(torch.randn(4))
        other = self.alias
        other.data.zero_()
        self.own = nn.Parameter(torch.randn(4))
        _small(self.own)
        start = torch.randn(4)
        start[0] = 5.0
        self.local = nn.Parameter(start)
        self.cumulated = nn.Parameter(torch.randn(4).cumsum(0))
        self.element = nn.Parameter(torch.randn(4))
        self.element.data[0] = 1.0
        self.uncalled = nn.Parameter(torch.randn(4))
        self.applied = nn.Parameter(torch.randn(4))
        self.read = nn.Parameter(torch.randn(self.applied.shape[0]))
        self.apply(self._start)
        with torch.no_grad():
            for parameter in (self.alias, self.argument):
                parameter.add_(torch.randn(4))

    def _start(self, module: Any) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.read)  # type: ignore[arg-type]
        if hasattr(module, "applied"):
            module.applied.data.fill_(3.0)
            module.applied.data += torch.randn(4)

    def init_weights(self) -> None:
        nn.init.normal_(self.uncalled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for parameter in self.parameters():
            x = x + parameter.mean()
        return x


def _start(module: Any) -> None:
    if isinstance(module, Queries):
        nn.init.normal_(module.queries)


class Around(nn.Module):
    """A model around a module with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Queries(3, 16)
        self.linear = nn.Linear(4, 4)
        nn.init.zeros_(self.linear.weight)
        self.size = sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.inner(x))


class Looping(Around):
    def __init__(self) -> None:
        super().__init__()
        chosen = [parameter for name, parameter in self.named_parameters() if name != "bias"]
        for parameter in chosen:
            nn.init.normal_(parameter)


class Naming(Around):
    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.inner.queries)


class Applying(Around):
    def __init__(self) -> None:
        super().__init__()
        self.apply(_start)


@pytest.mark.parametrize("kind", [Looping, Naming, Applying])
def test_a_model_that_writes_parameters_of_modules_inside_leaves_them_unread(kind: type[nn.Module]) -> None:
    source = port(kind(), torch.randn(2, 4), verify=False).source
    assert "In a new model the parameter ``Queries.queries`` starts as small random numbers" in source


def test_a_model_that_writes_others_does_not() -> None:
    assert "In a new model" not in port(Around(), torch.randn(2, 4), verify=False).source


@pytest.mark.parametrize("to", _LIBRARIES)
def test_what_cannot_be_read_is_never_guessed(to: _To) -> None:
    torch.manual_seed(0)
    source = port(Unread(0.1), torch.randn(2, 4), to=to, verify=False).source
    said = source.split("In a new model")[1]
    said = " ".join(said.partition(_CHOICE)[0].split())
    unread = {name for name, _ in Unread(0.1).named_parameters()} - {"read"}
    assert {name for name in unread if f"``Unread.{name}``" in said} == unread
    assert "Unread.read" not in source


class Mixed(nn.Module):
    """One class whose instances start in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Either(True), Either(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Either(nn.Module):
    def __init__(self, even: bool) -> None:
        super().__init__()
        self.even = even
        self.weight = nn.Parameter(torch.rand(4) if even else torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_instances_that_start_in_two_ways_are_one_class() -> None:
    source = port(Mixed(), torch.randn(2, 4)).source
    assert source.count("class Either") == 1
    assert "the parameter ``Either.weight`` starts as small random numbers" in source


class Standardised(nn.Conv2d):
    """A layer of torch's with a forward of its own, whose weight starts as torch's layer says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize("to", _LIBRARIES)
def test_a_layer_of_torchs_with_another_forward_starts_as_the_layer_does(to: _To) -> None:
    torch.manual_seed(0)
    layer = Standardised(32, 64, 3)
    net = nn.Sequential(layer)
    ported = port(net, torch.randn(2, 32, 8, 8), to=to, verify=False)
    source = ported.source
    assert "In a new model" not in source
    assert 'variance_scaling(1 / 3, "fan_in", "uniform")' in source
    assert abs(float(layer.weight.detach().std()) - (1 / 3 / 288) ** 0.5) < 0.002
