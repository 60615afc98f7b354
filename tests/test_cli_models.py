"""The commands that look at two live models: what convert and plan say of settings, audit, parity."""

import json
import pathlib
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from torchjax_bridge.cli._app import app
from torchjax_bridge.cli._inputs import read_arguments, read_inputs
from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.weights import load_state_dict

MODELS = """
import jax, torch
from flax import linen, nnx
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))

class Twin(nnx.Module):
    def __init__(self, rngs, padding=((1, 1), (1, 1)), momentum=0.9, epsilon=1e-5):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, padding=padding, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=momentum, epsilon=epsilon, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.conv(x)))

def same():
    return Twin(nnx.Rngs(0), padding="SAME")

def epsilon():
    return Twin(nnx.Rngs(0), epsilon=1e-2)

def momentum():
    return Twin(nnx.Rngs(0), momentum=0.5)

class Linen(linen.Module):
    padding: object = ((1, 1), (1, 1))

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), strides=2, padding=self.padding, name="conv")(x)
        return jax.nn.relu(linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm")(x))

class Plain(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Conv(4, (3, 3), name="conv")(x)

kept = Plain()

def linen_same():
    return Linen("SAME")

def variables():
    return with_variables()[1]

def with_variables():
    module = Linen()
    return module, module.init(jax.random.key(0), jax.numpy.ones((1, 8, 8, 3)), train=False)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 2)

    def forward(self, ids, scale):
        return self.out(self.embed(ids) * scale)

class NnxWords(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(11, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, ids, scale):
        return self.out(self.embed(ids) * scale)

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))

class NnxFlat(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.conv(x).reshape(len(x), -1))

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        raise RuntimeError("no such weather")
"""


@pytest.fixture
def models(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with a module of factories and a checkpoint; it is the current one."""
    (tmp_path / "models_of_the_cli_tests.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    sys.modules.pop("models_of_the_cli_tests", None)
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "norm.bias": (4,)}
    shapes |= {"norm.running_mean": (4,), "norm.running_var": (4,)}
    state = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    torch.save({**state, "norm.num_batches_tracked": torch.tensor(3)}, "net.pt")
    return tmp_path


def of(name: str) -> str:
    return f"models_of_the_cli_tests:{name}"


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, list(arguments), prog_name="torchjax-bridge", env={"COLUMNS": "100"})
    assert done.exit_code == code, (done.output, done.exception)
    return done


DIFFERENT = {
    "same": ("padding", "warning: padding=(1, 1) in torch, padding='SAME' in Flax; type Conv("),
    "epsilon": ("epsilon", "warning: eps=1e-05 in torch, epsilon=0.01 in Flax; type BatchNorm("),
    "momentum": ("momentum", "note: momentum=0.1 in torch, momentum=0.5 in Flax; type BatchNorm("),
}


@pytest.mark.parametrize("template", DIFFERENT)
def test_convert_and_plan_warn_of_settings_that_differ(models: pathlib.Path, template: str) -> None:
    setting, warning = DIFFERENT[template]
    there = ("--to", "flax", "--model", of("Net"), "--template", of(template))
    back = ("--to", "torch", "--model", of("Net"), "--template", of(template))
    assert warning in run("plan", "net.pt", *there).stdout
    assert warning in run("convert", "net.pt", "flax", *there).stdout
    assert warning in run("convert", "flax", "back.pt", *back).stdout
    assert warning in run("plan", "flax", *back).stdout
    found = json.loads(run("plan", "net.pt", *there, "--json").stdout)
    assert [one["setting"] for one in found["settings"] if one["effect"] != "rounding"] == [setting]
    assert torch.equal(load_state_dict("back.pt")["conv.weight"], load_state_dict("net.pt")["conv.weight"])


def test_models_with_equal_settings_give_no_warning(models: pathlib.Path) -> None:
    there = ("--to", "flax", "--model", of("Net"), "--template", of("Twin"))
    for done in (run("plan", "net.pt", *there), run("convert", "net.pt", "flax", *there)):
        assert "warning" not in done.output
        assert "note: " not in done.output
    assert json.loads(run("plan", "net.pt", *there, "--json").stdout)["ok"] is True


def test_plan_has_moves_and_faults_as_data(models: pathlib.Path) -> None:
    found = json.loads(run("plan", "net.pt", "--to", "flax", "--template", of("Twin"), "--json").stdout)
    kernel = next(move for move in found["moves"] if move["torch"] == ["conv.weight"])
    assert (kernel["flax"], kernel["layout"]) == (["conv.kernel"], "permute(2, 3, 1, 0)")
    assert found["faults"] == []
    wrong = ("net.pt", "--to", "flax", "--template", of("NnxWords"), "--json")
    found = json.loads(run("plan", *wrong, code=1).stdout)
    assert found["ok"] is False
    assert found["faults"]


@pytest.mark.parametrize("template", DIFFERENT)
def test_audit_exits_with_1_where_a_setting_differs(models: pathlib.Path, template: str) -> None:
    command = ("audit", "--model", of("Net"), "--template")
    text = run(*command, of(template), code=1).stdout
    assert "audit: 2 layers compared" in text
    assert DIFFERENT[template][0] in text
    found = json.loads(run(*command, of(template), "--json", code=1).stdout)
    assert DIFFERENT[template][0] in [one["setting"] for one in found["settings"]]
    assert found["layers"] == 2


def test_audit_of_a_linen_module_takes_an_input(models: pathlib.Path) -> None:
    for template, code in (("linen_same", 1), ("Linen", 0), ("with_variables", 0)):
        command = ("audit", "--model", of("Net"), "--template", of(template), "--flax-arg", "train=false")
        text = run(*command, "--input", "random:1x8x8x3", code=code).stdout
        assert ("padding='SAME'" in text) == bool(code)
    assert "pass example inputs" in run(*command, code=1).stderr


@pytest.mark.every(3)
@pytest.mark.parametrize("template", ["Twin", "Linen", "with_variables"])
@pytest.mark.parametrize("weights", ["drawn", "torch", "flax"])
def test_parity_runs_both_models_with_weights_from_any_source(
    models: pathlib.Path, template: str, weights: str
) -> None:
    flax_args = [] if template == "Twin" else ["--flax-arg", "train=false"]
    source = {"drawn": [], "torch": ["net.pt"], "flax": ["flax.safetensors"]}[weights]
    if weights == "flax":
        into = of("Twin" if template == "Twin" else "variables")
        run("convert", "net.pt", *source, "--to", "flax", "--template", into)
    command = ["parity", *source, "--model", of("Net"), "--template", of(template), *flax_args]
    command += ["--input", "random:2x3x8x8"]
    text = run(*command).stdout
    assert text.startswith("parity: ")
    assert "outputs agree" in text
    found = json.loads(run(*command, "--json").stdout)
    assert found["ok"] is True
    assert found["max_difference"] < 1e-5
    assert {row["torch_path"] for row in found["rows"]} >= {"conv", "norm"}


def test_parity_names_the_layer_and_the_cause_and_exits_with_1(models: pathlib.Path) -> None:
    command = (
        "parity",
        "net.pt",
        "--model",
        of("Net"),
        "--template",
        of("same"),
        "--input",
        "random:2x3x8x8",
    )
    text = run(*command, code=1).stdout
    assert "cause: padding: " in text
    found = json.loads(run(*command, "--json", code=1).stdout)
    assert (found["first"], found["cause"]["kind"], found["cause"]["proved"]) == ("conv", "padding", True)


def test_parity_takes_ids_and_arrays_from_files(models: pathlib.Path) -> None:
    model = ("parity", "--model", of("Words"), "--template", of("NnxWords"))
    assert "agree" in run(*model, "--input", "random:2x5:int:11", "--input", "random:2x5x4").stdout
    np.savez("both.npz", ids=np.arange(10).reshape(2, 5), a_scale=np.full((2, 5, 4), 0.5, np.float32))
    assert "agree" in run(*model, "--input", "both.npz").stdout
    np.save("ids.npy", np.arange(10).reshape(2, 5))
    assert "agree" in run(*model, "--input", "ids.npy", "--input", "random:2x5x4").stdout
    done = run(*model, "--input", "random:2x5:int:50", "--input", "random:2x5x4", code=1)
    assert done.stderr.startswith("error: a model cannot run: IndexError: ")
    assert "--torch-arg NAME=VALUE" in run(*model, "--input", "random:2x5:int:11", code=1).stderr


def test_what_a_model_raises_is_one_line(models: pathlib.Path) -> None:
    command = ("parity", "--model", of("Broken"), "--template", of("Twin"), "--input", "random:2x3x8x8")
    output = run(*command, code=1).stderr
    assert output == "error: Broken fails on these inputs: RuntimeError: no such weather\n"
    done = CliRunner().invoke(app, [*command, "--debug"])
    assert type(done.exception) is ArgumentError
    assert type(done.exception.__cause__) is RuntimeError


def test_weights_of_another_model_do_not_fit(models: pathlib.Path) -> None:
    command = ("net.pt", "--model", of("Words"), "--template", of("NnxWords"))
    output = run("parity", *command, "--input", "random:2x5:int:11", "--input", "random:2x5x4", code=1).stderr
    assert output.startswith("error: net.pt does not fit the model: ")


@pytest.mark.parametrize(
    "spec",
    [
        "random:",
        "random:3xx4",
        "random:-1",
        "random:2:int",
        "random:2:int:0",
        "random:2:f99",
        "random:2:f32:7",
        "nothing.npz",
        "models_of_the_cli_tests.py",
        "bad.npz",
    ],
)
def test_an_invalid_input_is_a_usage_error(models: pathlib.Path, spec: str) -> None:
    pathlib.Path("bad.npz").write_bytes(b"PK no arrays")
    done = run("parity", "--model", of("Net"), "--template", of("Twin"), "--input", spec, code=2)
    assert "Invalid value" in done.stderr
    assert "give --input" in run("parity", "--model", of("Net"), "--template", of("Twin"), code=2).stderr


def test_inputs_are_drawn_by_the_seed(models: pathlib.Path) -> None:
    one, other = (read_inputs(["random:2x3", "random:4:int:9", "random:2:bf16"], seed) for seed in (0, 1))
    assert [tensor.dtype for tensor in one] == [torch.float32, torch.int64, torch.bfloat16]
    assert int(one[1].max()) < 9
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[0], read_inputs(["random:2x3"], 0)[0])
    assert read_arguments(["a=1", 'b="x"', "c=y"]) == {"a": 1, "b": "x", "c": "y"}


def test_a_linen_module_as_template_is_refused_with_the_factory_that_then_works(models: pathlib.Path) -> None:
    file = models / "models_of_the_cli_tests.py"
    plain = MODELS
    torch.save({"conv.weight": torch.ones(4, 3, 3, 3), "conv.bias": torch.ones(4)}, "conv.pt")
    for name in ("Plain", "kept"):
        command = ("plan", "conv.pt", "--to", "flax", "--template")
        output = run(*command, of(name), code=2).stderr
        lines = output.splitlines()
        first = next(place for place, line in enumerate(lines) if line.strip().startswith("def "))
        code = "\n".join(line[2:] for line in lines[first : first + 3])
        file.write_text(f"{plain}\n{code}\n")
        sys.modules.pop("models_of_the_cli_tests")
        spec = lines[-1].split("--template ")[1]
        assert "params.conv.kernel" in run(*command, spec).stdout
        assert "cannot run" in run("audit", "--model", of("Net"), "--template", of("Net"), code=2).stderr


def test_an_input_answers_what_is_flattened_without_a_rules_file(models: pathlib.Path) -> None:
    torch.save({"conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.randn(4)}, "part.pt")
    fc = {"fc.weight": torch.randn(5, 16), "fc.bias": torch.randn(5)}
    torch.save(torch.load("part.pt") | fc, "flat.pt")
    pair = ("--model", of("Flat"), "--template", of("NnxFlat"))
    given = ("--input", "random:1x3x4x4")
    asked = run("plan", "flat.pt", "--to", "flax", *pair, code=1).stdout
    assert (
        "Pass --input (what the torch model takes, such as random:1x3x32x32), and a run of it answers"
        in asked
    )
    planned = run("plan", "flat.pt", "--to", "flax", *pair, *given).stdout
    assert 'recorded: Flatten("fc", (4, 2, 2))' in planned
    run("convert", "flat.pt", "flat.safetensors", "--to", "flax", *pair, *given)
    back = run("convert", "flat.safetensors", "back.pt", "--to", "torch", *pair, *given)
    assert "wrote 4 tensors" in back.stdout
    assert all(torch.equal(load_state_dict("back.pt")[key], value) for key, value in fc.items())
    assert "outputs agree" in run("parity", "flat.pt", *pair, *given).stdout
    run("plan", "flat.pt", "--to", "flax", "--template", of("NnxFlat"), *given, code=1)
