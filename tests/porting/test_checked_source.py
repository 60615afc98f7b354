"""An emitted file passes the linter, the formatter and the type checker, whatever the author's code is like."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torchjax_bridge import port
from torchjax_bridge.porting._helpers import HELPERS

_SETTINGS = str(Path(__file__).parents[2] / "pyproject.toml")


class _Mixed(nn.Module):
    """Layers, functions and nothing in one list, and layers whose tensors are read."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)])
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()
        )
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.chosen = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LayerNorm(4)})
        self.scaled = nn.LayerNorm(4)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        for place in range(3):
            X = self.ops[place](X)
        X = X + self.layers[2](self.layers[1](X))
        for norm in self.norms:
            X = norm(X)
        return self.chosen["b"](X * self.scaled.weight + self.chosen["a"].bias)


class _Grouped(nn.Module):
    """A Sequential that is no chain, since the author gives one of its functions another array."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.unsqueeze(-1).permute(0, 2, 1, 3))


class _Rotated(nn.Module):
    def forward(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return x * angles[0] + x.roll(1, -1) * angles[1]


class _Names(nn.Module):
    """A size, a tuple and arrays for which the author has one name."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.rotated = _Rotated()
        self.lin = nn.Linear(4, 4)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        h, w = self.attention(X, X, X)
        N = torch.ones(X.shape[1]).cumsum(0)
        N = torch.where(N == X.shape[1], torch.zeros_like(N), N)  # noqa: SIM300
        n = self.lin(h * N[:, None])
        h = n + w.sum(-1, keepdim=True)
        return self.rotated(h, (h.cos(), h.sin()))


@functools.cache
def _sources() -> dict[str, str]:
    torch.manual_seed(0)
    torch_models = {
        "mixed": (_Mixed(), torch.randn(2, 4)),
        "grouped": (_Grouped(), torch.randn(2, 5, 4)),
        "names": (_Names(), torch.randn(2, 5, 4)),
    }
    return {name: port(net.eval(), x).source for name, (net, x) in torch_models.items()}  # which is proved


def _run(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_pass_the_linter_and_the_formatter(tmp_path: Path) -> None:
    for name, source in _sources().items():
        (tmp_path / f"{name}.py").write_text(source)
    for command in (["check"], ["format", "--check"]):
        _run("ruff", *command, "--no-cache", "--config", _SETTINGS, str(tmp_path))


def test_every_helper_is_formatted(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("\n\n".join(text.strip() + "\n" for text in HELPERS.values()))
    _run("ruff", "format", "--check", "--no-cache", "--config", _SETTINGS, str(tmp_path))


@pytest.mark.slow
def test_files_pass_the_type_checker(tmp_path: Path) -> None:
    paths = []
    for name, source in _sources().items():
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(source)
    _run("mypy", "--config-file", _SETTINGS, "--cache-dir", str(tmp_path / "cache"), *map(str, paths))


def test_only_a_list_whose_items_differ_in_kind_is_annotated() -> None:
    source = _sources()["mixed"]
    assert "self.ops: nnx.List[Any] = nnx.List(" in source
    assert "self.norms = nnx.List([" in source
    assert "self.scaled: Any = " in source


def test_a_function_at_the_end_that_is_code_of_the_class_stands_in_no_list() -> None:
    source = _sources()["grouped"]
    assert "leaky_relu" in source
    assert "lambda" not in source


def test_a_name_is_given_to_values_of_one_kind_alone() -> None:
    source = _sources()["names"]
    assert "h = attend(" in source
    assert "h_2 = " in source
    assert "self.rotated(h_2, (" in source  # a tuple, as it is annotated


def test_an_argument_is_lower_case_and_so_is_what_is_compared() -> None:
    source = _sources()["names"]
    assert "def __call__(self, x: jax.Array)" in source
    assert "n == x.shape[1]" in source
