"""A port to linen computes what torch computes, in both modes, and goes back and forth by its rules."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.port.cifar import BUILDERS
from tests.marking import slow_but
from torchjax_bridge import parity, port, to_flax, to_optax, to_state_dict
from torchjax_bridge.errors import ArgumentError, PortError

from .linen_models import MODELS, Residual
from .steps import furthest, linen_step, torch_step

_GOLDEN = Path(__file__).parent / "golden" / "residual_linen.py"
_FAST = "resnet20", "vgg"
_USUAL = "auxiliary", "kinds", "recurrent", "residual", "sequential"
_TRAINED = ("auxiliary", "derived", "lists", "residual", "sequential")


def _model(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    module = build().eval()
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif buffer_name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    return module, inputs


@pytest.mark.every(2)
@pytest.mark.parametrize("name", slow_but(_USUAL, MODELS))
def test_a_port_holds_and_its_weights_go_back(name: str) -> None:
    module, inputs = _model(name)
    ported = port(module, *inputs, to="linen", training="required")
    assert ported.proof is not None
    linen_module, variables = ported.model
    back = to_state_dict(variables, module, rules=ported.rules)
    assert set(back) == set(module.state_dict())
    assert all(torch.equal(tensor, back[key]) for key, tensor in module.state_dict().items())
    again = to_flax(module, variables, rules=ported.rules)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert "nnx" not in ported.source
    assert "torch." not in ported.source.partition('"""\n\n')[2]
    assert type(linen_module).__name__ == ported.name


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "name", slow_but(_USUAL, [name for name in MODELS if name not in ("language", "shared_embedding")])
)
def test_parity_compares_a_port_layer_by_layer(name: str) -> None:
    module, inputs = _model(name)
    ported = port(module, *inputs, to="linen", verify=False)
    found = parity(module, ported.model, *inputs, rules=ported.rules)
    assert found.ok, found
    assert len(found.rows) >= 1


@pytest.mark.every(2)
@pytest.mark.parametrize("name", slow_but(_USUAL, _TRAINED))
def test_a_step_of_training_is_that_of_torch(name: str) -> None:
    module, inputs = _model(name)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    module = module.double()  # the gradients of biases in front of a BatchNorm are rounding
    inputs = jax.tree.map(_double, inputs, is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))
    with jax.enable_x64(True):
        ported = port(module, *inputs, to="linen", training="required", exact_statistics=True)
        want, got = torch_step(module, *inputs), linen_step(ported, module, *inputs)
    assert len(want.outputs) == len(got.outputs)
    for one, two in zip(want.outputs, got.outputs, strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-6)
    assert furthest(got.gradients, want.gradients)[0] <= 1e-5
    if want.statistics:
        assert furthest(got.statistics, want.statistics)[0] <= 1e-6


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


@pytest.mark.parametrize("name", slow_but(["kinds"], ["depth", "kinds", "language", "residual"]))
def test_dropout_draws_from_the_stream_that_it_is_given_in_training_alone(name: str) -> None:
    module, inputs = _model(name)
    linen_module, variables = port(module, *inputs, to="linen", training="required").model
    arrays = jax.tree.map(_as_array, inputs, is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))

    def run(train: bool, seed: int) -> Any:
        output, _ = linen_module.apply(
            variables, *arrays, train=train, rngs={"dropout": jax.random.key(seed)}, mutable=["batch_stats"]
        )
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(output)])

    assert np.array_equal(run(False, 0), run(False, 1))
    assert np.array_equal(run(True, 0), run(True, 0))
    assert not np.array_equal(run(True, 0), run(True, 1))


@pytest.mark.slow
def test_an_optimizer_goes_on_with_the_port() -> None:
    module, inputs = _model("residual")
    optimizer = torch.optim.Adam(module.parameters())
    module(*inputs).sum().backward()
    optimizer.step()
    ported = port(module, *inputs, to="linen")
    variables = ported.model[1]
    tx = optax.adam(1e-3)
    start = tx.init(variables["params"])
    state = to_optax(optimizer, start, module=module, template=variables, rules=ported.rules, tx=tx)
    assert int(state[0].count) == 1
    moment = optimizer.state[module.head[1].weight]["exp_avg"]
    np.testing.assert_array_equal(state[0].mu["head"]["layers_1"]["kernel"], moment.T.numpy())


def test_weights_of_the_meta_device_give_a_template() -> None:
    with torch.device("meta"):
        ported = port(Residual(), torch.empty(2, 3, 8, 8), to="linen")
    shapes = jax.tree.leaves(ported.model[1])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)
    assert ported.proof is None


def test_a_branch_of_training_alone_has_weights_after_init() -> None:
    module, (x,) = _model("auxiliary")
    linen_module, variables = port(module, x, to="linen").model
    assert set(variables["params"]) == {"stem", "head", "auxiliary", "calibration"}
    first, second = linen_module.apply(variables, jnp.asarray(x.numpy()), train=True)
    assert (first.shape, second.shape) == ((3, 3), (3, 2))


def test_a_tied_weight_is_one_parameter() -> None:
    module, inputs = _model("language")
    variables = port(module, *inputs, to="linen").model[1]
    assert "head" not in variables["params"]
    module, inputs = _model("shared_embedding")
    assert set(port(module, *inputs, to="linen").model[1]["params"]) == {"source"}


def test_what_linen_cannot_do_is_refused_by_name() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.fc.bias

    with pytest.raises(PortError, match="bias of 'fc'"):
        port(Reader(), torch.randn(2, 3), to="linen")

    with pytest.raises(ArgumentError, match="module of nnx"):
        port(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3), to="linen", keep=["0"])
    unstable = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(PortError, match="no running statistics"):
        port(unstable, torch.randn(2, 3), to="linen")


def test_a_port_that_only_evaluates_says_so() -> None:
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.randint_like(x, 3) + x if self.training else self.fc(x)

    module = Sampler().eval()
    x = torch.randn(2, 3)
    ported = port(module, x, to="linen")
    linen_module, variables = ported.model
    assert "evaluation only" in ported.notes[0]
    with pytest.raises(NotImplementedError, match="leave train=False"):
        linen_module.apply(variables, jnp.asarray(x.numpy()), train=True)


def test_a_port_that_larger_images_do_not_fit_is_returned() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(F.avg_pool2d(x, x.size()[2:]).flatten(1))

    assert port(Pooled(), torch.randn(2, 3, 8, 8), to="linen").proof is not None


def test_a_wrong_port_is_not_returned() -> None:
    with pytest.raises(PortError, match="differs from torch"):
        port(
            nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
            torch.randn(2, 3),
            to="linen",
            ops={torch.tanh: "jnp.sin({0})"},
        )


def test_the_source_is_as_a_person_left_it() -> None:
    module, inputs = _model("residual")
    assert _code(port(module, *inputs, to="linen").source) == _code(_GOLDEN.read_text())


@pytest.mark.parametrize("tool", slow_but(["ruff"], ["ruff", "mypy"]))
def test_the_files_pass_ruff_and_mypy(tool: str, tmp_path: Path) -> None:
    for name in MODELS:
        module, inputs = _model(name)
        ported = port(module, *inputs, to="linen", verify=False, exact_statistics=name == "residual")
        ported.save(tmp_path / f"{name}.py")
    root = Path(__file__).parents[2]
    checks = {"ruff": [["check"], ["format", "--check"]], "mypy": [["--cache-dir", str(tmp_path / "cache")]]}
    option = {"ruff": "--config", "mypy": "--config-file"}[tool]
    for words in checks[tool]:
        command = [sys.executable, "-m", tool, *words, option, str(root / "pyproject.toml")]
        done = subprocess.run(
            [*command, *map(str, tmp_path.glob("*.py"))], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.every(2)
@pytest.mark.parametrize("name", slow_but(_FAST, BUILDERS))
def test_a_network_for_cifar_gives_what_torch_gives(name: str) -> None:
    torch.manual_seed(0)
    module = BUILDERS[name]().eval()
    ported = port(module, torch.randn(2, 3, 32, 32), to="linen", verify=name not in _FAST)
    linen_module, variables = ported.model
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        want = module(x).numpy()
    got = np.asarray(jax.jit(linen_module.apply)(variables, jnp.asarray(x.permute(0, 2, 3, 1).numpy())))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def _as_array(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray((tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).numpy())


def _code(source: str) -> str:
    """A file without the header, which names versions."""
    return source.partition('"""\n\n')[2]


def test_a_transposed_convolution_with_as_many_outputs_as_inputs_is_paired() -> None:
    module = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3)).eval()
    ported = port(module, torch.randn(2, 8, 5, 5), to="linen")
    _, variables = ported.model
    state = to_state_dict(variables, module, rules=ported.rules)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


class _Listed(nn.Module):
    """Parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(3)])
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.randn(4)) for name in ("wide", "narrow")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mix in self.mixes:
            x = x @ mix
        return x * self.scales["wide"] + self.scales["narrow"]


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.on = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.skip = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.on(x), self.skip(x)


class _Unread(nn.Module):
    """A layer and a module whose results nothing reads, as at the end of WaveNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = _Branch(), _Branch()
        self.ends = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, skip = self.first(x)
        self.last(x)
        ends = [end(x) for end in self.ends]
        return skip + ends[0]


@pytest.mark.parametrize("module", [_Listed(), _Unread()], ids=lambda module: type(module).__name__)
def test_every_weight_is_in_the_port_or_stays_in_torch(module: nn.Module) -> None:
    ported = port(module, torch.randn(3, 4), to="linen")
    assert "[...]" not in ported.source
    back = to_state_dict(ported.model[1], module, rules=ported.rules)
    assert back.keys() == module.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


class _Weighs(nn.Module):
    """Attention whose weights are returned, or to whose scores numbers are added."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.returned = returned

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if self.returned:
            return self.attention(x, x, x)[1]
        return self.attention(x, x, x, attn_mask=bias, need_weights=False)[0]


@pytest.mark.parametrize(
    ("returned", "way_out"),
    [
        (True, "weights are read .* port to nnx, or write the attention out"),
        (False, "scores are added to .* port to nnx, or pass a mask of booleans, or use"),
    ],
)
def test_a_way_out_of_attention_is_one_that_gives_what_is_read(returned: bool, way_out: str) -> None:
    with pytest.raises(PortError, match=way_out):
        port(_Weighs(returned), torch.randn(2, 3, 4), torch.randn(3, 3), to="linen")
