"""Layers in a row, in different numbers: one class, whose list is one line."""

from typing import Literal

import pytest
import torch
from torch import nn

from tests.porting.random_stages import Stage, random_stages
from torchjax_bridge import port

_Framework = Literal["nnx", "linen"]


class _Block(nn.Module):
    def __init__(self, dim: int, expansion: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.up = nn.Conv2d(dim, expansion * dim, 1)
        self.down = nn.Conv2d(expansion * dim, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


class _Stage(nn.Module):
    """A stage with one block more than the last one."""

    def __init__(self, width: int, dim: int, depth: int, drops: tuple[float, ...]) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, dim, 2, stride=2)
        self.blocks = nn.ModuleList([_Block(dim, drop=drops[i]) for i in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reduce(x)
        for block in self.blocks:
            x = block(x)
        return x


class _Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            _Stage(3, 8, 1, (0.0,)), _Stage(8, 8, 2, (0.1, 0.2)), _Stage(8, 12, 3, (0.1, 0.2, 0.4))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(x).mean((2, 3))


@pytest.mark.every(2)
@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_stages_of_different_depths_are_one_class(to: _Framework) -> None:
    source = port(_Staged(), torch.randn(2, 3, 16, 16), to=to).source  # proved in both modes
    assert source.count("\nclass Stage(") == 1
    assert "for i in range(depth)" in source.replace("self.", "")
    assert "for block in self.blocks:" in source  # also for the stage of one block


class _Residual(nn.Module):
    def __init__(self, width: int, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, dim, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != dim:
            self.shortcut = nn.Sequential(nn.Conv2d(width, dim, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + self.shortcut(x))


class _Layer(nn.Module):
    """Blocks of which the first has another stride and other channels."""

    def __init__(self, width: int, dim: int, count: int, stride: int) -> None:
        super().__init__()
        blocks = [_Residual(width, dim, stride), *(_Residual(dim, dim) for _ in range(count - 1))]
        self.body = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.every(2)
@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_a_first_layer_that_differs_is_asked_for_by_its_place(to: _Framework) -> None:
    net = nn.Sequential(_Layer(3, 8, 2, 2), _Layer(8, 12, 3, 2), _Layer(12, 12, 4, 1))
    source = port(net, torch.randn(2, 3, 16, 16), to=to).source
    assert source.count("\nclass Layer(") == 1
    assert "if i == 0 else" in source


class _Dense(nn.Module):
    """Layers under numbers, each given everything that was made before it."""

    def __init__(self, width: int, growth: int, count: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(f"dense{i + 1}", nn.Conv2d(width + i * growth, growth, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class _DenseLayer(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, growth, 3, padding=1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return torch.relu(self.conv(torch.cat(features, 1)))


class _DenseBlock(nn.ModuleDict):
    """The same with a class for each layer, as torchvision has it."""

    def __init__(self, width: int, growth: int, count: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module("denselayer%d" % (i + 1), _DenseLayer(width + i * growth, growth))  # noqa: UP031

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


@pytest.mark.every(2)
@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_numbered_layers_are_made_and_called_in_loops_under_their_names(to: _Framework) -> None:
    net = nn.Sequential(_DenseBlock(3, 4, 3), _DenseBlock(15, 4, 5))
    ported = port(net, torch.randn(2, 3, 8, 8), to=to)
    assert ported.source.count("\nclass DenseBlock(") == 1
    assert 'setattr(self, f"denselayer{i + 1}", DenseLayer(' in ported.source
    assert 'features.append(getattr(self, f"denselayer{i + 1}")(features))' in ported.source
    assert not any("denselayer" in str(rule) for rule in ported.rules)  # the names are torch's


class _Chained(nn.Module):
    """Numbered layers that are called one after the other, from number 0, by their names."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        for k in range(count):
            setattr(self, f"block{k}", _Block(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(self.count):
            x = getattr(self, f"block{k}")(x)
        return x


@pytest.mark.every(2)
@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_a_chain_of_numbered_layers_is_a_loop(to: _Framework) -> None:
    net = nn.Sequential(_Chained(3, 2), _Chained(3, 4))
    source = port(net, torch.randn(2, 3, 8, 8), to=to).source
    assert source.count("\nclass Chained(") == 1
    assert 'getattr(self, f"block{i}")(x' in source


class _Picked(nn.Module):
    """Numbered layers that the code calls in another order than their numbers'."""

    def __init__(self) -> None:
        super().__init__()
        for k in range(3):
            setattr(self, f"block{k}", _Block(3, expansion=k + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block1(self.block2(self.block0(x)))


def test_numbered_layers_in_another_order_stay_as_they_are() -> None:
    source = port(_Picked(), torch.randn(2, 3, 8, 8)).source
    assert "getattr" not in source
    assert "self.block2 = " in source


def test_layers_of_dense_blocks_without_a_class_of_their_own_port() -> None:
    port(nn.Sequential(_Dense(3, 4, 3), _Dense(15, 4, 5)), torch.randn(2, 3, 8, 8))  # proved


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.1 * torch.ones(dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


class _Scaled(nn.Module):
    """A block with a scale, or without."""

    def __init__(self, dim: int, scaled: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)
        self.scale = _Scale(dim) if scaled else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(x) + self.conv(x)


class _ScaledStage(nn.Module):
    def __init__(self, width: int, dim: int, depth: int, scaled: bool) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width, dim, 1)
        self.blocks = nn.Sequential(*[_Scaled(dim, scaled) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.widen(x))


def test_a_shape_that_only_the_blocks_of_some_stages_have_is_an_argument_of_these() -> None:
    stages = [_ScaledStage(3, 4, 1, False), _ScaledStage(4, 6, 2, True), _ScaledStage(6, 8, 3, True)]
    source = port(nn.Sequential(*stages), torch.randn(2, 3, 6, 6)).source
    assert source.count("\nclass ScaledStage(") == 1


def _conv(width: int, dim: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(width, dim, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU6(inplace=True))


class _Squeeze(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class _Inverted(nn.Module):
    """A list that is filled under conditions, as in a MobileNet."""

    def __init__(self, width: int, dim: int, stride: int, expansion: int, squeezes: bool = False) -> None:
        super().__init__()
        hidden = width * expansion
        self.expansion = expansion
        layers = []
        if expansion != 1:
            layers.append(_conv(width, hidden, 1))
        layers.append(_conv(hidden, hidden, 3, stride, hidden))
        if squeezes:
            layers += [_Squeeze(hidden)]
        layers.extend([nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim)])
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.every(2)
@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_layers_that_some_instances_lack_in_a_list_are_under_a_condition(to: _Framework) -> None:
    net = nn.Sequential(
        _Inverted(8, 8, 1, 1), _Inverted(8, 6, 2, 3), _Inverted(6, 6, 1, 3, True), _Inverted(6, 4, 1, 1)
    )
    source = port(net, torch.randn(2, 8, 8, 8), to=to).source
    assert source.count("\nclass Inverted(") == 1
    text = " ".join(source.replace("self.", "").split())
    assert "if expansion != 1 else []" in text  # the author's condition
    assert "*([Squeeze(" in text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_networks_of_random_stages_port(seed: int) -> None:
    port(random_stages(seed), torch.randn(2, 3, 6, 6), to="linen" if seed % 3 == 0 else "nnx")  # proved


def test_a_stage_whose_norm_only_some_have_keeps_its_number_of_blocks() -> None:
    stages = [Stage(3, 8, 4 * [_PLAIN], True, False), Stage(8, 8, 3 * [_PLAIN], True, True)]
    source = port(nn.Sequential(*stages), torch.randn(2, 3, 6, 6)).source  # proved
    assert source.count("\nclass Stage(") == 1


def test_a_list_and_a_norm_that_differ_in_number_are_right() -> None:
    stages = [Stage(3, 8, 2 * [_PLAIN], False, True), Stage(8, 6, 4 * [_PLAIN], False, False)]
    port(nn.Sequential(*stages, Stage(6, 8, [_PLAIN], False, True)), torch.randn(2, 3, 6, 6))  # proved


_PLAIN = (nn.Identity, False, 1, 0.0, False, 0, 0)
_OTHER = (nn.Tanh, False, 1, 0.0, False, 0, 0)


def test_a_first_activation_that_is_a_lambda_is_one_in_a_condition() -> None:
    stages = [
        Stage(8, 8, [_PLAIN, _OTHER], False, False),
        Stage(8, 8, [_PLAIN, _OTHER, _OTHER], False, False),
    ]
    assert "(lambda x: x) if i == 0 else" in port(nn.Sequential(*stages), torch.randn(2, 8, 6, 6)).source


class _ScaledBy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x) * scale


class _Given(nn.Module):
    """Blocks that are given a parameter and a buffer, as tables of positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("table", torch.randn(6))
        self.blocks = nn.ModuleList([_ScaledBy() for _ in range(3)])
        self.others = nn.ModuleList([_ScaledBy() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, self.scale)
        for block in self.others:
            x = block(x, scale=self.table)
        return x * self.scale + self.table


@pytest.mark.every(2)
@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_layers_that_are_given_a_parameter_are_called_in_a_loop(to: _Framework) -> None:
    source = port(_Given(), torch.randn(2, 5, 6), to=to).source
    assert source.count("\nclass ") == 2
    assert source.count("for block in self.") == 2
