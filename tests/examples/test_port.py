"""The command of the example, end to end: what it prints, what it checks, and how it fails."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from examples.cifar10 import checkpoint, conversion, data, networks, nnx_nets, port
from examples.cifar10.networks import NETWORKS

NET, RESNET20 = NETWORKS


def row(table: str, heading: str) -> list[str]:
    """The cells of a row of a printed table, without empty ones."""
    (line,) = [line for line in table.splitlines() if line.startswith("│") and heading in line]
    return [cell.strip() for cell in line.split("│")[2:] if cell.strip()]


def run(*arguments: str | Path) -> int:
    """The exit code of the command."""
    try:
        return port.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command without options but ``--save``, in a process of its own that cannot reach any network."""
    saved = tmp_path_factory.mktemp("demo") / "tuned.safetensors"
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('the demo must work offline')\n"
        "socket.socket.connect = refuse\n"
        "from examples.cifar10 import port\n"
        "sys.exit(port.main(sys.argv[1:]))"
    )
    more = ("--source", str(saved.with_name("net_flax.py")), "--plan", "--steps", "60")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "--save", str(saved), *more],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "COLUMNS": "80", "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    return done, saved


def test_the_demo_holds_every_check_offline(demo: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = demo
    assert done.returncode == 0, done.stderr
    out = done.stdout
    across, back = out.split("60 steps of fine-tuning in JAX")
    assert across.startswith("Net, from torch to Flax, on the first 20 images of the CIFAR-10 test set\n")
    assert row(across, "parameters moved") == ["62,006"] * 4
    assert row(across, "back in torch") == ["same bits"] * 3
    assert row(across, "predictions that agree") == ["20/20"] * 3
    assert len(set(row(across, "accuracy"))) == 1
    assert all(float(cell) <= 1e-4 for cell in row(across, "difference of logits"))
    assert all(re.fullmatch(r"[\d.,]+ m?s", cell) for cell in row(across, "conversion"))
    assert len(row(across, "forward, 20 images")) == 4
    assert "fc1.weight" in across
    assert "(120, 16, 5, 5)" in across  # the plan says how the flattened features are reordered
    assert re.search(r"the port is Net: [23]\d lines, 1 class\n", across)
    assert "class Net(nnx.Module)" in demo[1].with_name("net_flax.py").read_text()
    before, tuned, returned = map(float, row(back, "loss on all images"))
    assert tuned == returned < before
    assert row(back, "predictions that agree") == ["20/20"]
    assert float(row(back, "difference of logits")[0]) <= 1e-4
    assert back.splitlines()[-2] == "Every check held."


def test_progress_and_nothing_else_goes_to_stderr(
    demo: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    (line,) = filter(None, demo[0].stderr.splitlines())  # older releases of rich end in an empty line
    assert line.startswith("fine-tuning in JAX, loss 0.0")
    assert "60/60" in line


def test_what_is_printed_fits_into_eighty_columns_but_for_the_plan(
    demo: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    out = demo[0].stdout
    start, end = out.index("plan:"), out.index("60 steps")
    assert max(map(len, (out[:start] + out[end:]).splitlines()[:-1])) <= 80
    assert "\x1b" not in out


def test_the_saved_weights_are_the_fine_tuned_ones(
    demo: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, saved = demo
    images = data.packaged()
    net = NET.load(checkpoint.read(saved))
    pixels = torch.from_numpy(images.normalised()).permute(0, 3, 1, 2)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(net(pixels), torch.from_numpy(images.labels).long())
    (_, _, printed) = row(done.stdout.split("fine-tuning in JAX")[1], "loss on all images")
    assert float(printed) == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.slow  # a minute
def test_the_network_of_others_computes_the_same_on_two_thousand_images(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shared / "data/checkpoints/resnet20-12fca82f.th"
    code = run("--checkpoint", weights, "--data", shared / "data/cifar10/test.npz", "--steps", "4")
    out, err = capsys.readouterr()
    assert code == 0, err
    across, back = out.split("4 steps of fine-tuning")
    assert row(across, "parameters moved") == ["269,722"] * 4
    assert row(across, "running statistics") == ["1,376"] * 4
    assert row(across, "predictions that agree") == ["2,000/2,000"] * 3
    assert all(float(cell) <= 1e-4 for cell in row(across, "difference of logits"))
    (accuracy,) = set(row(across, "accuracy"))
    assert 80 < float(accuracy.rstrip("%")) < 83  # 91.7 on the originals; these went through JPEG
    assert row(across, "back in torch") == ["same bits"] * 3
    assert row(back, "predictions that agree") == ["2,000/2,000"]


def test_the_network_of_others_is_ported_from_torch_alone(
    shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "_SHARED", shared / "data")
    assert run("--others", "--steps", "4") == 0
    across = capsys.readouterr().out.split("4 steps of fine-tuning")[0]
    assert row(across, "predictions that agree") == ["200/200"] * 3


def test_without_the_network_of_others_the_demo_says_why_it_skips_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "_SHARED", tmp_path)
    assert run("--others") == 0
    assert "ResNet-20 is skipped: there is no " in capsys.readouterr().out


# --- checks that must fail ---------------------------------------------------------------------------


@pytest.fixture
def resnet20(tmp_path: Path) -> Path:
    """A ResNet-20 with random weights and statistics."""
    torch.manual_seed(0)
    net = RESNET20.make_torch()
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.3)
    path = tmp_path / "resnet20.safetensors"
    checkpoint.write(path, net.state_dict())
    return path


class Swapped(nnx_nets.BasicBlock):
    """Uses its two convolutions, which have equal shapes in most blocks, in the wrong order."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(in_channels, channels, stride, rngs=rngs)
        self.swap = in_channels == channels

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.swap:
            self.conv1, self.conv2 = self.conv2, self.conv1
        result = super().__call__(x)
        if self.swap:
            self.conv1, self.conv2 = self.conv2, self.conv1
        return result


@pytest.mark.slow
def test_a_twin_that_swaps_two_equal_layers_fails_and_is_named(
    resnet20: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nnx_nets, "BasicBlock", Swapped)
    saved = tmp_path / "tuned.safetensors"
    assert run("--checkpoint", resnet20, "--save", saved) == 1
    out, err = capsys.readouterr()
    assert "CHANGED" not in out
    error = err[err.index("error:") :]
    assert re.match(r"error: \d of the checks failed:\n  nnx: max \|difference of logits\| is 0.\d", error)
    assert "linen" not in error
    assert "fine-tuning" not in err
    assert not saved.exists()


def test_without_the_rule_for_the_flattened_features_the_port_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "NETWORKS", (replace(NET, rules=()), RESNET20))
    assert run() == 1
    assert 'rules=[Flatten("fc1", (16, 5, 5))]' in capsys.readouterr().err


def test_a_wrong_rule_for_the_flattened_features_is_caught_by_the_logits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (flatten,) = NET.rules
    wrong = type(flatten)(flatten.torch, None)  # "the twin flattens as torch does"
    monkeypatch.setattr(networks, "NETWORKS", (replace(NET, rules=(wrong,)), RESNET20))
    assert run() == 1
    err = capsys.readouterr().err
    assert "nnx: max |difference of logits| is " in err
    assert "linen: max |difference of logits| is " in err


def test_one_bit_that_changes_on_the_round_trip_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_bit_off(model: object, net: torch.nn.Module, **options: object) -> dict[str, torch.Tensor]:
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        state["conv1.bias"].view(torch.int32)[3] ^= 1
        return state

    monkeypatch.setattr(conversion, "to_state_dict", one_bit_off)
    assert run() == 1
    out, err = capsys.readouterr()
    assert row(out, "back in torch") == ["CHANGED"] * 3
    assert err.split("error: ")[1].split("\n") == [
        "3 of the checks failed:",
        "  port: torch -> Flax -> torch is not bitwise equal",
        "  nnx: torch -> Flax -> torch is not bitwise equal",
        "  linen: torch -> Flax -> torch is not bitwise equal",
        "",
    ]


@pytest.mark.slow
def test_fine_tuning_that_does_not_lower_the_loss_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "finetune", lambda model, images, *, steps, seed: [0.0] * steps)
    assert run() == 1
    assert "fine-tuning: the loss did not fall, it went from" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_come_back_otherwise_are_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(model: nnx.Module, net: torch.nn.Module, **options: object) -> dict[str, torch.Tensor]:
        return {name: tensor * 1.01 for name, tensor in net.state_dict().items()}

    monkeypatch.setattr(port, "to_state_dict", spoilt)
    assert run("--steps", "5") == 1
    assert "back in torch: max |difference of logits| is " in capsys.readouterr().err


# --- bad input ---------------------------------------------------------------------------------------


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command said, which must be one line on stderr and nothing else."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--oops"], "unrecognized arguments: --oops (try --help)"),
        (["--dat", "x"], "unrecognized arguments: --dat x (try --help)"),
        (["--steps", "0"], "argument --steps: must be at least 1, not 0 (try --help)"),
        (["--steps", "many"], "argument --steps: invalid number value: 'many' (try --help)"),
        (["--seed", "-1"], "argument --seed: must be at least 0, not -1 (try --help)"),
        (["--data", "x", "--download"], "argument --download: not allowed with argument --data (try --help)"),
        (["--checkpoint"], "argument --checkpoint: expected one argument (try --help)"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert one_error(capsys) == message


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    for option in ("--checkpoint", "--data", "--download", "--steps", "--seed", "--plan", "--save"):
        assert f"\n  {option}" in said


def test_bad_files_are_one_line_and_exit_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.safetensors"
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(port.CHECKPOINT.read_bytes()[:100_000])
    for arguments, message in (
        (["--data", tmp_path / "empty"], f"{tmp_path}/empty holds neither test_batch.bin nor test.npz"),
        (["--data", tmp_path / "none"], f"there is no {tmp_path}/none"),
        (["--checkpoint", tmp_path / "a.pt"], f"there is no checkpoint {tmp_path}/a.pt"),
        (["--checkpoint", cut], f"{cut} is truncated or not a safetensors file"),
        (
            ["--save", tmp_path / "no" / "x"],
            f"cannot write {tmp_path}/no/x: there is no folder {tmp_path}/no",
        ),
    ):
        assert run("--save", saved, *arguments) == 1
        assert one_error(capsys).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "empty"]


def test_a_dropped_key_a_foreign_one_and_a_wrong_shape_are_listed_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.read(port.CHECKPOINT)
    del state["fc2.weight"]
    state["fc9.weight"] = torch.ones(2)
    state["fc3.bias"] = torch.ones(100)
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, state)
    assert run("--checkpoint", path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.split("\n") == [
        "error: the checkpoint does not fit Net:",
        "  mismatch: fc3.bias is (100,) torch.float32, not (10,) torch.float32",
        "  missing: fc2.weight",
        "  unexpected: fc9.weight",
        "",
    ]


def test_another_architecture_is_named_as_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.nn.LSTM(2, 2).state_dict(), path)
    assert run("--checkpoint", path) == 1
    assert one_error(capsys).startswith("the checkpoint is neither Net nor ResNet-20: it holds weight_ih_l0")


def test_an_npz_of_the_packaged_images_gives_the_logits_of_the_packaged_images(tmp_path: Path) -> None:
    images = data.packaged()
    np.savez(tmp_path / "a.npz", images=images.pixels, labels=images.labels)
    assert (data.read(tmp_path / "a.npz").normalised() == images.normalised()).all()
