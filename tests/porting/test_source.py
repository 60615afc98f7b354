"""The source of a port is what a person would write, and passes this project's own checks."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from benchmarks.port.zoo._operators import declare_operators
from tests.porting.golden_sources import FOLDER, GOLDEN, source_of
from torchjax_bridge import port
from torchjax_bridge.porting._format import formatted

_SETTINGS = Path(__file__).parents[2] / "pyproject.toml"


def _lines(source: str) -> int:
    return len(source.splitlines())


def _port(module: nn.Module, *shape: int) -> str:
    return port(module.eval(), torch.randn(shape), verify=False).source


@pytest.mark.parametrize("name", GOLDEN)
def test_the_source_is_the_one_that_a_person_has_read(name: str) -> None:
    # Write them anew with `python -m tests.porting.golden_sources`, and read what changed.
    assert source_of(name) == (FOLDER / f"{name}.py").read_text()


def test_the_net_of_the_example_is_short() -> None:
    assert _lines((FOLDER / "net.py").read_text()) <= 35


def test_the_files_pass_ruff_with_the_settings_of_this_project(tmp_path: Path) -> None:
    for name in GOLDEN:  # elsewhere, since the linter asks less of tests
        (tmp_path / f"{name}.py").write_text((FOLDER / f"{name}.py").read_text())
    for command in (["check"], ["format", "--check"]):
        ruff = [
            sys.executable,
            "-m",
            "ruff",
            *command,
            "--no-cache",
            "--config",
            str(_SETTINGS),
            str(tmp_path),
        ]
        result = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_the_files_pass_mypy_with_the_settings_of_this_project(tmp_path: Path) -> None:
    files = [str(FOLDER / f"{name}.py") for name in GOLDEN]
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(_SETTINGS),
        "--cache-dir",
        str(tmp_path),
        *files,
    ]
    result = subprocess.run(mypy, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_resnet50_is_two_classes_and_at_most_90_lines() -> None:
    declare_operators()
    pytest.importorskip("torchvision")
    from torchvision.models import resnet50

    source = _port(resnet50(), 2, 3, 32, 32)
    assert _lines(source) <= 90
    assert source.count("\nclass ") == 2


# --- branches that a setting decides ------------------------------------------------------------------------


class _Block(nn.Module):
    """A block of either kind."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.use_res = cin == cout
        self.conv = nn.Conv2d(cin, cout, 3, stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv(x)
        if self.stride == 1 and self.use_res:
            return x + out
        return out


def test_a_branch_that_settings_decide_is_one_class_with_the_authors_condition() -> None:
    source = _port(nn.Sequential(_Block(3, 8, 2), _Block(8, 8, 1), _Block(8, 4, 1)), 2, 3, 8, 8)
    assert source.count("\nclass _Block") + source.count("\nclass Block") == 1
    assert "self.stride == 1 and self.use_res" in source
    assert "self.use_res = cin == cout" in source


class _Gated(nn.Module):
    """A block with a parameter of its own, or without."""

    def __init__(self, layer_scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gamma = nn.Parameter(layer_scale * torch.ones(4)) if layer_scale > 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.gamma is not None:
            y = self.gamma * y
        return x + y


@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_a_parameter_that_some_instances_lack_is_optional_in_one_class(to: Literal["nnx", "linen"]) -> None:
    net = nn.Sequential(_Gated(0.0), _Gated(0.1), _Gated(0.2))
    source = port(net, torch.randn(2, 4), to=to).source  # proved
    assert source.count("\nclass Gated(") == 1
    assert "if self.gamma is not None:" in source
    assert "for layer in self.layers:" in source


class _Swapped(nn.Module):
    """Both arms bind one name, and what was there before is read afterwards."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            x = torch.relu(self.norm(x))
            out = x
        else:
            out = torch.relu(self.norm(x))
        out = self.conv(out)
        return torch.add(x, out)


def test_a_value_that_one_arm_replaces_and_the_other_keeps_is_right_in_both() -> None:
    ported = port(nn.Sequential(_Swapped(True), _Swapped(False)).eval(), torch.randn(2, 4, 5, 5))  # proved
    assert ported.source.count("self.norm = ") == 1


class _Padded(nn.Module):
    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = nn.ZeroPad2d((kernel_size // 2 - 1, kernel_size // 2) * 2)
        self.conv = nn.Conv2d(4, 4, kernel_size, stride, padding="valid" if stride == 2 else "same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 2:
            x = self.pad(x)
        return self.conv(x)


def test_numbers_that_differ_in_one_arm_are_not_those_of_the_first_instance() -> None:
    net = nn.Sequential(_Padded(3, 1), _Padded(3, 2), _Padded(5, 2), _Padded(5, 1))
    port(net, torch.randn(2, 4, 16, 16))  # which proves it


class _Grown(nn.Module):
    """Each layer is given all that was made before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 1) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [x]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return torch.cat(made, 1)


def test_layers_over_a_growing_list_give_what_torch_gives() -> None:
    port(_Grown().eval(), torch.randn(2, 3, 4, 4))  # proved


class _DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 1)

    def forward(self, made: list[torch.Tensor]) -> torch.Tensor:
        return self.conv(torch.cat(made, 1))


class _DenseBlock(nn.ModuleDict):
    """torchvision's ``_DenseBlock``: its layers are attributes."""

    def __init__(self, channels: int = 3, count: int = 4) -> None:
        super().__init__({f"layer{i + 1}": _DenseLayer(channels + 2 * i) for i in range(count)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [x]
        for layer in self.values():
            made.append(layer(made))
        return torch.cat(made, 1)


def test_what_layers_that_are_attributes_made_is_one_growing_list() -> None:
    source = _port(nn.Sequential(_DenseBlock(3, 4), _DenseBlock(11, 3)), 2, 3, 4, 4)
    for number in range(1, 5):
        assert source.count(f"features.append(self.layer{number}(features))\n") == (2 if number < 4 else 1)
    assert source.count("return jnp.concatenate(features, axis=-1)") == 2


class _Kept(nn.Module):
    """A value is kept under another name before its own is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        residual = x
        x = self.norm(x).reshape(b, n * c)
        x = self.linear(x.reshape(b, n, c))
        return x + residual


def test_names_are_the_authors_also_where_a_value_is_kept_under_another_name() -> None:
    source = _port(_Kept(), 2, 4, 6)
    assert "residual = x\n" in source
    assert "b, n, c = x.shape\n" in source
    assert "x_2" not in source


# Each is what ruff makes of the statement, at 60 characters a line.
_LAID_OUT = {
    "numbers_slices_powers_and_quotes": (
        "y = jnp.where(mask, -3.4028234663852886e+38, scores[:, ::self.stride]) + 'a' * x ** 2",
        """
y = (
    jnp.where(
        mask,
        -3.4028234663852886e38,
        scores[:, :: self.stride],
    )
    + "a" * x**2
)
""",
    ),
    "one_name_of_a_tuple": (
        "attn, = self.attention(value, key)",
        """
(attn,) = self.attention(value, key)
""",
    ),
    "an_operator_before_a_name": (
        "x = attention_probabilities.reshape(-1, x.shape[2]) @ value_layer",
        """
x = (
    attention_probabilities.reshape(-1, x.shape[2])
    @ value_layer
)
""",
    ),
    "an_operator_before_a_call": (
        "return jnp.tile(encoder_attention_mask[:, None], (1, 4)) * jnp.exp(-self.log_scale)",
        """
return jnp.tile(
    encoder_attention_mask[:, None], (1, 4)
) * jnp.exp(-self.log_scale)
""",
    ),
    "what_an_item_is_increased_by": (
        "self.running_mean[...] += self.momentum * (jnp.mean(x, axis=0) - self.running_mean[...])",
        """
self.running_mean[...] += self.momentum * (
    jnp.mean(x, axis=0) - self.running_mean[...]
)
""",
    ),
    "one_argument_gets_no_comma": (
        "self.layers = nnx.List([Block(4, stride=2, rngs=rngs), Block(8, stride=2, rngs=rngs)])",
        """
self.layers = nnx.List(
    [
        Block(4, stride=2, rngs=rngs),
        Block(8, stride=2, rngs=rngs),
    ]
)
""",
    ),
    "operands_inside_of_brackets": (
        "y = jnp.take(windows, jnp.arange(0, size, step)[:, None] + jnp.arange(patch), axis=1)",
        """
y = jnp.take(
    windows,
    jnp.arange(0, size, step)[:, None] + jnp.arange(patch),
    axis=1,
)
""",
    ),
    "a_chain_of_calls": (
        "t = jnp.stack([rows, columns], axis=2).reshape(1, 1, 20, 20, 2).astype(jnp.float32)",
        """
t = (
    jnp.stack([rows, columns], axis=2)
    .reshape(1, 1, 20, 20, 2)
    .astype(jnp.float32)
)
""",
    ),
    "a_chain_of_items": (
        "x = x.at[0].set(numerator / denominator).at[1].set(numerator_2 / denominator_2)",
        """
x = (
    x.at[0]
    .set(numerator / denominator)
    .at[1]
    .set(numerator_2 / denominator_2)
)
""",
    ),
    "names_and_a_value_in_brackets": (
        "codes, commitment_loss, codebook_loss, latents = self.quantizers[0](hidden_state)",
        """
codes, commitment_loss, codebook_loss, latents = (
    self.quantizers[0](hidden_state)
)
""",
    ),
    "more_names_than_a_line_has": (
        "quantized_representation, commitment_loss, codebook_loss, latents = self.quantizer(x)",
        """
(
    quantized_representation,
    commitment_loss,
    codebook_loss,
    latents,
) = self.quantizer(x)
""",
    ),
    "a_condition": (
        "return jnp.transpose(x, (0, 3, 1, 2)) if self.channels_first and x.ndim == 4 else x",
        """
return (
    jnp.transpose(x, (0, 3, 1, 2))
    if self.channels_first and x.ndim == 4
    else x
)
""",
    ),
    "a_definition": (
        "def __call__(self, query: jax.Array, key: jax.Array, *, train: bool=False) -> jax.Array:",
        """
def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    *,
    train: bool = False,
) -> jax.Array:
""",
    ),
    "a_test": (
        "if self.stride == 1 and self.input_filters == self.output_filters and (not self.frozen):",
        """
if (
    self.stride == 1
    and self.input_filters == self.output_filters
    and (not self.frozen)
):
""",
    ),
}


@pytest.mark.parametrize("name", _LAID_OUT)
def test_a_long_statement_is_laid_out_as_ruff_does(name: str) -> None:
    statement, expected = _LAID_OUT[name]
    found = "\n".join(formatted([statement], 60))
    assert found == expected.strip("\n")
    body = "\n    pass" if statement.endswith(":") else ""
    assert ast.dump(ast.parse(found + body)) == ast.dump(ast.parse(statement + body))


class Residual(nn.Module):
    """A block with a shortcut where the shape changes."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.shortcut(x)


def test_a_layer_that_one_block_has_is_made_of_the_arguments_of_the_block() -> None:
    net = nn.Sequential(Residual(3, 3), Residual(3, 6, 2), Residual(6, 6))
    space: dict[str, Any] = {}
    exec(port(net, torch.randn(2, 3, 8, 8)).source, space)
    block = space["Residual"](5, 7, 3, rngs=nnx.Rngs(0))
    assert block(jnp.ones((1, 9, 9, 5))).shape == (1, 3, 3, 7)


def test_a_sequential_that_is_a_model_is_a_loop() -> None:
    source = _port(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), 2, 3, 8, 8)
    assert (
        "        for layer in self.layers:\n            input = layer(input)\n        return input" in source
    )


class Unbinds(nn.Module):
    """Reads few parts of many, and all of few."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.fc(x).unbind(1)[0]
        q, k = self.fc(x)[:, :, :2].unbind(2)
        return first + (q * k).sum(1, keepdim=True)


def test_few_of_many_parts_are_read_by_their_index() -> None:
    source = port(Unbinds(), torch.randn(2, 5, 4)).source
    assert "first = self.fc(x)[:, 0]" in source
    assert "q, k = jnp.moveaxis(" in source


class Convolution(nn.Module):
    """The author's arguments go on to the layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, bias=False, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Branches(nn.Module):
    """Convolutions of several shapes, as in an Inception block."""

    def __init__(self, *kernels: int | tuple[int, int]) -> None:
        super().__init__()
        halves = [k // 2 if isinstance(k, int) else (k[0] // 2, k[1] // 2) for k in kernels]
        self.convs = nn.ModuleList(
            [Convolution(kernel_size=k, padding=p) for k, p in zip(kernels, halves, strict=True)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


@pytest.mark.parametrize("kernels", [(1, (1, 3)), (3, (1, 3)), ((1, 3), 1, 3), ((1, 3), (3, 1))], ids=str)
def test_paddings_of_one_number_and_of_several_are_arguments_of_one_class(kernels: Any) -> None:
    ported = port(Branches(*kernels), torch.randn(2, 3, 8, 8))
    assert ported.source.count("class Convolution(") == 1


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("x + -1000000000.0", "x + -1e9"),
        ("f(x, 1e-05)", "f(x, 1e-5)"),
        ("x * 2.5e+20", "x * 2.5e20"),
        ("x + 0.001", "x + 0.001"),
        ("x ** 10000.0", "x**10000.0"),
    ],
)
def test_numbers_are_written_as_a_person_writes_them(given: str, written: str) -> None:
    assert formatted([f"y = {given}"], 60) == [f"y = {written}"]
