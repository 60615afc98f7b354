"""The command port: what it writes, that it writes nothing on an error, and its words."""

import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner, Result

from torchjax_bridge.cli._app import app
from torchjax_bridge.weights import load_flax

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        x = torch.relu(self.norm(self.conv(x)))
        return x if scale is None else x * scale

class Spectrum(nn.Module):
    def forward(self, x):
        return torch.polygamma(1, x.square() + 1)

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mixer = nn.Conv2d(3, 4, 3), Spectrum()

    def forward(self, x):
        return self.mixer(self.conv(x))

NUMBER = 3

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)

    def forward(self, ids, x):
        return self.embed(ids) + x
"""


FLAX = """
import jax
import jax.numpy as jnp
from flax import nnx

class Flax(nnx.Module):
    def __init__(self, *, rngs):
        del rngs

    def __call__(self, x):
        return jax.scipy.special.polygamma(1, jnp.square(x) + 1)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(folder: pathlib.Path, model: str, *options: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["port", f"nets_{folder.name}:{model}", *options])
    assert done.exit_code == code, done.output
    return done


def written(folder: pathlib.Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith(("nets_", "__")))


def test_a_checkpoint_becomes_source_and_weights_that_fit_it(folder: pathlib.Path) -> None:
    state = {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "conv.bias": torch.randn(4),
        "norm.weight": torch.rand(4),
        "norm.bias": torch.randn(4),
        "norm.running_mean": torch.randn(4),
        "norm.running_var": torch.rand(4) + 0.5,
        "norm.num_batches_tracked": torch.tensor(3),
    }
    torch.save(state, "net.pt")
    files = ("-o", "net_flax.py", "--weights", "net.safetensors", "--checkpoint", "net.pt")
    output = run(folder, "Net", "--input", "random:1x3x6x6", *files).stdout
    assert "Net: " in output
    assert "of the largest output" in output
    assert output.endswith("wrote net_flax.py and net.safetensors\n")
    spec = importlib.util.spec_from_file_location("net_flax", "net_flax.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = load_flax("net.safetensors", nnx.eval_shape(lambda: module.Net(rngs=nnx.Rngs(0))))
    assert np.array_equal(model.conv.bias[...], state["conv.bias"].numpy())
    model.eval()
    assert model(jnp.ones((2, 6, 6, 3))).shape == (2, 4, 4, 4)


def test_the_source_is_for_linen_on_request(folder: pathlib.Path) -> None:
    given = ("--input", "random:1x3x6x6", "-o", "a.py", "--weights", "a.msgpack", "--to", "linen")
    run(folder, "Net", *given)
    assert "class Net(nn.Module)" in pathlib.Path("a.py").read_text()
    assert pathlib.Path("a.msgpack").exists()


def test_json_holds_what_the_table_holds(folder: pathlib.Path) -> None:
    given = ("--input", "random:1x3x6x6", "--torch-arg", "scale=2.0", "-o", "a.py", "--json")
    found = json.loads(run(folder, "Net", *given).stdout)
    assert found["name"] == "Net"
    assert found["classes"] == 1
    assert found["files"] == ["a.py"]
    assert all(check["difference"] < 1e-5 for check in found["checks"])


def test_a_refusal_is_written_in_options_that_then_work(folder: pathlib.Path) -> None:
    output = run(folder, "Mixed", "--input", "random:2x3x6x6", "-o", "a.py", code=1).stderr
    assert "error: Mixed is not ported" in output
    assert "leave it in torch: --keep mixer" in output
    assert written(folder) == []
    assert "pass --op 'torch.polygamma=jax.scipy.special.polygamma({0}, {1})'" in output
    own = "torch.polygamma=jax.scipy.special.polygamma({0}, {1})"
    for way in (
        ["--keep", "mixer"],
        ["--op", own],
        ["--module", f"nets_{folder.name}:Spectrum=flax_layers:Flax"],
    ):
        pathlib.Path("flax_layers.py").write_text(FLAX)
        given = ("--input", "random:2x3x6x6", "-o", "a.py", "--overwrite", *way)
        assert "wrote a.py" in run(folder, "Mixed", *given).stdout


def test_several_inputs_and_dtypes_are_given_in_order(folder: pathlib.Path) -> None:
    given = ("--input", "random:2x5:int:11", "--input", "random:2x5x4", "-o", "words.py", "--no-verify")
    assert "not compared with torch" in run(folder, "Words", *given).stdout


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("-o", "a.py"), 2, "give --input"),
        (("-o", "a.txt", "--input", "random:1x3x6x6"), 2, "no Python file"),
        (("-o", "missing/a.py", "--input", "random:1x3x6x6"), 1, "there is no folder"),
        (
            ("-o", "a.py", "--weights", "missing/w.msgpack", "--input", "random:1x3x6x6"),
            1,
            "there is no folder",
        ),
        (("-o", "a.py", "--checkpoint", "bad.pt", "--input", "random:1x3x6x6"), 1, "bad.pt"),
        (("-o", "a.py", "--input", "random:1x4x6x6"), 1, "fails on these inputs"),
        (("-o", "a.py", "--input", "random:1x3x6x6", "--keep", "part"), 1, "no module of the model"),
        (("-o", "old.py", "--input", "random:1x3x6x6"), 1, "--overwrite"),
        (
            ("-o", "a.py", "--input", "random:1x3x6x6", "--op", "torch.nothing=0"),
            2,
            "no function torch.nothing",
        ),
        (("-o", "a.py", "--input", "random:1x3x6x6", "--op", "torch.exp"), 2, "write it as"),
        (("-o", "a.py", "--input", "random:1x3x6x6", "--module", "nowhere:A=b:C"), 2, "No module named"),
    ],
    ids=str,
)
def test_an_error_writes_nothing(
    folder: pathlib.Path, options: tuple[str, ...], code: int, words: str
) -> None:
    pathlib.Path("bad.pt").write_bytes(b"no checkpoint")
    pathlib.Path("old.py").write_text("kept")
    output = " ".join(run(folder, "Net", *options, code=code).stderr.split())
    assert words in output
    assert written(folder) == ["bad.pt", "old.py"]
    assert pathlib.Path("old.py").read_text() == "kept"


def test_a_file_is_replaced_on_request(folder: pathlib.Path) -> None:
    pathlib.Path("old.py").write_text("old")
    run(folder, "Net", "--input", "random:1x3x6x6", "-o", "old.py", "--overwrite", "--no-verify")
    assert "class Net(nnx.Module)" in pathlib.Path("old.py").read_text()


def test_an_error_is_said_in_the_words_of_the_user(folder: pathlib.Path) -> None:
    torch.save({"conv.weight": torch.ones(2)}, "other.pt")
    given = ("--input", "random:1x3x6x6", "-o", "a.py")
    misfit = run(folder, "Net", *given, "--checkpoint", "other.pt", code=1).stderr
    assert "\n    size mismatch for conv.weight" in misfit
    assert "\\t" not in misfit
    suffix = run(folder, "Net", *given, "--no-verify", "--weights", "a.bin", code=1).stderr
    assert "a file whose name ends in .bin holds torch weights" in " ".join(suffix.split())
    assert "gives an int, not a torch.nn.Module" in run(folder, "NUMBER", *given, code=2).stderr
