"""Parts that a port does not look into: a Flax class of the user's stands for them, or they stay in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import port, to_state_dict
from torchjax_bridge.errors import ArgumentError, PortError
from torchjax_bridge.porting import Port, Replacement, TorchPart

from .planted import FlaxSpectrum, LinenSpectrum, Part, spectrum


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.mixer = Part(spectrum)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer(self.conv(x))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


@pytest.fixture(scope="module")
def kept() -> tuple[nn.Sequential, Port]:
    net = _net()
    return net, port(net, torch.randn(2, 4, 6, 6), keep=["*.mixer"])


def test_a_part_that_stays_in_torch_is_an_argument_of_the_class(kept: tuple[nn.Sequential, Port]) -> None:
    net, ported = kept
    assert "import torch" not in ported.source
    assert """TorchPart(net.get_submodule("1.mixer"))""" in ported.source
    assert ported.source.count("class Block(") == 1
    names: dict = {}
    exec(ported.source, names)
    parts = {"layer0_mixer": net[0].mixer, "layer1_mixer": net[1].mixer}
    fresh = names["Sequential"](**{name: TorchPart(part) for name, part in parts.items()}, rngs=nnx.Rngs(0))
    fresh.eval()
    assert fresh(jnp.ones((5, 6, 6, 4))).shape == (5, 3)


def test_gradients_reach_the_weights_of_a_part_that_stays_in_torch(kept: tuple[nn.Sequential, Port]) -> None:
    net, ported = kept
    x = torch.randn(3, 4, 6, 6)
    net(x).square().sum().backward()
    gradients = nnx.grad(lambda model, x: jnp.square(model(x)).sum())(
        ported.model, jnp.asarray(x.permute(0, 2, 3, 1).numpy())
    )
    got = np.asarray(gradients.layers[0].mixer.params["conv.weight"][...])
    want = net[0].mixer.conv.weight.grad.numpy()
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_a_trained_part_comes_back_to_torch() -> None:
    net = _net()
    ported = port(net, torch.randn(2, 4, 6, 6), keep=["0.mixer", "1.mixer"])
    optimizer = nnx.Optimizer(ported.model, optax.sgd(0.1), wrt=nnx.Param)
    gradients = nnx.grad(lambda model, x: jnp.square(model(x)).sum())(ported.model, jnp.ones((2, 6, 6, 4)))
    optimizer.update(ported.model, gradients)
    state = to_state_dict(ported.model, net, rules=ported.rules)
    assert not torch.equal(state["0.mixer.conv.weight"], net[0].mixer.conv.weight)
    net.load_state_dict(state)
    want = net(torch.ones(2, 4, 6, 6)).detach().numpy()
    assert np.abs(np.asarray(ported.model(jnp.ones((2, 6, 6, 4)))) - want).max() <= 1e-5 * np.abs(want).max()


def test_a_part_that_stays_in_torch_follows_the_mode_of_the_model() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5)))
    model = port(net, torch.randn(2, 4, 6, 6), keep=["1"]).model
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    assert bool((model(x) == model(x)).all())
    model.train()
    before = np.asarray(model.layers[1].buffers["0.running_mean"][...])
    assert bool((model(x) == 0).any())
    assert not np.array_equal(np.asarray(model.layers[1].buffers["0.running_mean"][...]), before)


@pytest.mark.parametrize(
    "given",
    [
        lambda part: Replacement(FlaxSpectrum, {"channels": part.conv.in_channels}, channels_last=True),
        Replacement(
            f"{FlaxSpectrum.__module__}:FlaxSpectrum", {"channels": 4, "scale": 1.0}, channels_last=True
        ),
    ],
    ids=["function", "path"],
)
def test_a_flax_class_of_the_users_is_imported_made_and_called(given: object) -> None:
    net = _net()
    ported = port(net, torch.randn(2, 4, 6, 6), modules={Part: given})
    assert f"from {FlaxSpectrum.__module__} import FlaxSpectrum" in ported.source
    assert "self.mixer = FlaxSpectrum(channels=4" in ported.source
    assert "transpose" not in ported.source
    state = to_state_dict(ported.model, net, rules=ported.rules)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_a_flax_class_that_computes_something_else_is_not_returned() -> None:
    wrong = Replacement(FlaxSpectrum, {"channels": 4, "scale": 2.0}, channels_last=True)
    with pytest.raises(PortError, match="differs from torch"):
        port(_net(), torch.randn(2, 4, 6, 6), modules={Part: wrong})


def test_a_class_of_linen_is_made_in_setup_and_told_the_mode_also_in_a_sequential() -> None:
    net = nn.Sequential(Block(), nn.Sequential(nn.Conv2d(4, 4, 1), Part(spectrum)))
    given = Replacement(LinenSpectrum, {"channels": 4, "rate": 0.5}, channels_last=True)
    ported = port(net, torch.randn(2, 4, 6, 6), modules={Part: given}, to="linen")
    assert "self.mixer = LinenSpectrum(channels=4, rate=0.5)" in ported.source
    module, variables = ported.model
    x = jnp.asarray(torch.randn(2, 6, 6, 4).numpy())
    want = net(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    assert np.abs(np.asarray(module.apply(variables, x)) - want).max() <= 1e-5 * np.abs(want).max()
    trained = module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert 0.3 < float((trained == 0).mean()) < 0.7
    state = to_state_dict(variables, net, rules=ported.rules)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("flax", "to", "message"),
    [
        (FlaxSpectrum, "linen", "is a class of nnx, and the port is written for linen"),
        (LinenSpectrum, "nnx", "is a class of linen, and the port is written for nnx"),
    ],
)
def test_a_class_of_the_other_library_is_refused(flax: type, to: str, message: str) -> None:
    given = Replacement(flax, {"channels": 4}, channels_last=True)
    with pytest.raises(ArgumentError, match=message):
        port(_net(), torch.randn(2, 4, 6, 6), modules={Part: given}, to=to)  # type: ignore[arg-type]


def test_what_stays_in_torch_is_for_nnx() -> None:
    with pytest.raises(ArgumentError, match="keep= puts a module of nnx into a port"):
        port(_net(), torch.randn(2, 4, 6, 6), keep=["0.mixer"], to="linen")


def test_items_of_a_list_that_stay_in_torch_are_named_after_the_list() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixers = nn.ModuleList([Part(spectrum), Part(spectrum)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for mixer in self.mixers:
                x = mixer(x)
            return x

    source = port(Net(), torch.randn(2, 4, 6, 6), keep=["mixers.*"]).source
    assert "self.mixers = nnx.List([mixers_0, mixers_1])" in source


def test_a_weight_that_a_part_shares_is_refused() -> None:
    net = _net()
    net[1].mixer.conv.weight = net[0].mixer.conv.weight
    with pytest.raises(PortError, match="are one weight, and would be two"):
        port(net, torch.randn(2, 4, 6, 6), keep=["*.mixer"])
