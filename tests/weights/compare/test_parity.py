"""Parity: planted mistakes are found by name, on nnx and linen, and a right model is within rounding."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.weights.compare import planted
from tests.weights.compare.planted import FLATTEN, Setup
from torchjax_bridge import errors, parity, to_flax
from torchjax_bridge.weights import Flatten, LayerType, layers

# Mistakes are planted here on purpose; that `to_flax` warns of those it can see is the audit's test.
pytestmark = pytest.mark.filterwarnings("ignore::torchjax_bridge.weights.SettingsWarning")

FLAVOURS = ["nnx", "linen"]
RIGHT = Setup()


@pytest.fixture(scope="module")
def module() -> planted.Net:
    return planted.net()


# --- planted mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_right_model_agrees_in_every_layer_to_rounding(module: planted.Net, flavour: str) -> None:
    found = parity(module, planted.twin(flavour, module, RIGHT), planted.image(), rules=FLATTEN)
    assert found.ok, str(found)
    assert found.first is None
    assert found.cause is None
    assert [row.torch_path for row in found.rows] == ["conv", "bn", "fc1", "fc2", "norm", "head", ""]
    assert all(row.relative < 2e-6 for row in found.rows)
    assert found.max_difference < 2e-6
    assert not [fault for fault in found.settings if fault.effect == "output"]


@dataclass(frozen=True)
class Mistake:
    kind: str
    where: str
    changes: dict[str, Any]
    says: str = ""
    rules: Any = FLATTEN


MISTAKES = {
    "SAME for a number": Mistake("padding", "'conv'", {"padding": "SAME"}, "padding=((1, 1), (1, 1))"),
    "no padding": Mistake(
        "padding", "'conv'", {"padding": "VALID", "pool": ((1, 1), (1, 1))}, "padding='VALID'"
    ),
    "epsilon": Mistake("epsilon", "'bn'", {"epsilon": 1e-3}, "eps=1e-05"),
    "epsilon, far behind": Mistake("epsilon", "'norm'", {"last_epsilon": 1e-3}, "epsilon=0.001"),
    "train mode": Mistake("train mode", "'bn'", {"train": True}),
    "no activation": Mistake(
        "activation", "'bn'", {"relu": lambda x: x}, "torch applies relu and Flax does not"
    ),
    "another activation": Mistake(
        "activation", "'bn'", {"relu": jax.nn.silu}, "torch applies relu, Flax silu"
    ),
    "pooling": Mistake("pooling", "'pool' (MaxPool2d)", {"pool": "SAME"}, "padding=((1, 1), (1, 1))"),
    "gelu": Mistake("gelu", "'fc1'", {"gelu": jax.nn.gelu}, "gelu(approximate=False)"),
    "no gelu": Mistake(
        "activation", "'fc1'", {"gelu": lambda x: x}, "torch applies gelu(approximate=False) and"
    ),
    "channels first, kernel for last": Mistake(
        "flatten order", "'fc1'", {"front": True}, 'Flatten("fc1", None)'
    ),
    "channels last, kernel for first": Mistake(
        "flatten order", "'fc1'", {}, 'Flatten("fc1", (4, 2, 3))', [Flatten("fc1", None)]
    ),
    "crossed calls": Mistake("swapped siblings", "'fc2'", {"crossed": True}, "what torch gives to 'fc1'"),
    "dropout": Mistake("dropout", "'fc2'", {"rate": 0.3}, "a dropout of rate 0.3 is active in Flax"),
    "no residual": Mistake("residual", "'norm'", {"residual": False}, "torch adds the input of 'fc2'"),
    "scale": Mistake("scale", "'fc2'", {"scale": 4.0}, "4 times torch's values"),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_planted_mistake_is_named_and_proved(module: planted.Net, flavour: str, mistake: Mistake) -> None:
    model = planted.twin(flavour, module, replace(RIGHT, **mistake.changes), mistake.rules)
    found = parity(module, model, planted.image(), rules=mistake.rules)
    assert not found.ok
    assert found.first is not None
    assert found.cause is not None
    assert found.cause.kind == mistake.kind, str(found)
    assert found.cause.proved
    assert mistake.where in found.cause.message
    assert mistake.says in f"{found.cause.message} {found.cause.fix}"


Change = Callable[[dict[str, Any]], dict[str, Any]]

WRONG_WEIGHTS: dict[str, tuple[str, str, Change]] = {
    "exchanged layers": (
        "swapped siblings",
        "'fc1.kernel' of 'fc1' holds torch's 'fc2.weight'",
        lambda w: {"fc1.kernel": w["fc2.kernel"], "fc2.kernel": w["fc1.kernel"]},
    ),
    "mean and variance": (
        "swapped siblings",
        "holds torch's 'bn.running_var', where 'bn.running_mean' belongs",
        lambda w: {"bn.mean": w["bn.var"], "bn.var": w["bn.mean"]},
    ),
    "not transposed": (
        "transposed kernel",
        "'fc2.kernel' of 'fc2' holds torch's 'fc2.weight' with the axes (1, 0)",
        lambda w: {"fc2.kernel": w["fc2.kernel"].T},
    ),
    "height and width": (
        "transposed kernel",
        "'conv.kernel' of 'conv' holds torch's 'conv.weight' with the axes (1, 0, 2, 3)",
        lambda w: {"conv.kernel": w["conv.kernel"].transpose(1, 0, 2, 3)},
    ),
    "turned": (
        "transposed kernel",
        "turned by 180 degrees",
        lambda w: {"conv.kernel": w["conv.kernel"][::-1, ::-1]},
    ),
    "rows": (
        "flatten order",
        "'fc1.kernel' of 'fc1' holds torch's 'fc1.weight' with its rows in another order",
        lambda w: {"fc1.kernel": w["fc1.kernel"].reshape(6, 4, 24).swapaxes(0, 1).reshape(24, 24)},
    ),
    "untrained": (
        "weights",
        "'fc2.bias' of 'fc2' is not torch's 'fc2.bias': they differ by up to 1",
        lambda w: {"fc2.bias": w["fc2.bias"] + 1},
    ),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("mistake", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_wrong_weights_are_recognised_for_what_they_are(
    module: planted.Net, flavour: str, mistake: Any
) -> None:
    kind, says, change = mistake
    model = planted.twin(flavour, module, RIGHT)
    model = planted.with_weights(model, change(planted.weights(model)))
    found = parity(module, model, planted.image(), rules=FLATTEN)
    assert found.cause is not None
    assert found.cause.kind == kind, str(found)
    assert says in found.cause.message.replace("params.", "").replace("batch_stats.", "")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_mistake_in_the_torch_model_is_named_too(flavour: str) -> None:
    module = planted.net()
    model = planted.twin(flavour, module, RIGHT)
    module.drop.train()
    found = parity(module, model, planted.image(), rules=FLATTEN)
    assert found.cause is not None
    assert found.cause.kind == "dropout"
    assert "a dropout of rate 0.5 is active in torch" in found.cause.message
    module.eval()
    module.bn.train()
    found = parity(module, model, planted.image(), rules=FLATTEN)
    assert found.cause is not None
    assert found.cause.kind == "train mode"
    assert "the batch's statistics in torch" in found.cause.message or "training=True" in found.cause.message


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_active_dropouts_are_said_to_draw_their_own_masks(flavour: str) -> None:
    module = planted.net()
    module.drop.train()
    found = parity(
        module, planted.twin(flavour, module, replace(RIGHT, rate=0.5)), planted.image(), rules=FLATTEN
    )
    assert found.cause is not None
    assert (found.cause.kind, found.first.torch_path if found.first else None) == ("dropout", "fc2")
    assert "each draws a mask of its own" in found.cause.message


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"epsilon": 1e-5, "use_fast_variance": False}, ""),
        ({"epsilon": 1e-5, "use_fast_variance": False, "num_groups": 4}, "num_groups"),
        ({"epsilon": 1e-2, "use_fast_variance": False, "num_groups": 2}, "epsilon"),
        ({"epsilon": 1e-5, "use_fast_variance": True, "num_groups": 2}, "use_fast_variance"),
        ({"epsilon": 1.1e-5, "use_fast_variance": True, "num_groups": 4}, "num_groups"),
    ],
)
def test_the_setting_that_matters_is_proved_among_those_that_differ(
    flavour: str, settings: dict[str, Any], kind: str
) -> None:
    torch.manual_seed(0)
    module, x = nn.GroupNorm(2, 8), torch.randn(3, 8, 5, 5) + (0 if kind != "use_fast_variance" else 1000)
    settings = {"num_groups": 2, **settings}
    if flavour == "nnx":
        model = to_flax(module, nnx.eval_shape(lambda: nnx.GroupNorm(8, **settings, rngs=nnx.Rngs(0))))
    else:
        linen = ln.GroupNorm(**settings)
        model = linen, to_flax(module, jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 5, 5, 8))))
    found = parity(module, model, x)
    assert (found.cause.kind if found.cause else "") == kind, str(found)
    assert found.cause is None or found.cause.proved


class NnxDoubled(nnx.BatchNorm):
    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return 2 * super().__call__(x, *args, **kwargs)


class LinenDoubled(ln.BatchNorm):
    @ln.compact
    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return 2 * super().__call__(x, *args, **kwargs)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_setting_that_differs_and_does_not_matter_is_not_the_cause(flavour: str) -> None:
    module, x = nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 5, 5)
    settings = {"momentum": 0.99, "epsilon": 1.1e-5, "use_running_average": True}
    if flavour == "nnx":
        template = nnx.eval_shape(lambda: NnxDoubled(4, **settings, rngs=nnx.Rngs(0)))
        model = to_flax(module, template, rules=[LayerType("", nn.BatchNorm2d)])
    else:
        linen = LinenDoubled(**settings)
        model = linen, to_flax(module, jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 5, 5, 4))))
    found = parity(module, model, x)
    assert [fault.setting for fault in found.settings] == ["epsilon", "momentum"]
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("overridden call", True), str(found)
    assert "Doubled in Flax, which has a __call__ of its own" in found.cause.message


# --- a step of training --------------------------------------------------------------------------------


def _trained(flavour: str, momentum: float, *, ours: bool) -> Any:
    """A batch norm of either flavour, in training."""
    torch.manual_seed(0)
    module = nn.BatchNorm2d(4)
    module.running_mean.normal_()
    library = (
        layers.nnx if ours and flavour == "nnx" else layers.linen if ours else nnx if flavour == "nnx" else ln
    )
    settings = {
        "momentum": momentum,
        "epsilon": 1e-5,
        "use_running_average": False,
        "use_fast_variance": False,
    }
    if flavour == "nnx":
        model = to_flax(module, nnx.eval_shape(lambda: library.BatchNorm(4, **settings, rngs=nnx.Rngs(0))))
    else:
        linen = library.BatchNorm(**settings)
        model = linen, to_flax(module, jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 5, 5, 4))))
    return parity(module, model, torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_wrong_momentum_shows_in_the_statistics_after_a_step(flavour: str) -> None:
    found = _trained(flavour, 0.99, ours=True)
    assert found.first is not None
    assert found.first.layer == "BatchNorm2d running_mean"
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("momentum", True)
    assert "by 0.1 times torch's step" in found.cause.message
    assert found.max_difference < 1e-5


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_flaxs_own_running_variance_is_found_and_our_layer_mends_it(flavour: str) -> None:
    found = _trained(flavour, 0.9, ours=False)
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("running variance", True)
    assert f"weights.layers.{flavour}.BatchNorm" in found.cause.fix
    assert _trained(flavour, 0.9, ours=True).ok


# --- nothing is changed --------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_both_models_are_afterwards_what_they_were(flavour: str) -> None:
    module = planted.net().train()
    model = planted.twin(flavour, module, replace(RIGHT, train=True, rate=0.5))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    arrays = {name: np.asarray(value) for name, value in planted.weights(model).items() if "rngs" not in name}
    streams = {name: value for name, value in planted.weights(model).items() if "rngs" in name}
    random = torch.random.get_rng_state()
    parity(module, model, planted.image(), rules=FLATTEN)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    after = planted.weights(model)
    assert all(np.array_equal(np.asarray(after[name]), value) for name, value in arrays.items())
    assert all(bool((after[name] == value).all()) for name, value in streams.items())
    if flavour == "nnx":
        assert type(model) is planted.NnxNet
        assert type(model.conv) is nnx.Conv
        assert not hasattr(model.conv, "_torchjax_bridge_recorded_as")


def test_hooks_and_buffers_are_put_back_when_the_model_raises() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.bn(x)
            raise RuntimeError("out of luck")

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.bn = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.bn(x)

    module = Net()
    with pytest.raises(RuntimeError, match="out of luck"):
        parity(module, Nnx(nnx.Rngs(0)), torch.randn(3, 4))
    assert not module.bn._forward_hooks
    assert bool((module.bn.running_mean == 0).all())
    assert int(module.bn.num_batches_tracked) == 0
    assert torch.backends.mha.get_fastpath_enabled()


# --- how layers are called -----------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.fc(x).relu()).relu())


class NnxShared(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, calls: int) -> None:
        self.calls = calls
        self.fc, self.head = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.calls):
            x = nnx.relu(self.fc(x))
        return self.head(x)


class LinenShared(ln.Module):
    calls: int

    def setup(self) -> None:
        self.fc, self.head = ln.Dense(3), ln.Dense(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.calls):
            x = ln.relu(self.fc(x))
        return self.head(x)


def _shared(flavour: str, module: nn.Module, calls: int) -> Any:
    if flavour == "nnx":
        return to_flax(module, nnx.eval_shape(lambda: NnxShared(nnx.Rngs(0), calls)))
    linen = LinenShared(calls)
    return linen, to_flax(module, jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 3))))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_layer_that_is_called_twice_is_compared_call_by_call(flavour: str) -> None:
    module = Shared()
    found = parity(module, _shared(flavour, module, 2), torch.randn(4, 3))
    assert found.ok, str(found)
    assert [(row.torch_path, row.call) for row in found.rows[:3]] == [("fc", 0), ("fc", 1), ("head", 0)]
    assert "fc [1]" in str(found)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_call_that_is_missing_is_the_cause(flavour: str) -> None:
    module = Shared()
    found = parity(module, _shared(flavour, module, 1), torch.randn(4, 3))
    assert [row.ok for row in found.rows] == [True, None, False, False]
    assert found.cause is not None
    assert found.cause.kind == "calls"
    assert "'fc' (Linear) is called 2 times in torch and 1 time in Flax" in found.cause.message


def test_a_torch_layer_under_two_names_is_compared_with_both_of_its_twins() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.b = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(nnx.relu(self.a(x)))

    module = Tied()
    found = parity(module, to_flax(module, Nnx(nnx.Rngs(0))), torch.randn(4, 3))
    assert found.ok, str(found)
    assert [row.flax_path for row in found.rows] == ["a", "b", ""]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class NnxScan(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.vmap(lambda rngs: nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.tanh))
        self.blocks = make(rngs.split(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class LinenScan(ln.Module):
    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Body(ln.Module):
            @ln.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return jnp.tanh(ln.Dense(3, name="layers_0")(x)), None

        body = ln.remat(Body)
        scan = ln.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(name="blocks")(x, None)[0]


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_runs_inside_a_scan_is_compared_layer_by_layer(flavour: str) -> None:
    module = Stack()
    if flavour == "nnx":
        model: Any = to_flax(module, NnxScan(nnx.Rngs(0)))
    else:
        linen = LinenScan()
        model = linen, to_flax(module, linen.init(jax.random.key(0), jnp.zeros((1, 3))))
    found = parity(module, model, torch.randn(4, 3))
    assert found.ok, str(found)
    linears = [row for row in found.rows if row.layer == "Linear"]
    assert [row.torch_path for row in linears] == [f"blocks.{number}.0" for number in range(4)]
    module.blocks[1][0].weight.data.mul_(2)
    wrong = parity(module, model, torch.randn(4, 3))
    assert wrong.first is not None
    assert wrong.first.torch_path == "blocks.1.0"


def test_a_scan_that_admits_no_effects_is_recorded_through_its_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # flax 0.12.12 raises this of any effect in the body of a linen scan.
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("broadcasted variable has a data dependency on the scan body.")

    monkeypatch.setattr(jax.debug, "callback", refuse)
    module, linen = Stack(), LinenScan()
    variables = to_flax(module, linen.init(jax.random.key(0), jnp.zeros((1, 3))))
    found = parity(module, (linen, variables), torch.randn(4, 3))
    assert found.ok, str(found)
    linears = [row for row in found.rows if row.layer == "Linear"]
    assert [row.torch_path for row in linears] == [f"blocks.{number}.0" for number in range(4)]
    assert all(row.ok for row in linears)


def test_jitted_parts_of_an_nnx_model_are_recorded_in_every_run() -> None:
    class Nnx(NnxShared):
        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.jit(NnxShared.__call__)(self, x)

    module = Shared()
    model = to_flax(module, Nnx(nnx.Rngs(0), 2))
    for _ in range(2):
        found = parity(module, model, torch.randn(4, 3))
        assert found.ok
        assert [row.torch_path for row in found.rows] == ["fc", "fc", "head", ""]


def test_jitted_parts_of_a_linen_model_are_recorded_in_every_run() -> None:
    compiled = ln.jit(LinenShared)

    class Linen(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return compiled(2, name="body")(x)

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Shared()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    module, linen, x = Torch(), Linen(), torch.randn(4, 3)
    variables = to_flax(module, linen.init(jax.random.key(0), jnp.zeros((1, 3))))
    linen.apply(variables, jnp.zeros((4, 3)))  # compiled without being watched
    for _ in range(2):
        found = parity(module, (linen, variables), x)
        assert found.ok
        assert [row.torch_path for row in found.rows] == ["body.fc", "body.fc", "body.head", "body", ""]


# --- kinds of inputs and outputs -------------------------------------------------------------------------


class Tagger(nn.Module):
    """Integers in, a recurrent layer, a mapping out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor, *, scale: float) -> dict[str, Any]:
        x, (h, _) = self.lstm(self.embed(tokens))
        x, _ = self.attend(x, x, x)
        return {"logits": self.head(x) * scale, "state": (h[0], tokens + 1)}


class NnxTagger(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 3, rngs=rngs)
        self.lstm = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs), return_carry=True, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, scale: float) -> dict[str, Any]:
        (_, h), x = self.lstm(self.embed(tokens))
        return {"logits": self.head(self.attend(x)) * scale, "state": (h, tokens + 1)}


class LinenTagger(ln.Module):
    @ln.compact
    def __call__(self, tokens: jax.Array, *, scale: float) -> dict[str, Any]:
        cell = ln.LSTMCell(4, name="lstm")
        (_, h), x = ln.RNN(cell, return_carry=True)(ln.Embed(7, 3, name="embed")(tokens))
        x = ln.MultiHeadDotProductAttention(2, name="attend")(x)
        return {"logits": ln.Dense(2, name="head")(x) * scale, "state": (h, tokens + 1)}


@pytest.mark.every(2)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_integers_sequences_keywords_and_trees_are_compared(flavour: str, scale: float) -> None:
    torch.manual_seed(0)
    module = Tagger()
    tokens = torch.randint(7, (2, 5))
    if flavour == "nnx":
        model: Any = to_flax(module, nnx.eval_shape(lambda: NnxTagger(nnx.Rngs(0))))
    else:
        linen = LinenTagger()
        shapes = jax.eval_shape(
            lambda key, x: linen.init(key, x, scale=1.0), jax.random.key(0), tokens.numpy()
        )
        model = linen, to_flax(module, shapes)
    found = parity(module, model, tokens, torch_kwargs={"scale": scale}, flax_kwargs={"scale": 1.0})
    assert [row.torch_path for row in found.rows] == ["embed", "lstm", "attend", "head", ""]
    assert [row.ok for row in found.rows[:-1]] == [True] * 4, str(found)
    assert found.ok == (scale == 1.0)
    if not found.ok:
        assert found.cause is not None
        assert (found.cause.kind, found.cause.proved) == ("scale", True)


def test_a_layer_that_is_no_module_of_its_own_in_flax_is_said_not_to_be_compared() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    class LinenBoth(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            ways = [ln.RNN(ln.OptimizedLSTMCell(4)) for _ in range(2)]
            return ln.Dense(2, name="head")(ln.Bidirectional(*ways)(x))

    module, linen = Both(), LinenBoth()
    x = torch.randn(2, 5, 3)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), x.numpy())
    found = parity(module, (linen, to_flax(module, shapes)), x)
    assert found.ok
    assert [row.ok for row in found.rows] == [None, True, True]
    title, _, lstm, *_ = str(found).splitlines()
    assert title.startswith("parity: 2 outputs agree and 1 cannot be compared, ")
    assert "(output)" not in lstm
    assert found.notes == (
        "'lstm' (LSTM) is not called as one module in Flax: its own output is not compared",
    )


def test_a_square_image_of_as_many_channels_is_laid_out_by_its_values() -> None:
    class Front(nnx.Module):
        """Takes its channels in front, as torch does."""

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(4, 4, (1, 1), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.conv(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    module, x = nn.Sequential(nn.Conv2d(4, 4, 1)), torch.randn(4, 4, 4, 4)
    last = to_flax(module, nnx.Sequential(nnx.Conv(4, 4, (1, 1), rngs=nnx.Rngs(0))))
    front = to_flax(module, Front(nnx.Rngs(0)))
    assert parity(module, last, x).ok
    assert parity(module, front, x).ok
    assert not parity(module, last, x, channels_last=False).ok
    assert not parity(module, front, x, channels_last=[True]).ok


def test_sequences_for_a_convolution_over_time_go_in_with_channels_last() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1))
    model = to_flax(module, nnx.Sequential(nnx.Conv(3, 4, (3,), padding=1, rngs=nnx.Rngs(0))))
    found = parity(module, model, torch.randn(2, 3, 9))
    assert found.ok
    assert "channels last" in found.notes[0]


def test_the_difference_is_taken_for_rounding_within_the_bounds_that_are_said(module: planted.Net) -> None:
    model = planted.twin("nnx", module, replace(RIGHT, epsilon=1e-3))
    found = parity(module, model, planted.image(), rules=FLATTEN)
    worst = max(row.relative for row in found.rows)
    assert not found.ok
    assert parity(module, model, planted.image(), rules=FLATTEN, rtol=worst * 1.01).ok
    assert not parity(module, model, planted.image(), rules=FLATTEN, rtol=worst * 0.9).ok
    largest = max(row.difference for row in found.rows)
    assert parity(module, model, planted.image(), rules=FLATTEN, atol=largest * 1.01).ok


def test_a_flax_model_that_raises_is_explained_by_the_layers_that_ran(module: planted.Net) -> None:
    model = planted.twin("nnx", module, replace(RIGHT, pool="VALID"))
    found = parity(module, model, planted.image(), rules=FLATTEN)
    assert found.first is not None
    assert (found.first.torch_path, found.first.note) == ("fc1", "raised TypeError")
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("shape", False)
    assert any("the Flax model raised TypeError" in note for note in found.notes)


# --- what is refused -----------------------------------------------------------------------------------


def test_inputs_that_a_model_does_not_take_are_refused(module: planted.Net) -> None:
    model = planted.twin("nnx", module, RIGHT)
    with pytest.raises(errors.ArgumentError, match=r"the torch model takes .* and was given 2 inputs"):
        parity(module, model, planted.image(), planted.image(), rules=FLATTEN)
    with pytest.raises(errors.ArgumentError, match=r"the torch model takes .* and was given 0 inputs"):
        parity(module, model, rules=FLATTEN)
    with pytest.raises(errors.ArgumentError, match=r"the Flax model takes .* and train"):
        parity(module, model, planted.image(), rules=FLATTEN, flax_kwargs={"train": False})
    with pytest.raises(errors.ArgumentError, match="hold an ndarray, and the torch model takes tensors"):
        parity(module, model, planted.image().numpy(), rules=FLATTEN)
    with pytest.raises(errors.ArgumentError, match="channels_last says 2 things about 1 inputs"):
        parity(module, model, planted.image(), rules=FLATTEN, channels_last=[True, False])


def test_what_cannot_run_is_refused(module: planted.Net) -> None:
    linen, variables = planted.twin("linen", module, RIGHT)
    with pytest.raises(errors.SettingsError, match="pass the live nn"):
        parity(module.state_dict(), (linen, variables), planted.image())
    with pytest.raises(errors.SettingsError, match="without its variables"):
        parity(module, linen, planted.image())
    with pytest.raises(errors.SettingsError, match="no live Flax model"):
        parity(module, variables, planted.image())
    with pytest.raises(errors.SettingsError, match="an abstract Flax model"):
        parity(module, nnx.eval_shape(lambda: planted.NnxNet(RIGHT, nnx.Rngs(0))), planted.image())
    with pytest.raises(errors.PlanError):
        parity(nn.Linear(2, 2), (linen, variables), planted.image())


def test_a_wrapped_torch_model_is_looked_through(module: planted.Net) -> None:
    found = parity(
        nn.DataParallel(module), planted.twin("nnx", module, RIGHT), planted.image(), rules=FLATTEN
    )
    assert found.ok
    assert found.rows[0].torch_path == "conv"


def test_the_table_shows_every_row_the_cause_and_the_settings(module: planted.Net) -> None:
    model = planted.twin("nnx", module, replace(RIGHT, epsilon=1e-3))
    text = str(parity(module, model, planted.image(), rules=FLATTEN))
    lines = text.splitlines()
    assert lines[0].startswith("parity: the models differ, by up to ")
    assert lines[1].split() == ["layer", "torch", "Flax", "shape", "difference", "relative"]
    assert [line.split()[0] for line in lines[2:9]] == ["ok", "first", *["differs"] * 5]
    assert lines[9].startswith(
        "  cause: epsilon: 'bn' (BatchNorm2d) has eps=1e-05 in torch and epsilon=0.001 in Flax"
    )
    assert lines[10].startswith(
        "  setting: eps=1e-05 in torch, epsilon=0.001 in Flax; type BatchNorm(..., epsilon="
    )


@pytest.mark.gpu
def test_on_a_gpu_products_are_exact_and_the_flags_of_torch_are_put_back() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3)).cuda()
    settings = {"kernel_size": (3, 3), "padding": "VALID"}

    def twin() -> nnx.Sequential:
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Conv(8, 32, **settings, rngs=rngs), nnx.Conv(32, 32, **settings, rngs=rngs))

    owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [owner.fp32_precision for owner in owners]
    found = parity(module, to_flax(module, nnx.eval_shape(twin)), torch.randn(4, 8, 32, 32, device="cuda"))
    assert found.ok, str(found)
    assert [owner.fp32_precision for owner in owners] == before


@pytest.mark.parametrize("length", [5, 2])
def test_a_sequence_whose_batch_comes_second_in_torch_is_compared(length: int) -> None:
    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, L, C)
            return self.head(self.gru(x.transpose(0, 1))[0]).transpose(0, 1)

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.gru = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.gru(x))

    module = Torch()
    model = to_flax(module, nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
    found = parity(module, model, torch.randn(2, length, 3))
    assert found.ok, str(found)
    assert [row.torch_path for row in found.rows] == ["gru", "head", ""]


def test_half_precision_is_compared_within_its_own_rounding(module: planted.Net) -> None:
    half = planted.net().bfloat16()
    model = planted.twin("nnx", half, RIGHT)
    assert parity(half, model, planted.image().bfloat16(), rules=FLATTEN).ok
    wrong = planted.twin("nnx", half, replace(RIGHT, relu=lambda x: x))
    found = parity(half, wrong, planted.image().bfloat16(), rules=FLATTEN)
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("activation", True)


def test_an_input_that_cannot_cross_is_named() -> None:
    module = nn.Linear(2, 2).double()
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with jax.enable_x64(False), pytest.raises(errors.DtypeError, match="input 0"):
        parity(module, model, torch.ones(1, 2, dtype=torch.float64))


# --- maps that are made of vectors ---------------------------------------------------------------------


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(5, 24), nn.BatchNorm1d(24))
        self.up = nn.ConvTranspose2d(4, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.fc(x).relu().view(-1, 4, 2, 3))


class NnxGenerator(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, front: bool) -> None:
        norm = nnx.BatchNorm(24, momentum=0.9, use_fast_variance=False, rngs=rngs)
        self.fc = nnx.Sequential(nnx.Linear(5, 24, rngs=rngs), norm)
        self.up = nnx.ConvTranspose(4, 3, (2, 2), padding="VALID", transpose_kernel=True, rngs=rngs)
        self.front = front

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.fc(x))
        return self.up(x.reshape(-1, 4, 2, 3).transpose(0, 2, 3, 1) if self.front else x.reshape(-1, 2, 3, 4))


@pytest.mark.every(2)
@pytest.mark.parametrize("front", [True, False], ids=["channels first", "channels last"])
@pytest.mark.parametrize("features", [None, (4, 2, 3)])
def test_a_map_made_of_a_vector_agrees_as_it_was_said_and_its_order_is_named_as_it_was_not(
    front: bool, features: tuple[int, ...] | None
) -> None:
    torch.manual_seed(0)
    module = Generator().eval()
    rules = [Flatten("fc.0", features, output=True), Flatten("fc.1", features)]
    twin = to_flax(module, nnx.eval_shape(lambda: NnxGenerator(nnx.Rngs(0), front=front)), rules=rules)
    twin.eval()
    found = parity(module, twin, torch.randn(4, 5), rules=rules)
    if front == (features is None):
        assert found.ok, str(found)
        return
    assert found.cause is not None
    assert found.first is not None
    assert (found.cause.kind, found.cause.proved, found.first.torch_path) == ("flatten order", True, "up")
    wanted = "(4, 2, 3)" if features is None else "None"
    assert f'Flatten("fc.0", {wanted}, output=True)' in found.cause.fix


class _ChannelNorm(nn.LayerNorm):
    """A norm over the channels of an image, as ConvNeXt has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _NnxChannelNorm(nnx.Module):
    def __init__(self, epsilon: float) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(
            [
                nnx.Conv(3, 6, (3, 3), padding="VALID", rngs=rngs),
                nnx.LayerNorm(6, epsilon=epsilon, rngs=rngs),
                nnx.Conv(6, 2, (1, 1), rngs=rngs),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("space", [(10, 12), (8, 8)])
def test_a_norm_whose_forward_moves_the_channels_is_compared_where_flax_has_them(
    space: tuple[int, int],
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), _ChannelNorm(6), nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(2, 3, *space, generator=torch.manual_seed(0))
    rules = [LayerType("1", nn.LayerNorm)]
    assert parity(module, to_flax(module, _NnxChannelNorm(1e-5), rules=rules), x).ok
    found = parity(module, to_flax(module, _NnxChannelNorm(1e-1), rules=rules), x)
    assert not found.ok
    assert found.cause is not None
    assert "epsilon" in str(found)


# --- right models whose layers do not lie alike ----------------------------------------------------------


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten())
        self.mean, self.spread = nn.Linear(54, 4), nn.Linear(54, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        return self.mean(x) + self.spread(x).exp()


class _NnxEncoder(nnx.Module):
    def __init__(self, activation: Callable[[jax.Array], jax.Array]) -> None:
        rngs = nnx.Rngs(0)
        conv = nnx.Conv(3, 6, (3, 3), padding="VALID", rngs=rngs)
        self.encoder = nnx.Sequential(conv, nnx.relu, lambda x: x.reshape(len(x), -1))
        self.mean, self.spread = (nnx.Linear(54, 4, rngs=rngs) for _ in range(2))
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.encoder(x)
        return self.mean(x) + self.activation(self.spread(x))


def test_a_container_that_ends_in_a_flatten_lies_as_its_readers_take_it() -> None:
    module, x = _Encoder().eval(), torch.randn(2, 3, 5, 5, generator=torch.manual_seed(0))
    rules = [Flatten(name, (6, 3, 3)) for name in ("mean", "spread")]
    found = parity(module, to_flax(module, _NnxEncoder(jnp.exp), rules=rules), x, rules=rules)
    assert found.ok, str(found)
    found = parity(module, to_flax(module, _NnxEncoder(jnp.sin), rules=rules), x, rules=rules)
    assert found.first is not None  # the mistake is not hidden behind the flatten
    assert found.first.torch_path == ""
    wrong = [Flatten(name, None) for name in ("mean", "spread")]
    cause = parity(module, to_flax(module, _NnxEncoder(jnp.exp), rules=wrong), x, rules=wrong).cause
    assert cause is not None
    assert cause.kind == "flatten order"
    assert 'Flatten("mean", (6, 3, 3))' in cause.fix  # a layer, which the rule can speak of


class _Causal(nn.Module):
    """Pads both sides, and cuts the end off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=4, dilation=2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x)[..., :-4].relu().mean(-1))


class _NnxCausal(nnx.Module):
    def __init__(self, **settings: Any) -> None:
        self.conv = nnx.Conv(
            3, 4, (3,), **{"padding": "CAUSAL", "kernel_dilation": 2, **settings}, rngs=nnx.Rngs(0)
        )
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.conv(x)).mean(1))


def test_a_causal_convolution_agrees_with_one_whose_end_torch_cuts_off() -> None:
    module, x = _Causal().eval(), torch.randn(2, 3, 9, generator=torch.manual_seed(0))
    found = parity(module, to_flax(module, _NnxCausal()), x)
    assert found.ok, str(found)
    for settings, kind in (({"kernel_dilation": 1}, "kernel_dilation"), ({"padding": "SAME"}, "padding")):
        cause = parity(module, to_flax(module, _NnxCausal(**settings)), x).cause
        assert cause is not None
        assert (cause.kind, cause.proved) == (kind, True)


class _Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tags = nn.EmbeddingBag(9, 4, mode="mean")
        self.head = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.tags(ids))


class _NnxBags(nnx.Module):
    def __init__(self, reduce: Callable[..., jax.Array]) -> None:
        self.tags = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        self.reduce = reduce

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.head(self.reduce(self.tags(ids), axis=1))


def test_a_bag_that_flax_reduces_behind_its_table_shows_in_the_layer_that_reads_it() -> None:
    module, ids = _Bags().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = parity(module, to_flax(module, _NnxBags(jnp.mean)), ids)
    assert found.ok, str(found)
    assert (found.rows[0].torch_path, found.rows[0].ok) == ("tags", None)
    found = parity(module, to_flax(module, _NnxBags(jnp.sum)), ids)
    assert found.first is not None
    assert found.first.torch_path == "head"


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)
        self.rnn = nn.LSTM(4, 3, num_layers=2, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.emb(ids))[0][:, -1])


class _NnxReader(nnx.Module):
    def __init__(self, turned: int) -> None:
        rngs = nnx.Rngs(0)
        self.emb = nnx.Embed(9, 4, rngs=rngs)
        self.rnn = nnx.List([nnx.RNN(nnx.LSTMCell(size, 3, rngs=rngs), rngs=rngs) for size in (4, 3)])
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.turned = turned

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.head(self.rnn[1](self.rnn[0](self.emb(ids))[:, :: self.turned])[:, -1])


def test_a_recurrent_layer_that_is_a_list_in_flax_is_not_said_to_be_left_out() -> None:
    module, ids = _Reader().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert parity(module, to_flax(module, _NnxReader(1)), ids).ok
    cause = parity(module, to_flax(module, _NnxReader(-1)), ids).cause
    assert cause is not None
    assert cause.kind != "calls"
    assert "'emb'" in cause.message
    assert "'head'" in cause.message
    assert "'rnn' (LSTM)" in cause.message
