"""The command line: what each command does, says and exits with, and that docs/cli.md is its own help."""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.marking import slow_but
from torchjax_bridge import exchange
from torchjax_bridge.cli._app import app
from torchjax_bridge.cli._options import parse_bytes, parse_dtype
from torchjax_bridge.cli._proposed_rules import proposed_rules
from torchjax_bridge.cli._rules import read_rules
from torchjax_bridge.cli._terminal import align_columns, format_bytes
from torchjax_bridge.weights import (
    Fill,
    Flatten,
    Fused,
    Keep,
    LayerType,
    Rename,
    Rule,
    UserRule,
    load_flax,
    load_state_dict,
    open_checkpoint,
    save_state_dict,
)

Folder = pathlib.Path

NETS = """
import jax, torch
from flax import linen, nnx
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        assert torch.empty(1).is_meta, "built with memory"
        self.fc = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)

class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

def nnx_net():
    net = NnxNet(nnx.Rngs(0))
    assert isinstance(net.fc.kernel.get_value(), jax.core.Tracer), "built with memory"
    return net

def abstract():
    return nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))

class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(True, name="norm")(linen.Dense(4, name="fc")(x))

class Alike(nnx.Module):
    def __init__(self, rngs):
        self.alpha = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.beta = nnx.Linear(4, 4, use_bias=False, rngs=rngs)

class Annotated(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.normal(), (None, "x"))
        self.fc = nnx.Linear(4, 8, kernel_init=init, rngs=rngs)

class Bare(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(4, 8, rngs=nnx.Rngs(0))

class WithMap(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(16, 5, rngs=rngs)

def with_map():
    return WithMap(nnx.Rngs(0))

def variables():
    return LinenNet().init(jax.random.key(0), jax.numpy.ones((1, 3)))

def broken():
    raise OSError("no such license")

number = 3
"""


@pytest.fixture
def nets(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A folder with a module of factories and a checkpoint; it is the current one."""
    (tmp_path / "nets_of_the_cli_tests.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    sys.modules.pop("nets_of_the_cli_tests", None)
    torch.manual_seed(0)
    state = {
        "fc.weight": torch.randn(4, 3),
        "fc.bias": torch.randn(4),
        "norm.weight": torch.randn(4),
        "norm.bias": torch.randn(4),
        "norm.running_mean": torch.randn(4),
        "norm.running_var": torch.rand(4),
        "norm.num_batches_tracked": torch.tensor(3),
    }
    save_state_dict("net.pt", state)
    return state


def factory(name: str) -> str:
    return f"nets_of_the_cli_tests:{name}"


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, list(arguments), prog_name="torchjax-bridge", env={"COLUMNS": "100"})
    assert done.exit_code == code, (done.output, done.exception)
    return done


def left(folder: Folder, *names: str) -> None:
    """Nothing is there but these and what the fixture made."""
    known = {"nets_of_the_cli_tests.py", "net.pt", "__pycache__", *names}
    assert {path.name for path in folder.iterdir()} <= known


# --- convert -------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@pytest.mark.parametrize("template", ["nnx_net", "abstract", "NnxNet", "variables"])
@pytest.mark.parametrize("model", [None, "Net"])
def test_convert_goes_there_and_back_without_building_a_model(
    nets: dict[str, torch.Tensor], template: str, model: str | None
) -> None:
    options = ["--model", factory(model)] if model else []
    done = run("convert", "net.pt", "flax", "--to", "flax", "--template", factory(template), *options)
    assert "wrote 6 tensors, 128 B, to flax" in done.stdout
    run("convert", "flax", "back.pt", "--to", "torch", "--model", factory("Net"))
    back = load_state_dict("back.pt")
    assert all(torch.equal(back[name], tensor) for name, tensor in nets.items())
    run("verify", "back.pt", "net.pt")
    run("verify", "net.pt", "flax", "--template", factory(template))


def test_convert_casts_reshards_and_changes_formats(nets: dict[str, torch.Tensor], tmp_path: Folder) -> None:
    run("convert", "net.pt", "shards", "--to", "torch", "--shard-size", "64", "--dtype", "bf16")
    found = open_checkpoint("shards")
    assert len(found.shards) > 1
    assert found.leaves["fc.weight"].dtype == torch.bfloat16
    assert found.leaves["norm.num_batches_tracked"].dtype == torch.int64
    run("convert", "net.pt", "net.msgpack", "--to", "flax", "--template", factory("variables"))
    run("convert", "net.msgpack", "orbax", "--to", "flax", "--format", "orbax")
    assert load_flax("orbax")["params"]["fc"]["kernel"].shape == (3, 4)
    left(tmp_path, "shards", "net.msgpack", "orbax")


def test_a_template_that_names_axes_needs_no_mesh_but_for_their_sizes(nets: dict[str, torch.Tensor]) -> None:
    save_state_dict("fc.pt", {"fc.weight": torch.randn(8, 4), "fc.bias": torch.randn(8)})
    options = ("--to", "flax", "--format", "orbax", "--template", factory("Annotated"))
    said = run("convert", "fc.pt", "flax", *options, "--mesh", "y=4", code=2).stderr
    assert "It ran on --mesh y=4, which must size every axis it names" in " ".join(said.split())
    run("convert", "fc.pt", "flax", *options, "--mesh", "x=4")
    run("verify", "fc.pt", "flax", "--template", factory("Annotated"))
    run("convert", "fc.pt", "whole", *options)
    run("verify", "flax", "whole")
    run("verify", "fc.pt", "flax", "--template", factory("Bare"))  # whose constructor takes nothing


def test_convert_takes_rules_from_a_file(nets: dict[str, torch.Tensor], tmp_path: Folder) -> None:
    save_state_dict("old.pt", {name.replace("fc", "head"): tensor for name, tensor in nets.items()})
    (tmp_path / "r.toml").write_text('[[rename]]\ntorch = "head"\nflax = "fc"\n')
    (tmp_path / "r.json").write_text('{"rename": [{"torch": "head", "flax": "fc"}]}')
    for number, file in enumerate(("r.toml", "r.json")):
        run(
            "convert",
            "old.pt",
            f"o{number}",
            "--to",
            "flax",
            "--template",
            factory("abstract"),
            "--rules",
            file,
        )
    assert (tmp_path / "o0" / "model.safetensors").read_bytes() == (
        tmp_path / "o1" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[rename]]\ntorch = 'a'", "lacks the dotted name 'flax'"),
        ("[[rename]]\ntorch = 'a'\nflax = 'b'\neval = 'os'", "not a table of flax, torch"),
        ("[[exec]]\ntorch = 'a'", "'exec' is not a list of rules"),
        ("[[layer_type]]\ntorch = 'a'\nkind = 'Module.__init__'", "not a class of torch.nn"),
        ("[[flatten]]\ntorch = 'a'", "needs features"),
        (
            "[[flatten]]\ntorch = 'a'\nfeatures = [2, 3]\nchannels_first = true",
            "must be true, and without features",
        ),
        ("[[flatten]]\ntorch = 'a'\nchannels_first = false", "must be true, and without features"),
        ("[[flatten]]\ntorch = 'a'\nfeatures = [2, 3]\noutput = 1", "output must be true or false"),
        ("[[keep]]\nflax = 'a'", "not a table of torch"),
        ("[[fill]]\nflax = 'a'", "takes a number such as 0.0"),
        ("[[fill]]\nvalue = 0.0", "takes the dotted name of a Flax leaf"),
        ("rename = 3", "'rename' is not a list"),
        ("[[fused]]\ntorch = 'qkv'", "takes the name of one layer"),
        ("[[rename", "is not TOML"),
    ],
)
def test_an_invalid_rules_file_is_a_usage_error(
    nets: dict[str, torch.Tensor], tmp_path: Folder, text: str, why: str
) -> None:
    (tmp_path / "r.toml").write_text(text)
    done = run("plan", "net.pt", "--to", "flax", "--rules", "r.toml", code=2)
    assert why in " ".join(done.stderr.split())


def test_rules_are_those_of_python(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rules = {
        "flatten = [{torch = 'a', features = [4, 2, 2]}]": Flatten("a", (4, 2, 2)),
        "flatten = [{torch = 'a', channels_first = true}]": Flatten("a", None),
        "flatten = [{torch = 'a', features = [4, 2, 2], output = true}]": Flatten(
            "a", (4, 2, 2), output=True
        ),
        "rename = [{torch = 'a', flax = 'b'}]": Rename("a", "b"),
        "fused = [{module = 'a', torch = ['q', 'k'], flax = 'qk', heads = 2}]": Fused(
            "a", ("q", "k"), "qk", 2
        ),
        "layer_type = [{torch = 'a', kind = 'Linear'}]": LayerType("a", torch.nn.Linear),
        "keep = [{torch = 'a.*'}]": Keep("a.*"),
        "fill = [{flax = 'a.bias', value = 0.0}]": Fill("a.bias", 0.0),
    }
    for text, rule in rules.items():
        pathlib.Path("r.toml").write_text(text)
        assert read_rules("r.toml") == (rule,)


def test_every_proposed_rule_is_translated_to_a_rules_file(tmp_path: Folder) -> None:
    one = tmp_path / "r.toml"
    rules = [Rename("a.*", 'b "c"'), LayerType("d(1)", torch.nn.Conv1d), Flatten("e", (4, 2), output=True)]
    rules += [Flatten("f", None), Rename("g", "h"), Keep("pooler"), Fill("a.bias", 0.5), Fill("b.bias", 0)]
    rules += [Fused("m", "qkv", ("q", "k", "v"), heads=3), Fused("n", ("q", "k"), "qk")]
    one.write_text(
        "\n".join(proposed_rules(f"say rules=[{', '.join(map(_as_python, rules))}], or so (or not)"))
    )
    assert set(read_rules(str(one))) == set(rules)
    kinds = {type(rule) for rule in rules}
    assert kinds == set(UserRule.__args__) - {Rule}, "what a caller can say, but for a Rule, which is Python"
    asked = 'Rename("n1", "x") or Rename("n1", "y"); Flatten("p", (C, H, W)), LayerType(<path>, nn.Linear)'
    asked += ', Fused("m", "q", (<first>, <second>))'
    one.write_text("\n".join(proposed_rules(asked)))
    assert read_rules(str(one)) == ()  # a choice or a question is not a rule
    assert one.read_text().count('# {torch = "n1"') == 2
    assert '# {module = "m", torch = "q", flax = ["<first>", "<second>"]},' in one.read_text()


def _as_python(rule: object) -> str:
    """The rule as a Python expression."""
    return str(rule).replace('"c""', '\\"c\\""') if '"c""' in str(rule) else str(rule)


def test_a_question_about_names_is_answered_by_uncommenting_a_line(
    nets: dict[str, torch.Tensor], tmp_path: Folder
) -> None:
    save_state_dict("alike.pt", {f"{name}.weight": torch.randn(4, 4) for name in ("x", "y")})
    command = ("alike.pt", "--to", "flax", "--template", factory("Alike"))
    output = run("plan", *command, code=1).stdout.splitlines()
    begin = next(place for place, line in enumerate(output) if line.strip() == "rename = [")
    lines = [line[2:] for line in output[begin : output.index("  ]", begin) + 1]]
    (tmp_path / "r.toml").write_text("\n".join(lines))
    assert read_rules("r.toml") == ()
    run("plan", *command, "--rules", "r.toml", code=1)
    answer = next(line for line in lines if 'torch = "x", flax = "beta"' in line)
    (tmp_path / "r.toml").write_text("\n".join(lines).replace(answer, answer.replace("# ", "")))
    text = run("plan", *command, "--rules", "r.toml").stdout
    assert [line.split()[:2] for line in text.splitlines()[1:3]] == [
        ["x.weight", "beta.kernel"],
        ["y.weight", "alpha.kernel"],
    ]


def test_an_unknown_key_lists_the_known_ones(nets: dict[str, torch.Tensor]) -> None:
    torch.save({"ema": nets, "deep": {"model": nets}, "epoch": 3}, "two.pt")
    for key, near in (("emaa", "ema"), ("deep.modell", "deep.model"), ("deep", None), ("epoch", None)):
        output = run("inspect", "two.pt", "--key", key, code=1).stderr
        assert "these entries are state_dicts: 'ema', 'deep.model'." in output
        assert (f"Did you mean '{near}'?" in output) == (near is not None)
    run("inspect", "two.pt", "--key", "deep.model")
    assert "needs no key" in run("inspect", "net.pt", "--key", "model", code=1).stderr
    torch.save({"deep": {"a": nets, "b": nets}}, "deep.pt")
    assert "('deep.a', 'deep.b'): choose one, with --key NAME" in run("inspect", "deep.pt", code=1).stderr


def _programs(nets: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Files that hold more than tensors, and what is in each."""
    net = torch.nn.Linear(3, 4)
    state = dict(net.state_dict())
    torch.save(net, "whole.pt")
    torch.save(net, "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1), "epoch": 3}, "arguments.pt")
    torch.save({"model": net, "optimizer": torch.optim.SGD(net.parameters())}, "run's.pt")
    torch.save({**state, "cfg": argparse.Namespace(lr=1)}, "beside.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.ones(1, 3)).save("traced.pt")
        torch.jit.script(net).save("scripted.pt")
        torch.export.save(torch.export.export(net, (torch.ones(1, 3),)), "exported.pt2")
    return dict.fromkeys(map(str, pathlib.Path().glob("*.pt*")), state)


@pytest.mark.slow
def test_a_pickle_that_would_run_code_comes_with_the_line_that_extracts_its_tensors(
    nets: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pathlib.Path("net.pt").unlink()
    for name, state in _programs(nets).items():
        output = run("convert", name, "out.safetensors", "--to", "torch", code=1).stderr
        assert "add_safe_globals" not in output  # which a shell cannot call
        assert "damaged" not in output
        (line,) = (line.strip() for line in output.splitlines() if line.startswith("  python -c "))
        _, _, code, source, target = shlex.split(line)
        if name == "run's.pt":  # one line runs in a shell, the others in this process
            shell = line.replace("python", shlex.quote(sys.executable), 1)
            subprocess.run(shell, shell=True, check=True)
        else:
            monkeypatch.setattr(sys, "argv", ["-c", source, target])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(code, {})
        run("convert", target, "out.safetensors", "--to", "torch", "--overwrite")
        found = load_state_dict("out.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (lambda net, args: {"run": {"model": net.state_dict(), "args": args}}, "run.model"),
        (lambda net, args: (net, args), "0"),
        (lambda net, args: {"models": [net.state_dict(), args]}, "models.0"),
        (lambda net, args: argparse.Namespace(net=net, args=args), None),
        (lambda net, args: {"state_dict": {**net.state_dict(), "step": 3}, "args": args}, None),
    ],
    ids=["nested", "tuple", "list", "namespace", "a number between tensors"],
)
def test_the_line_finds_the_tensors_wherever_they_are(content: Any, key: str | None, run_line: Any) -> None:
    net = torch.nn.Linear(2, 3)
    torch.save(content(net, argparse.Namespace(lr=0.1)), "run.pt")
    run_line(run("convert", "run.pt", "out.safetensors", "--to", "torch", code=1).stderr)
    options = ("--key", key) if key else ()
    run("convert", "run-tensors.pt", "out.safetensors", "--to", "torch", *options)
    found = load_state_dict("out.safetensors")
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())


def test_the_line_says_that_there_is_no_tensor_and_writes_no_file(run_line: Any) -> None:
    torch.save({"args": argparse.Namespace(lr=0.1)}, "run.pt")
    with pytest.raises(SystemExit, match="no tensor"):
        run_line(run("convert", "run.pt", "out.safetensors", "--to", "torch", code=1).stderr)
    assert not pathlib.Path("run-tensors.pt").exists()


def test_a_pickle_of_a_later_protocol_is_not_called_damaged(run_line: Any) -> None:
    net = torch.nn.Linear(2, 3)
    torch.save(net.state_dict(), "run.pt", pickle_protocol=4)
    output = run("convert", "run.pt", "out.safetensors", "--to", "torch", code=1).stderr
    assert "protocol 4" in output
    assert "damaged" not in output
    run_line(output)
    assert load_state_dict("run-tensors.pt").keys() == net.state_dict().keys()


@pytest.fixture
def run_line(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the line of Python that a message proposes, without paying for a process."""
    monkeypatch.chdir(tmp_path)

    def run_it(output: str) -> None:
        (line,) = (line.strip() for line in output.splitlines() if line.startswith("  python -c "))
        _, _, code, source, target = shlex.split(line)
        monkeypatch.setattr(sys, "argv", ["-c", source, target])
        exec(code, {})

    return run_it


def test_a_refused_flatten_comes_with_the_line_for_the_rules_file(
    nets: dict[str, torch.Tensor], tmp_path: Folder
) -> None:
    command = ("net-with-map.pt", "out", "--to", "flax", "--template", factory("with_map"))
    save_state_dict(
        "net-with-map.pt",
        {
            "conv.weight": torch.randn(4, 3, 3, 3),
            "conv.bias": torch.randn(4),
            "fc.weight": torch.randn(5, 16),
            "fc.bias": torch.randn(5),
        },
    )
    output = run("convert", *command, code=1).stderr.splitlines()[-1].strip()
    assert output == 'flatten = [{torch = "fc", features = [4, 2, 2]}]'
    assert run("plan", command[0], *command[2:], code=1).stdout.splitlines()[-1].strip() == output
    (tmp_path / "r.toml").write_text(output)
    run("convert", *command, "--rules", "r.toml")


def test_errors_are_one_message_without_traceback_unless_debug(
    nets: dict[str, torch.Tensor], tmp_path: Folder
) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    done = run("convert", "cut.safetensors", "out", "--to", "torch", code=1)
    assert done.stderr.startswith("error: cut.safetensors: it is truncated")
    assert len(done.stderr.splitlines()) == 1
    done = CliRunner().invoke(app, ["convert", "cut.safetensors", "out", "--to", "torch", "--debug"])
    assert type(done.exception).__name__ == "CheckpointError"
    left(tmp_path, "cut.safetensors")


def test_the_error_names_the_option_that_is_missing(nets: dict[str, torch.Tensor], tmp_path: Folder) -> None:
    assert "--template MODULE:FACTORY" in run("convert", "net.pt", "o", "--to", "flax", code=1).stderr
    left(tmp_path)


def test_errors_name_the_options_and_not_the_arguments_of_python(
    nets: dict[str, torch.Tensor], tmp_path: Folder
) -> None:
    torch.save({"model": nets, "ema": nets}, "two.pt")
    for command, option in (
        (("net.pt", "two.pt", "--to", "torch"), "--overwrite"),
        (("two.pt", "o", "--to", "torch"), "--key NAME"),
        (("net.pt", "o", "--to", "flax"), "--template MODULE:FACTORY"),
    ):
        output = run("convert", *command, code=1).stderr
        assert option in output
        assert "=" not in output
    left(tmp_path, "two.pt")


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_what_names_do_not_show_points_to_the_model(
    nets: dict[str, torch.Tensor], tmp_path: Folder, command: str
) -> None:
    save_state_dict("less.pt", {name: tensor for name, tensor in nets.items() if name != "fc.bias"})
    arguments = ["less.pt", *(["o"] if command == "convert" else []), "--to", "flax"]
    arguments += ["--template", factory("nnx_net")]
    assert "--model MODULE:FACTORY adds what names do not show" in run(command, *arguments, code=1).output
    assert "--model" not in run(command, *arguments, "--model", factory("Net"), code=1).output


@pytest.mark.skipif(os.name == "nt", reason="the shell of POSIX closes a stream")
@pytest.mark.parametrize("closed", slow_but([">&-"], [">&-", "2>&-", "<&- >&- 2>&-"]))
def test_a_closed_stream_is_not_an_error(nets: dict[str, torch.Tensor], closed: str) -> None:
    command = [sys.executable, "-m", "torchjax_bridge", "convert", "net.pt", "o.safetensors", "--to", "torch"]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_state_dict("o.safetensors").keys() == nets.keys()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there are no pseudo terminals")
def test_on_a_terminal_there_is_a_bar_with_the_name_as_it_is(nets: dict[str, torch.Tensor]) -> None:
    os.rename("net.pt", "a[red]b.pt")
    ours, theirs = os.openpty()
    wide = {**os.environ, "COLUMNS": "120", "TERM": "xterm", "JAX_PLATFORMS": "cpu"}
    command = ["-m", "torchjax_bridge", "convert", "a[red]b.pt", "o.safetensors", "--to", "torch"]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=theirs, env=wide
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # on Linux, when the other end is closed
            while part := os.read(ours, 1 << 12):
                shown += part
        assert process.communicate()[0] == b"wrote 7 tensors, 136 B, to o.safetensors\n"
    os.close(ours)
    assert b"converting a[red]b.pt" in shown
    assert b"136/136 bytes" in shown


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--model", "nowhere"], "is not a factory"),
        (["--model", "no_such_module:Net"], "ModuleNotFoundError"),
        (["--model", factory("nothing")], "AttributeError"),
        (["--model", factory("broken")], "OSError: no such license"),
        (["--model", factory("abstract")], "not a torch.nn.Module"),
        (["--template", factory("Net")], "not an nnx.Module"),
        (["--template", factory("number")], "not an nnx.Module"),
        (["--dtype", "int8"], "not a floating-point dtype"),
        (["--memory", "much"], "is not a size"),
        (["--format", "pickle"], "pickle"),
        (["--to", "numpy"], "numpy"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    nets: dict[str, torch.Tensor], tmp_path: Folder, arguments: Sequence[str], why: str
) -> None:
    to = [] if "--to" in arguments else ["--to", "flax"]
    done = run("convert", "net.pt", "out", *to, *arguments, code=2)
    assert why in " ".join(done.stderr.split())
    left(tmp_path)


# --- inspect, plan, verify -----------------------------------------------------------------------------


def test_inspect_shows_layers_and_rules(nets: dict[str, torch.Tensor]) -> None:
    text = run("inspect", factory("Net")).stdout
    assert text.splitlines()[1].split() == ["fc", "Linear,", "rule:", "Linear"]
    text = run("inspect", "net.pt").stdout
    assert text.startswith("net.pt (pt, torch): 7 tensors, 136 B\n")
    assert ["weight", "float32", "(4,", "3)", "48", "B"] in [line.split() for line in text.splitlines()]


def test_inspect_shows_a_layer_once_whatever_the_order_of_its_file(nets: dict[str, torch.Tensor]) -> None:
    save_state_dict("apart.pt", {name: nets[name] for name in ("fc.weight", "norm.weight", "fc.bias")})
    text = run("inspect", "apart.pt").stdout
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["fc", "weight", "bias", "norm", "weight"]
    (fc, norm) = (line.split("rule: ")[1] for line in text.splitlines() if "rule: " in line)
    assert fc == "Linear"  # a dozen rules have a weight and a bias; these shapes fit one
    assert norm == "one of LayerNorm, RMSNorm, PReLU"


def test_inspect_prints_json(nets: dict[str, torch.Tensor]) -> None:
    for what in ("net.pt", factory("Net"), factory("abstract"), factory("variables")):
        found = json.loads(run("inspect", what, "--json").stdout)
        by_name = {line["name"]: line for line in found["tensors"]}
        assert len(by_name) in (6, 7)
        name = next(name for name in by_name if name.endswith(("fc.weight", "fc.kernel")))
        assert by_name[name]["nbytes"] == 48
        if what == factory("abstract"):
            assert by_name[name]["layer"] == "Linear"


def test_plan_prints_and_exits_with_1_for_faults(nets: dict[str, torch.Tensor], tmp_path: Folder) -> None:
    text = run("plan", "net.pt", "--to", "flax", "--template", factory("abstract")).stdout
    assert "fc.weight" in text
    assert "permute(1, 0)" in text
    save_state_dict("less.pt", {"fc.weight": nets["fc.weight"]})
    text = run("plan", "less.pt", "--to", "flax", "--template", factory("abstract"), code=1).stdout
    assert "missing" in text
    left(tmp_path, "less.pt")


def test_verify_names_the_worst_and_exits_with_1(nets: dict[str, torch.Tensor]) -> None:
    changed = {name: tensor.clone() for name, tensor in nets.items()}
    changed["fc.bias"][1] += 0.5
    changed["fc.weight"] += 2
    save_state_dict("other.safetensors", changed)
    done = run("verify", "net.pt", "other.safetensors", "--worst", "1", code=1)
    assert "they differ: 2 tensors, and 5 are the same" in done.stdout
    assert "fc.weight  12 of 12 elements differ  by at most 2" in done.stdout
    assert "and 1 more" in done.stdout


# --- doctor, bench, the program -----------------------------------------------------------------------


def test_doctor_finds_no_fault_here() -> None:
    text = run("doctor").stdout
    assert torch.__version__ in text
    assert "exchange path" in text
    assert "all is well" in text


def test_doctor_exits_with_1_when_memory_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    share = exchange.to_jax
    monkeypatch.setattr(exchange, "to_jax", lambda tensor: share(tensor, copy=True))
    assert "broken: an aligned tensor is copied" in run("doctor", code=1).stdout


def test_bench_measures_both_ways() -> None:
    text = run("bench", "--size", "4kB", "--rounds", "2").stdout
    assert "torch to jax" in text
    assert "jax to torch" in text


def test_the_page_of_commands_is_up_to_date(root: Folder) -> None:
    spec = importlib.util.spec_from_file_location("make_cli", root / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    page = (root / "docs" / "cli.md").read_text()
    assert _words(page) == _words(maker.page()), "run python docs/make_cli.py"


def _words(page: str) -> list[str]:
    """What a page says in each line, but for what releases of typer write differently.

    Those are the brackets, the type of an argument, and the column after it: ``{SRC}`` or ``SRC``, ``SRC <path>``.
    """
    bare = re.sub(r"[][{}<>]", "", re.sub(r" <(path|str)>", "", page))
    return [" ".join(line.split()) for line in bare.splitlines()]


@pytest.mark.parametrize(
    "name", ["convert", "inspect", "plan", "audit", "parity", "verify", "doctor", "bench"]
)
def test_every_help_has_an_example_and_the_exit_codes(name: str) -> None:
    text = run(name, "--help").stdout
    assert f"torchjax-bridge {name} " in text
    assert "Example" in text
    assert "Exit codes: 0" in text
    assert "\x1b" not in text


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchjax_bridge", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def test_the_module_runs_as_a_process_with_its_exit_codes(nets: dict[str, torch.Tensor]) -> None:
    done = _process("convert", "net.pt", "net.safetensors", "--to", "torch")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "wrote 7 tensors, 136 B, to net.safetensors\n",
        "",
    )
    done = _process("convert", "no.pt", "x", "--to", "torch")
    assert (done.returncode, done.stderr) == (1, "error: there is no checkpoint no.pt.\n")


def test_the_shell_completes_commands() -> None:
    done = _process(
        _TORCHJAX_BRIDGE_COMPLETE="complete_bash",
        COMP_WORDS="torchjax-bridge con",
        COMP_CWORD="1",
    )
    assert done.stdout.split() == ["convert"]


@pytest.mark.parametrize(("package", "extras"), [("typer", "cli"), ("flax", "flax,cli")])
def test_without_its_packages_the_error_says_what_to_install(
    tmp_path: Folder, package: str, extras: str
) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name='{package}')")
    done = _process("inspect", "no-such-file", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    output = f"error: the command line needs {package}: pip install 'torchjax-bridge[{extras}]'\n"
    assert done.stderr == output


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "match"), [
    ("raise SystemExit(0)", "ends the program"),
    ("raise __import__('flax').errors.FlaxError('boo')", "FlaxError: boo"),
])  # fmt: skip
def test_a_factory_that_raises_or_ends_the_program_is_a_usage_error(
    nets: dict[str, torch.Tensor], tmp_path: Folder, body: str, match: str
) -> None:
    """An exit code of 0 for a conversion that never happened would be believed."""
    name = f"raising_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def make():\n    {body}\n")
    done = run("convert", "net.pt", "out", "--to", "flax", "--template", f"{name}:make", code=2)
    assert match in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unforeseen_error_is_one_line_without_debug(
    nets: dict[str, torch.Tensor], tmp_path: Folder
) -> None:
    (tmp_path / "own_error.py").write_text(
        "class Mine(Exception): pass\ndef make(): raise Mine('so it is')\n"
    )
    command = ("inspect", "own_error:make")
    done = _process(*command)
    assert (done.returncode, done.stderr) == (1, "error: Mine: so it is (--debug shows where)\n")
    assert "Traceback" in _process(*command, "--debug").stderr


@pytest.mark.parametrize(
    "name", ["convert", "inspect", "plan", "audit", "parity", "verify", "doctor", "bench"]
)
def test_every_command_has_debug(name: str) -> None:
    assert "--debug" in run(name, "--help").stdout


def test_a_size_beyond_the_memory_is_one_error() -> None:
    assert "not enough memory for tensors of 900.00 TB" in run("bench", "--size", "900TB", code=1).stderr


@pytest.mark.parametrize("platform", slow_but(["nonsense"], ["cuda", "nonsense"]))
def test_doctor_says_that_jax_has_no_device(platform: str) -> None:
    if platform == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    done = _process("doctor", JAX_PLATFORMS=platform)
    assert done.returncode == 1
    assert "broken: JAX has no device: " in done.stdout
    assert platform in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_names_from_a_file_cannot_control_the_terminal_or_break_the_stream(tmp_path: Folder) -> None:
    path = tmp_path / "a.safetensors"
    save_state_dict(path, {"a\x1b[31m\nb.weight": torch.ones(2), "é.weight": torch.ones(2)})
    done = _process("inspect", str(path), PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert r"a\x1b[31m\nb" in done.stdout
    assert r"\xe9" in done.stdout


def test_every_key_that_does_not_fit_is_listed(nets: dict[str, torch.Tensor], tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "a.pt", nets | {f"more{n}.weight": torch.ones(2) for n in range(40)})
    text = run(
        "plan", "a.pt", "--to", "flax", "--template", factory("nnx_net"), "--model", factory("Net"), code=1
    )
    assert all(f"more{n}.weight" in text.stderr for n in range(40))


def test_a_note_says_what_was_read_and_left_out_of_a_torch_file(
    tmp_path: Folder, nets: dict[str, torch.Tensor]
) -> None:
    torch.save({"model": nets | {"fc._extra_state": {"x": 1}}, "epoch": 3}, tmp_path / "a.pt")
    text = run("convert", "a.pt", "b.safetensors", "--to", "torch").stdout
    assert "note: a.pt was read as the entry 'model', without what is not a tensor: fc._extra_state" in text


# --- parsing and formatting ----------------------------------------------------------------------------


def test_sizes_and_dtypes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("1GB", "1 GiB", "512mb", "2.5K", "7")] == [
        10**9, 2**30, 512 * 10**6, 2500, 7,
    ]  # fmt: skip
    assert parse_dtype("BF16") is torch.bfloat16
    assert parse_dtype("float8_e5m2") is torch.float8_e5m2
    assert [format_bytes(size) for size in (0, 999, 1000, 4_000_000_000, 5e12, 5e15)] == [
        "0 B", "999 B", "1.00 kB", "4.00 GB", "5.00 TB", "5000.00 TB",
    ]  # fmt: skip
    assert align_columns([["a", "b"], ["long", "c"]]) == ["a     b", "long  c"]
