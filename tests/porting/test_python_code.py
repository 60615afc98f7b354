"""What the code of a model does beside torch's functions: lambdas, arrays of NumPy, derivatives of its own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchjax_bridge import port, to_state_dict
from torchjax_bridge.errors import PortError
from torchjax_bridge.recording import copy_module, record


class Block(nn.Module):
    """A lambda that holds layers, as in minGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"wide": nn.Linear(4, 8), "drop": nn.Dropout(0.5), "back": nn.Linear(8, 4)})
        mlp = self.mlp
        self.feed = lambda x: mlp.drop(mlp.back(torch.relu(mlp.wide(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed(x)


def test_a_function_that_holds_layers_is_ported_in_both_modes() -> None:
    ported = port(Block(), torch.randn(3, 4), training="required")
    assert "self.mlp['drop'](" in ported.source.replace('"', "'")
    assert isinstance(ported.proof.gradients, float)


def test_a_copy_of_such_a_module_calls_its_own_layers() -> None:
    block = Block()
    copied = copy_module(block).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    x = torch.randn(3, 4)
    assert torch.equal(copied(x), x)
    assert not torch.equal(block.eval()(x), x)


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        identity = torch.from_numpy(np.eye(3).flatten().astype(np.float32)).view(1, 9).repeat(len(x), 1)
        return (x + identity).view(-1, 3, 3)


def test_arrays_of_numpy_are_constants() -> None:
    ported = port(Numbers(), torch.randn(2, 9))
    assert "jnp.eye(3" in ported.source
    x = torch.randn(4, 9)
    got = np.asarray(ported.model(jnp.asarray(x.numpy())))
    np.testing.assert_allclose(got, Numbers()(x).numpy(), rtol=1e-6)


class FromValues(nn.Module):
    """An array that is computed of what torch gave."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.sort(x.detach().numpy()))


@pytest.mark.slow
def test_arrays_that_are_made_of_values_are_none() -> None:
    faults = [fault.reason for fault in record(FromValues(), (torch.randn(2, 3),)).faults]
    assert any("made by no function of torch's" in reason for reason in faults)
    with pytest.raises(PortError):
        port(FromValues(), torch.randn(2, 3))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Applies(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.fc(x))


def test_a_function_with_the_derivative_of_its_forward_is_ported() -> None:
    ported = port(Applies(Swish), torch.randn(3, 4))
    assert "stop_gradient" not in ported.source
    assert isinstance(ported.proof.gradients, float)


def test_a_function_with_another_derivative_is_refused() -> None:
    with pytest.raises(PortError, match="Sign, whose backward is written by hand"):
        port(Applies(Sign), torch.randn(3, 4))


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def test_a_loop_over_one_layer_returns_after_it() -> None:
    source = port(OneLayer(), torch.randn(2, 4), verify=False).source
    body = source[source.index("def __call__") :]
    assert "for " not in body or body.index("return") > body.index("for ")
    assert not any(line.startswith("            return") for line in body.splitlines())


class Angles(nn.Module):
    """Gemma's rotary angles: another table for each kind of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("near", 0.5 ** torch.arange(4.0), persistent=False)
        self.register_buffer("far", 0.9 ** torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor, kind: str) -> Tensor:
        places = torch.arange(x.shape[1])[:, None] * getattr(self, kind)
        return places.cos() if kind == "near" else places.sin() + 1


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angles, self.fc = Angles(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        turned = {kind: self.angles(x, kind) for kind in ("near", "far")}
        return self.fc(x * turned["near"]) * turned["far"]


def test_a_module_without_weights_may_do_something_else_in_each_call() -> None:
    ported = port(Turned(), torch.randn(2, 5, 4))
    assert ported.proof is not None


def test_the_same_call_of_a_layer_with_weights_may_not() -> None:
    class Scaled(Angles):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, kind: str) -> Tensor:
            return self.scale * super().forward(x, kind)

    module = Turned()
    module.angles = Scaled()
    with pytest.raises(PortError, match="'angles' is called again and then does something else"):
        port(module, torch.randn(2, 5, 4))


def test_a_function_of_numbers_alone_gives_a_tensor() -> None:
    class Divides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.div(7, 2, rounding_mode="trunc")

    assert "jnp.asarray(7)" in port(nn.Sequential(Divides(), nn.Linear(4, 4)), torch.randn(2, 4)).source


class Both(nn.Module):
    """CLIP, of which CLIPSeg calls the towers alone: its own scale is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.tower, self.other = nn.Linear(4, 4), nn.Linear(4, 4)


class OneTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = Both(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both.tower(x))


def test_a_module_that_is_not_called_keeps_its_own_parameters_beside_its_layers() -> None:
    module = OneTower().eval()
    ported = port(module, torch.randn(2, 4))
    state = to_state_dict(ported.model, module, rules=ported.rules)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert jnp.array_equal(ported.model.both["scale"][...], module.both.scale.detach().numpy())


class Named(nn.Module):
    """Returns what is no array: text, a dtype, numbers, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.linear(x), "name": "text", "dtype": x.dtype, "rest": (3, 1.5, None, x.shape[0])}


@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_an_output_holds_what_is_no_array(to: str) -> None:
    ported = port(Named(), torch.randn(2, 4), to=to)
    model = ported.model if to == "nnx" else ported.model[0].bind(ported.model[1])
    found = model(jnp.ones((3, 4)))
    assert found["name"] == "text"
    assert found["dtype"] == jnp.float32
    assert found["rest"] == (3, 1.5, None, 3)
    assert isinstance(ported.proof.gradients, float)
    assert any("outside of jax.jit" in note and "a string and a dtype" in note for note in ported.notes)


class KeyedByAnything(nn.Module):
    def forward(self, x: Tensor) -> dict[Any, Tensor]:
        return {"y": x + 1, 3: x * 2}


def test_keys_of_an_output_need_no_order() -> None:
    found = port(KeyedByAnything(), torch.randn(2, 4)).model(jnp.ones(3))
    assert list(found) == ["y", 3]


class SaysSize(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, f"a batch of {x.shape[0]}"


def test_a_text_that_depends_on_sizes_is_refused() -> None:
    with pytest.raises(PortError, match="'a batch of 2' is 'a batch of 3' with inputs of other sizes"):
        port(SaysSize(), torch.randn(2, 4))
