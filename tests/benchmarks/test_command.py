import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import _plots
from benchmarks._case import Findings, WrongResultError
from benchmarks._record import Suite, load, save
from benchmarks._setting import Setting, why_no_device
from benchmarks._suites import SUITES


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, suite_of: Callable[..., Suite]) -> SimpleNamespace:
    """A suite that times nothing, as the only one; and pictures that are not drawn."""
    module = SimpleNamespace(ratio=0.2, error=None)

    def run(setting: Setting) -> Findings:
        if module.error:
            raise module.error
        suite = suite_of(ratio=module.ratio)
        return Findings(list(suite.cases), list(suite.promises), ["A fact."])

    module.run = run
    monkeypatch.setitem(sys.modules, "a_tiny_suite", module)
    monkeypatch.setattr(_plots, "draw", lambda suite, folder: [folder / "picture.svg"])
    monkeypatch.setattr(command, "SUITES", {"tiny": "a_tiny_suite"})
    monkeypatch.setitem(SUITES, "tiny", "a_tiny_suite")
    return module


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--tolerance", "0.9"], "0.9 is not above 1"),
        (["--tolerance", "nan"], "nan is not above 1"),
        (["--tolerance", "much"], "invalid _tolerance value: 'much'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_argument_ends_with_status_2_and_says_what_is_wrong(arguments: list[str], said: str, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_ends_with_status_2_and_one_line(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # which the command sets, and we undo
    assert command.main(["exchange", "--device", "cuda"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("benchmarks: no --device cuda here: torch sees no CUDA device")


def test_a_gpu_that_torch_sees_and_jax_does_not_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch):
    def none(_: str) -> None:
        raise RuntimeError("Unknown backend")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("jax.devices", none)
    assert why_no_device("cuda").startswith("JAX sees no CUDA device")


def test_without_a_suite_every_suite_runs_and_is_written(tiny, tmp_path: Path, capsys):
    assert command.main(["--output", str(tmp_path)]) == 0
    (suite,) = load(tmp_path / "cpu.json")
    assert suite.name == "tiny"
    assert suite.provenance["versions"]["torch"]
    printed = capsys.readouterr().out
    assert "What we promise, and what was measured" in printed
    assert "A fact." in printed
    assert f"wrote {tmp_path / 'cpu.json'}" in printed


def test_a_run_elsewhere_leaves_the_committed_results_and_the_page_alone(tiny, tmp_path: Path, root: Path):
    kept = [*(root / "benchmarks" / "results").glob("*"), root / "docs" / "benchmarks.md"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert command.main(["tiny", "--output", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_planted_regression_ends_with_status_1_and_is_named(tiny, tmp_path: Path, suite_of, capsys):
    old = save(tmp_path / "old", "cpu", [suite_of(name="tiny", ratio=0.1)])
    assert command.main(["tiny", "--output", str(tmp_path), "--compare", str(old)]) == 1
    assert "tiny: to_jax/headline, torchjax-bridge against stock DLPack" in " ".join(
        capsys.readouterr().out.split()
    )


def test_no_regression_ends_with_status_0(tiny, tmp_path: Path, suite_of, capsys):
    old = save(tmp_path, "cpu", [suite_of(name="tiny")])  # the very file that the run replaces
    assert command.main(["tiny", "--output", str(tmp_path), "--compare", str(old)]) == 0
    assert "0 regressions" in capsys.readouterr().out


def test_a_file_that_cannot_be_compared_ends_with_status_2_before_anything_runs(tiny, tmp_path: Path, capsys):
    tiny.error = AssertionError("the suite ran")
    assert command.main(["tiny", "--output", str(tmp_path), "--compare", str(tmp_path / "no.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_result_ends_with_status_1_and_writes_nothing(tiny, tmp_path: Path, capsys):
    tiny.error = WrongResultError("to_jax/headline: torchjax-bridge: the values differ")
    assert command.main(["tiny", "--output", str(tmp_path)]) == 1
    assert "the values differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_run_is_whole_and_says_that_there_are_no_pictures(
    tiny, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    def draw(*_: object) -> None:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(_plots, "draw", draw)
    assert command.main(["tiny", "--output", str(tmp_path)]) == 0
    assert "no pictures:" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


def test_report_draws_the_results_of_a_folder(tmp_path: Path, suite_of):
    pytest.importorskip("matplotlib")
    save(tmp_path, "cpu", [suite_of()])
    assert command.main(["report", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "exchange-latency-cpu.png").exists()


def test_peers_that_cannot_be_timed_are_among_the_facts(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch_jax_interop", None)
    monkeypatch.setitem(sys.modules, "wrap_torch2jax", None)
    command.main(["tiny", "--peers", "--output", str(tmp_path)])
    facts = load(tmp_path / "cpu.json")[0].facts
    assert [fact.split(":")[0] for fact in facts if "instal" in fact] == [
        "torch-jax-interop",
        "wrap-torch2jax",
    ]
