"""Hooks are code of the caller, and what they or attributes keep of a module is returned by it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchjax_bridge import port, to_state_dict
from torchjax_bridge.errors import PortError
from torchjax_bridge.porting import Port


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        self.penalty = hidden.square().mean()
        return x + self.outer(hidden)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer() for _ in range(3)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"last": x}


class _Captured(nn.Module):
    """transformers' models: hooks keep what each layer gives, and the head reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = _Encoder(), nn.Linear(6, 3)
        self.kept: list[Tensor] = []
        for layer in self.encoder.layers:
            layer.register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        self.kept.append(result)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        last = self.encoder(x)["last"]
        return self.head(last + self.kept[0] * self.kept[1])


class _Penalised(nn.Module):
    """What a layer keeps as an attribute is read two modules above it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        last = self.encoder(x)["last"]
        return last, sum(layer.penalty for layer in self.encoder.layers)


def _agrees(module: nn.Module, x: Tensor) -> Port:
    ported = port(module, x)
    assert ported.proof is not None
    assert all(check.difference <= 1e-5 for check in ported.proof.checks)
    state = to_state_dict(ported.model, module, rules=ported.rules)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    return ported


@pytest.mark.parametrize("kind", [_Captured, _Penalised])
def test_what_a_module_keeps_is_returned_by_it(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    _agrees(kind().eval(), torch.randn(2, 6))


def test_what_hooks_do_is_code_of_the_caller(recwarn: pytest.WarningsRecorder) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    module[0].register_forward_pre_hook(lambda layer, given: (given[0] + 1,))
    module[1].register_forward_hook(lambda layer, given, result: 2 * result)
    module[2].register_forward_hook(lambda layer, given, result: None)
    module.register_forward_hook(lambda layer, given, result: result.tanh())
    source = _agrees(module, torch.randn(2, 3, 4, 4)).source
    assert "Conv2d" not in source  # a layer with a hook is still that layer
    assert not recwarn.list


def test_a_hook_beside_that_of_a_norm_is_refused() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    layer.register_forward_pre_hook(lambda layer, given: (2 * given[0],))
    with pytest.raises(PortError, match=r"'0' has a hook beside the one of its normed weight"):
        port(nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 4))
