"""A port trains as torch does: what runs in training only is code under ``self.deterministic``."""

import copy
import random
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

from benchmarks.port.cifar import BUILDERS
from torchjax_bridge import port, to_state_dict
from torchjax_bridge.errors import PortError

from .steps import flax_outputs, flax_step, furthest, torch_step


class Net(nn.Module):
    """Everything here is the same in both modes but for batch norm and dropout."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, momentum=0.3)
        self.drop = nn.Dropout2d(p)
        self.fc = nn.Linear(8, 4)
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu(self.bn(self.conv(x))))
        x = F.dropout(x.mean((2, 3)), self.p, self.training)
        return self.fc(x)


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        mask = x.new_empty(shape).bernoulli_(keep)
        if keep > 0.0:
            mask.div_(keep)
        return x * mask


class Residual(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.drop_path = DropPath(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(torch.tanh(self.conv(x)))


class Auxiliary(nn.Module):
    """A second head that only training runs, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.aux = nn.Linear(6, 4)
        self.conv = nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        if self.training:
            aux = self.aux(x.mean((2, 3)))
        x = torch.tanh(self.conv(x))
        x = self.fc(x.mean((2, 3)))
        if self.training:
            return x, aux
        return x


class NormActivation(nn.BatchNorm2d):
    """A batch norm with a forward of its own, as in timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return F.relu(x)


class Attention(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, scale=0.3)
        return x.transpose(1, 2).flatten(2)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.act = nn.RReLU(0.1, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x + 0.5 * torch.randn_like(x)
        return self.act(self.fc(x))


@pytest.fixture
def doubles() -> Iterator[None]:
    """64 bits, in which what is the same differs by less than 1e-9."""
    with jax.enable_x64(True):
        yield


def _agrees(module: nn.Module, x: torch.Tensor, change: Any = None, tolerance: float = 1e-9) -> None:
    """Outputs, gradients of every parameter and statistics after a step are torch's, in 64 bits."""
    module, x = module.double(), x.double()
    ported = port(module, x, training="required", exact_statistics=True, verify=False)
    model = nnx.clone(ported.model)
    if change is not None:
        change(module, model)
    want, got = torch_step(module, x), flax_step(ported, model, module, x)
    assert len(want.outputs) == len(got.outputs)
    for torch_output, flax_output in zip(want.outputs, got.outputs, strict=True):
        assert flax_output.dtype == torch.float64
        torch.testing.assert_close(flax_output, torch_output, rtol=tolerance, atol=tolerance)
    assert furthest(got.gradients, want.gradients)[0] < tolerance
    if want.statistics:
        assert furthest(got.statistics, want.statistics)[0] < tolerance
    model.eval()
    nnx.update(model, nnx.state(ported.model))
    with torch.no_grad():
        expected = module.eval()(x)
    evaluated = flax_outputs(model, x)[0]
    torch.testing.assert_close(evaluated, expected, rtol=tolerance, atol=tolerance)


def _without_dropout(module: nn.Module, model: nnx.Module) -> None:
    """Rates of 0 on both sides, so that both compute the same in training."""
    for layer in module.modules():
        for name in ("p", "rate", "drop_rate", "droprate"):
            if hasattr(layer, name):
                setattr(layer, name, 0.0)
    for _, layer in nnx.iter_modules(model):
        for name in ("p", "rate"):
            if hasattr(layer, name):
                setattr(layer, name, 0.0)


def test_where_only_dropout_differs_one_body_serves_both_modes(doubles: None) -> None:
    module = Net()
    assert "deterministic" not in port(module, torch.randn(2, 3, 8, 8)).source
    _agrees(module, torch.randn(4, 3, 8, 8), _without_dropout)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "module",
    [
        Auxiliary(),
        nn.Sequential(nn.Conv2d(3, 4, 3), NormActivation(4)),
        nn.Sequential(Residual(0.3), Residual(0.2), Residual(0.0)),
    ],
    ids=["auxiliary head", "batch norm with a forward of its own", "stochastic depth"],
)
def test_a_step_of_training_is_that_of_torch(doubles: None, module: nn.Module) -> None:
    _agrees(copy.deepcopy(module), torch.randn(4, 3, 8, 8), _without_dropout)


@pytest.mark.slow
def test_attention_that_drops_weights_is_that_of_torch_at_rate_0(doubles: None) -> None:
    def change(module: Any, model: Any) -> None:
        module.p = model.p = 0.0

    _agrees(Attention(0.25), torch.randn(2, 5, 8), change, tolerance=1e-6)  # JAX's softmax has 32 bits


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_a_network_for_cifar_trains_as_in_torch(doubles: None, name: str) -> None:
    torch.manual_seed(0)
    # Within 0 and 1, as images are: gelu cuts whitened outliers to 0, and equal maxima have several gradients.
    _agrees(BUILDERS[name](), torch.rand(4, 3, 32, 32), _without_dropout)


def test_the_auxiliary_head_is_in_the_model_with_its_weights() -> None:
    module = Auxiliary()
    model = port(module, torch.randn(2, 3, 8, 8)).model
    np.testing.assert_array_equal(model.aux.kernel[...], module.aux.weight.detach().numpy().T)
    assert isinstance(model(jnp.ones((2, 8, 8, 3))), jax.Array)
    model.train()
    outputs = model(jnp.ones((2, 8, 8, 3)))
    assert isinstance(outputs, tuple)
    assert [output.shape for output in outputs] == [(2, 4), (2, 4)]


def test_a_path_is_dropped_for_whole_examples_and_else_scaled() -> None:
    module = Residual(0.25)
    model = port(module, torch.randn(2, 3, 4, 4)).model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 4, 4, 3)), jnp.float32)
    path = model(x) - x
    model.train()
    found = model(x) - x
    dropped = jnp.all(found == 0, (1, 2, 3), keepdims=True)
    np.testing.assert_allclose(found, jnp.where(dropped, 0, path / 0.75), atol=1e-5)
    assert abs(float(dropped.mean()) - 0.25) < 0.03
    assert not np.array_equal(model(x), model(x))


class AlphaDrop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.alpha_dropout(x, 0.2, training=self.training)


def test_a_dropout_as_a_function_does_nothing_in_evaluation() -> None:
    assert port(AlphaDrop(), torch.randn(2, 3)).proof is not None


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Dropout(0.2), (64, 64)),
        (nn.Sequential(nn.AlphaDropout(0.2)), (64, 64)),
        (AlphaDrop(), (64, 64)),
        (Attention(0.3), (1, 64, 8)),
        (Noise(), (4096, 3)),
    ],
    ids=["dropout", "alpha dropout", "its function", "attention", "noise and RReLU"],
)
def test_random_layers_draw_from_the_distribution_of_torch(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = port(nn.ModuleList([module])[0], x, verify=False).model
    model.train()
    module.train()
    with torch.no_grad():
        want = torch.stack([module(x) for _ in range(200)])
    run = nnx.jit(lambda model: model(jnp.asarray(x.numpy())))
    got = np.stack([run(model) for _ in range(200)])
    spread = want.std(0).mean().item()
    assert spread > 0.01
    assert np.abs(got.mean(0) - want.mean(0).numpy()).mean() < 0.2 * spread
    assert abs(got.std(0).mean() / spread - 1) < 0.05
    assert abs(got.mean() - want.mean().item()) < 0.02 * spread + 0.02 * abs(want.mean().item()) + 1e-3


def test_a_step_under_jit_is_traced_once_and_the_trained_model_goes_back_to_torch() -> None:
    torch.manual_seed(0)
    module = Net()
    ported = port(module, torch.randn(2, 3, 8, 8))
    model = ported.model
    model.train()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    traced = 0

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        nonlocal traced
        traced += 1

        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    x = torch.randn(16, 3, 8, 8)
    images, labels = jnp.asarray(x.permute(0, 2, 3, 1).numpy()), jnp.arange(16) % 4
    losses = [float(step(model, optimizer, images, labels)) for _ in range(60)]
    assert traced == 1
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    model.eval()
    module.load_state_dict(to_state_dict(model, module, rules=ported.rules))
    with torch.no_grad():
        want = module.eval()(x).numpy()
    np.testing.assert_allclose(model(images), want, atol=1e-5)


def test_a_fresh_model_of_the_class_starts_as_torch_starts_and_trains() -> None:
    ported = port(Net(), torch.randn(2, 3, 8, 8))
    fresh = type(ported.model)(rngs=nnx.Rngs(1))
    bound = np.sqrt(1 / 27)
    kernel = np.asarray(fresh.conv.kernel[...])
    assert np.abs(kernel).max() <= bound
    assert np.abs(kernel).max() > 0.9 * bound
    assert np.isfinite(fresh(jnp.ones((2, 8, 8, 3)))).all()


# --- what has no translation in training --------------------------------------------------------------------


class Shuffled(nn.Module):
    """Layer drop by a random number of Python, which no recording shows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training and self.drops() else self.fc(x)

    def drops(self) -> bool:
        return random.random() < 1e-9


class ShuffledByNumPy(Shuffled):
    def drops(self) -> bool:
        return np.random.rand() < 1e-9


class ShuffledByItsOwn(Shuffled):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def drops(self) -> bool:
        return self.generator.random() < 1e-9


class ShuffledByTorch(Shuffled):
    def drops(self) -> bool:
        return bool(torch.rand(1) < 1e-9)


class Averaged(nn.Module):
    """A buffer that training writes to through ``.data``, which torch does not count."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(3, 3), how
        self.register_buffer("mean", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if self.training:
            given = {"mul_": (0.5,), "copy_": (y.detach().mean(0),), "__setitem__": (0, y.detach().mean())}
            getattr(self.mean.data, self.how)(*given[self.how])
        return y - self.mean


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(self.fc(x))[0] if self.training else self.fc(x)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Shuffled(), "Python's module random"),
        (ShuffledByNumPy(), "numpy.random"),
        (ShuffledByItsOwn(), "the attribute generator"),
        (ShuffledByTorch(), "asks for values"),
        (Averaged("mul_"), "forward changes the buffer 'mean'"),
        (Averaged("copy_"), "forward changes the buffer 'mean'"),
        (Averaged("__setitem__"), "forward changes the buffer 'mean'"),
        (Unseen(), "torch.linalg.qr"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_translation_in_training_evaluates_only_and_says_why(
    module: nn.Module, reason: str
) -> None:
    x = torch.randn(2, 3, 8, 8) if isinstance(module, Net) else torch.randn(2, 3)
    ported = port(module, x)
    assert any(note.startswith("evaluation only: ") and reason in note for note in ported.notes)
    assert "evaluation only" in ported.source.partition("import")[0]
    ported.model.train()
    images = jnp.asarray(x.permute(0, 2, 3, 1).numpy()) if x.dim() == 4 else jnp.asarray(x.numpy())
    with pytest.raises(NotImplementedError, match=r"evaluates only.*model\.eval\(\)"):
        ported.model(images)
    with pytest.raises(PortError, match=reason):
        port(module, x, training="required")


def test_recording_leaves_the_random_numbers_of_the_program_as_they_are() -> None:
    modules, x = [Shuffled(), ShuffledByNumPy(), Net()], torch.randn(2, 3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for module in modules:
        port(module, x[:, :, None, None].expand(2, 3, 8, 8) if isinstance(module, Net) else x)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


class AlwaysDrops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5)


def test_dropout_that_stays_on_in_evaluation_is_refused() -> None:
    with pytest.raises(PortError, match=r"training=self\.training"):
        port(AlwaysDrops(), torch.randn(2, 3))
    with pytest.raises(PortError, match="'drop' is in training mode while the model is in evaluation mode"):
        port(StaysInTraining(), torch.randn(2, 3))


class StaysInTraining(nn.Module):
    """Monte Carlo dropout by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> "StaysInTraining":
        super().train(mode)
        self.drop.train()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x)


def test_training_is_not_looked_at_where_nobody_asks_for_it() -> None:
    ported = port(Auxiliary(), torch.randn(2, 3, 8, 8), training="none")
    assert ported.notes == ("evaluation only: training was not asked for",)
    assert not hasattr(ported.model, "aux")


def test_parameters_that_torch_does_not_train_are_named() -> None:
    module = Net()
    module.conv.weight.requires_grad = False
    assert port(module, torch.randn(2, 3, 8, 8)).notes == (
        "training that leaves conv.weight as it is: torch does not train it",
    )


class Frozen(nn.Module):
    """One batch norm of two stays in evaluation mode, in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.body(x))

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.body[1].eval()
        return self


@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_a_batch_norm_that_stays_in_evaluation_mode_does_so_in_the_port(to: Literal["nnx", "linen"]) -> None:
    torch.manual_seed(0)
    net, x = Frozen(), torch.randn(4, 3, 8, 8)
    net.body[1].running_mean.add_(1.0)
    ported = port(net, x, to=to)
    assert not any("evaluation only" in note for note in ported.notes)
    wanted = net.train()(x).detach().permute(0, 2, 3, 1).numpy()
    images = jnp.asarray(x.permute(0, 2, 3, 1).numpy())
    if to == "nnx":
        ported.model.train()
        found, model = ported.model(images), ported.model
    else:
        module, variables = ported.model
        found, changed = module.apply(variables, images, train=True, mutable=["batch_stats"])
        model = {**variables, **changed}
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    state = to_state_dict(model, net, rules=ported.rules)
    torch.testing.assert_close(state["body.1.running_mean"], net.body[1].running_mean, rtol=0, atol=0)
    torch.testing.assert_close(state["bn.running_mean"], net.bn.running_mean)


class AveragesAll(nn.Module):
    """A batch norm that averages over all batches that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).relu()


@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_a_batch_norm_without_momentum_evaluates_only(to: Literal["nnx", "linen"]) -> None:
    x = torch.randn(2, 3, 4, 4)
    [note] = port(AveragesAll(), x, to=to).notes  # which is proved
    assert note.startswith("evaluation only: 'norm' has momentum=None, which averages over all batches")
    with pytest.raises(PortError, match="momentum=None"):
        port(AveragesAll(), x, to=to, training="required")
    assert not port(AveragesAll(), x, to=to, training="none", verify=False).source.count("momentum")
