"""What `port` is given: a mistake is one error that says what to type."""

import re
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchjax_bridge import port
from torchjax_bridge.errors import ArgumentError, PortError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


X = torch.randn(3, 4)
X = 10 * torch.cat([X, -X])  # so that relu has something to cut


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Net, "port(Net(...), inputs)"),
        (F.relu, "takes a torch.nn.Module, not a function"),
        (nn.Linear(4, 2), "torch.nn.Sequential(layer)"),
        (torch.jit.script(Net()), "the module is a ScriptModule"),
        (Holder(torch.jit.script(Net())), "'part' is a ScriptModule"),
        (Holder(nn.DataParallel(Net())), "'part' is a DataParallel, which only runs another module"),
        (Holder(nn.LazyLinear(2)), "'part' is lazy"),
        (Net().double(), "'fc.weight' has 64 bits"),
    ],
    ids=["class", "function", "layer", "scripted", "part scripted", "part wrapped", "lazy", "64 bits"],
)
def test_what_is_no_module_to_port_is_refused(module: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        port(module, X)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapper_is_looked_through(wrap: Any) -> None:
    assert port(wrap(Net()), X, verify=False).name == "Net"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [(X.numpy(), "torch.from_numpy(array)"), (X.to_sparse(), "give dense ones")],
    ids=["array", "sparse"],
)
def test_inputs_of_another_kind_are_refused(inputs: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        port(Net(), inputs)


def test_inputs_that_torch_computed_are_taken() -> None:
    x = (X.clone().requires_grad_() * 2)[:2]
    assert port(Net(), x, verify=False).name == "Net"
    assert np.isfinite(x.detach().numpy()).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "flax"}, "to= is 'nnx' or 'linen', not 'flax'"),
        ({"training": "yes"}, "training= is 'optional' or 'required' or 'none', not 'yes'"),
        ({"assume": "net.py:3"}, "assume= takes a list of lines, such as ['net.py:3']"),
        ({"ops": {torch.polygamma: "{0}"}}, "ops= names torch.polygamma, and the module does not call it"),
        ({"ops": {torch.relu: "{0}"}}, "It calls torch.nn.functional.relu."),
    ],
    ids=["to", "training", "assume", "unused", "another function"],
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        port(Net(), X, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jnp.maximum({0}", "does not run ('(' was never closed"),
        ("jnp.relux({0})", "has no attribute 'relux'"),
        ("relu({0})", "name 'relu' is not defined"),
        ("jnp.maximum({0}, {1})", "the arguments here are {0}, {inplace}"),
        ("jnp.maximum({0}, {other})", "the arguments here are {0}, {inplace}"),
        ("jnp.abs({0})", "a mistake of the port or what ops= gives"),
    ],
)
def test_a_translation_that_does_not_work_is_named(text: str, words: str) -> None:
    with pytest.raises(PortError, match=re.escape(words)):
        port(Net(), X, ops={F.relu: text})


class Mixed(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def test_autocast_is_refused() -> None:
    with pytest.raises(PortError, match=r"torch\.autocast is on"):
        port(Mixed(), X)


@pytest.mark.parametrize(
    "caller_in", [torch.no_grad, torch.inference_mode, jax.disable_jit], ids=lambda mode: mode.__name__
)
def test_a_port_is_proved_whatever_mode_the_caller_is_in(caller_in: Any) -> None:
    with caller_in():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())  # its buffers are of that mode
        ported = port(net, torch.randn(2, 3, 8, 8))
    assert ported.proof is not None
    assert isinstance(ported.proof.gradients, float)
