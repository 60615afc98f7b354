"""The proof on a GPU, without one: its processes, its verdicts, its page, and its rehearsal, which is no result."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import _suites
from benchmarks._case import Findings
from benchmarks._record import RecordError, Suite, load, save
from benchmarks._rehearsal import MARK
from benchmarks._report import PageError, section
from benchmarks._setting import OutOfTime, Setting
from benchmarks.gpu import (
    _command,
    _page,
    _preflight,
    _process,
    _stages,
    _stand_in,
    _tests,
    _verdicts,
    flagship,
    publish,
)
from benchmarks.gpu._budget import Budget
from benchmarks.gpu._run import Ran, Run

# --- processes --------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path):
    child = "import time; time.sleep(600)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"print('child', subprocess.Popen([sys.executable, '-c', {child!r}]).pid, '.', flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    started = _process.start([sys.executable, "-c", code], log, {}, "HEAD\n")
    while not (said := re.search(r"^child (\d+) \.$", log.read_text(), re.MULTILINE)):
        time.sleep(0.01)
    grandchild = int(said[1])
    _process.end(started, grace=0.1)
    assert log.read_text().startswith("HEAD\n$ ")
    assert started.poll() == -signal.SIGKILL
    for _ in range(500):
        if not alive(grandchild):
            break
        time.sleep(0.01)
    assert not alive(grandchild)


def test_how_a_command_ended_is_said(tmp_path: Path):
    log = tmp_path / "log"
    good = _process.run([sys.executable, "-c", "print('done')"], log, {}, 60)
    assert (good.status, good.timed_out) == (0, False)
    late = _process.run([sys.executable, "-c", "import time; time.sleep(600)"], log, {}, 0.2)
    assert late.timed_out
    assert "its limit" in late.words
    dead = _process.run([sys.executable, "-c", "import os; os.abort()"], log, {}, 60)
    assert "ended by SIGABRT" in dead.words


# --- tests in processes ---------------------------------------------------------------------------------------

A_TEST_FILE = """
import os, time
import pytest

pytestmark = pytest.mark.gpu

def test_good(): pass
def test_bad(): assert 1 == 2
def test_crash(): os.abort()
def test_after_the_crash(): pass
def test_hang(): time.sleep(600)
def test_after_the_hang(): pass
def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after_the_lost_device(): assert os.getpid() != int(os.environ.get("LOST", 0))
@pytest.mark.skip(reason="for a reason")
def test_skipped(): pass
"""


@pytest.mark.slow
def test_a_test_that_crashes_or_hangs_takes_no_other_along(tmp_path: Path, root: Path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_some.py").write_text(A_TEST_FILE)
    folder = tmp_path / "out"
    outcomes = _tests.run_tests(
        ["test_some.py"],
        folder,
        {"PYTHONPATH": str(root)},
        Budget(120),
        each=2,
        rehearse=False,
        root=tmp_path,
    )
    found = {one.test.rpartition("::")[2]: one for one in outcomes}
    assert {name: one.outcome for name, one in found.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_crash": "crashed",
        "test_after_the_crash": "passed",
        "test_hang": "hung",
        "test_after_the_hang": "passed",
        "test_lost": "failed",
        "test_after_the_lost_device": "passed",
        "test_skipped": "skipped",
    }
    assert "assert 1 == 2" in found["test_bad"].text
    assert "Aborted" in found["test_crash"].text or "status -6" in found["test_crash"].text
    assert "no end within 2 s" in found["test_hang"].text
    assert "for a reason" in found["test_skipped"].text
    starts = (folder / "logs" / "tests.log").read_text().count("$ ")
    assert starts == 4, "one process, and one more after each of the crash, the hang and the lost device"
    assert _tests.load_outcomes(folder) == outcomes


def test_tests_that_the_minutes_do_not_reach_are_said_to_be_so(tmp_path: Path):
    outcomes = _tests.run_tests(
        ["tests/never.py"], tmp_path, {}, Budget(0), each=2, rehearse=True, root=tmp_path
    )
    assert [(one.test, one.outcome) for one in outcomes] == [("tests/never.py", "not run")]
    assert json.loads((tmp_path / "tests.jsonl").read_text())["rehearsal"] == MARK


def test_every_file_with_tests_for_a_gpu_is_run(root: Path):
    marked = {
        str(file.relative_to(root))
        for file in (root / "tests").rglob("test_*.py")
        if "mark.gpu" in file.read_text(encoding="utf-8") and file.name != "test_gpu.py"
    }
    marked |= {f"tests/wrap/{way}/test_gpu.py" for way in ("jax_in_torch", "torch_in_jax")}
    assert marked == set(_stages.TESTS)


def test_every_part_of_a_tests_name_that_a_promise_rests_on_is_a_test(root: Path):
    text = "\n".join(f"{name}::{(root / name).read_text(encoding='utf-8')}" for name in _stages.TESTS)
    for _, parts in _verdicts._BY_TESTS:
        for part in parts:
            assert part.rpartition("::")[2] in text, part


# --- verdicts and the page -------------------------------------------------------------------------------------


def a_run(*, rehearsal: bool = False, outcome: str = "done", complete: bool = True) -> Run:
    found = {
        "python": "3.12.1",
        "versions": {"torch": "2.11.0"},
        "missing": {"foolbox": "real images"},
        "gpus": {"torch": ["NVIDIA H200"], "jax": ["cuda:0"]},
        "card": "NVIDIA H200, 580.159.03, 143771 MiB",
        "blockers": (),
    }
    stages = [Ran("doctor", "what is installed", outcome, 3.0, "exit status 0 after 3 s", "logs/doctor.log")]
    return Run(8.0, rehearsal, "2026-01-02T03:04:05+00:00", "0123456789ab", found, stages, complete)


def outcomes_of(folder: Path, outcome: str, text: str = "") -> None:
    for _, parts in _verdicts._BY_TESTS:
        for part in parts:
            name = part if part.endswith(".py") else f"tests/{part}"
            _tests._append(folder, _tests.Outcome(f"{name}::test", outcome, 1.0, text), rehearse=False)


def test_a_promise_is_held_only_if_all_of_its_evidence_was_seen(tmp_path: Path):
    outcomes_of(tmp_path, "passed")
    tests = _tests.load_outcomes(tmp_path)
    by_tests = len(_verdicts._BY_TESTS)
    found = [one.verdict for one in _verdicts.verdicts(a_run(), tests, [])]
    assert found == [_verdicts.HELD] * (1 + by_tests) + [_verdicts.UNKNOWN] * 2
    none, some = _verdicts.verdicts(a_run(), tests[2:], [])[1:3]
    assert (none.verdict, none.evidence) == (_verdicts.UNKNOWN, "its tests were not reached")
    assert some.verdict == _verdicts.UNKNOWN
    assert "no test was collected for exchange/test_cuda.py::test_every_dtype" in some.evidence
    one_hung = [*tests[:-1], replace(tests[-1], outcome="hung")]
    assert _verdicts.verdicts(a_run(), one_hung, [])[by_tests].verdict == _verdicts.BROKEN
    skipped = [replace(one, outcome="skipped") for one in tests]
    assert {one.verdict for one in _verdicts.verdicts(a_run(), skipped, [])[1:]} == {_verdicts.UNKNOWN}


def test_figures_are_promises_too(suite_of: Callable[..., Suite]):
    good, bad = suite_of(device="cuda", promised=1.5), suite_of(device="cuda", promised=1.7)
    for suite, verdict in ((good, _verdicts.HELD), (bad, _verdicts.BROKEN)):
        last = _verdicts.verdicts(a_run(), [], [suite])[-1]
        assert (last.verdict, last.evidence) == (
            verdict,
            f"{suite.promises[0].measured.median:.4g} x; promised at most 1.6 x",
        )


def test_a_run_that_was_cut_off_leaves_a_page_of_what_it_has(tmp_path: Path, suite_of: Callable[..., Suite]):
    outcomes_of(tmp_path, "passed")
    _tests._append(
        tmp_path, _tests.Outcome("tests/a.py::test_b", "failed", 2.0, "E   ValueError: so"), rehearse=False
    )
    save(tmp_path, "cuda", [suite_of(device="cuda")])
    text = _page.write_page(a_run(complete=False), tmp_path).read_text(encoding="utf-8")
    for words in (
        "was not finished",
        "torch sees NVIDIA H200; jax sees cuda:0",
        "foolbox (real images)",
        "tests/a.py::test_b",
        "ValueError: so",
        "A fact.",
        "the stage flagship was not reached",
    ):
        assert words in text
    assert MARK not in text
    empty = _page.write_page(a_run(complete=False), tmp_path / "..").read_text(encoding="utf-8")
    assert "promises held" in empty


def test_in_a_rehearsal_an_assertion_is_told_from_an_error(tmp_path: Path):
    for name, text in (
        ("needs_a_gpu", "E   assert 'cpu' == 'gpu'"),
        ("is_broken", "E   TypeError: f() takes 1"),
    ):
        _tests._append(tmp_path, _tests.Outcome(f"t.py::{name}", "failed", 1.0, text), rehearse=True)
    text = _page.body(a_run(rehearsal=True), tmp_path)
    assert text.startswith(f"> **{MARK}.**")
    assert "| t.py::is_broken | failed | 1.0 | TypeError: f() takes 1 |" in text
    assert "1 tests ended where only a GPU goes on, as they must: `needs_a_gpu`" in text


# --- the command -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_is_missing_and_leaves_a_page(tmp_path: Path, capsys):
    assert command.main(["gpu", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    for words in (f"torch {torch.__version__} sees no CUDA device", "JAX sees no CUDA device"):
        assert words in said
        assert words in text


def test_a_package_that_is_missing_is_named_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_preflight, "_NEEDED", {"a-package-that-nobody-has": ""})
    found = _preflight.look(os.environ, rehearse=False)
    assert len(found.blockers) == 1
    assert found.blockers[0].startswith("a-package-that-nobody-has is not installed in ")


def test_the_page_is_written_even_where_torch_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "benchmarks.gpu._page", None)
    run = a_run()
    run.found["blockers"] = ("torch is not installed in python",)
    page = _command._keep(run, tmp_path)
    assert "- torch is not installed in python" in page.read_text()


@pytest.mark.parametrize("option", ["--minutes", "--each"])
@pytest.mark.parametrize("time", ["0", "-1", "nan", "much"])
def test_times_that_are_none_are_refused(option: str, time: str, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["gpu", option, time])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert command.main(["gpu", "--rehearse", "--output", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_run_that_has_results_is_moved_aside_and_a_file_is_no_folder(tmp_path: Path):
    folder = tmp_path / "gpu"
    for run, kept in ((a_run(rehearsal=True), False), (a_run(), True)):
        assert _command._take(folder) == ""
        run.save(folder)
        (folder / "cuda.json").write_text("figures")
        assert _command._take(folder) == ""
        assert [file.name for file in folder.iterdir()] == ["logs"]
        aside = tmp_path / "gpu-2026-01-02T030405"
        assert aside.exists() == kept
    assert (aside / "cuda.json").read_text() == "figures"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.json").write_text('{"of": "another tool"}')
    assert "holds something else" in _command._take(foreign)
    assert (foreign / "run.json").exists()
    assert "cannot write to" in _command._take(foreign / "run.json")


def test_a_checkpoint_is_read_without_safetensors():
    safetensors = pytest.importorskip("safetensors.torch")
    state = flagship.read_float32(flagship.port.CHECKPOINT)
    expected = safetensors.load_file(flagship.port.CHECKPOINT)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_stage_whose_package_is_missing_breaks_no_promise(tmp_path: Path):
    run = a_run()
    run.stages.clear()
    stage = _stages.Stage("flagship", "needs a package", 60, "this", needs=("torch", "foolbox"))
    _command._run_stages([stage], run, tmp_path, {}, Budget(60), 60)
    assert [(one.outcome, one.why) for one in run.stages] == [("skipped", "foolbox was not found")]


def test_an_interrupted_stage_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_command, "run_process", interrupted)
    run = a_run()
    stage = _stages.Stage("flagship", "is interrupted", 60, "this")
    with pytest.raises(KeyboardInterrupt):
        _command._run_stages([stage], run, tmp_path, {}, Budget(60), 60)
    assert [(one.stage, one.outcome) for one in run.stages[1:]] == [("flagship", "cut off")]


def test_stages_end_when_the_minutes_are_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = a_run()
    run.stages.clear()
    stages = [
        _stages.Stage(
            "first", "sleeps", 480, "timeit", lambda *_: ["-n1", "-r1", "import time; time.sleep(600)"]
        ),
        _stages.Stage("second", "is not reached", 60, "this"),
        _stages.Stage("third", "needs a tool", 60, "this", tool="a-tool-that-nobody-has"),
    ]
    _command._run_stages(stages, run, tmp_path, {}, Budget(1.5), 60)
    assert [(one.stage, one.outcome) for one in run.stages] == [
        ("first", "cut off"),
        ("second", "not reached"),
        ("third", "skipped"),
    ]
    assert "cut off" in (tmp_path / "summary.md").read_text()


# --- a rehearsal is no result -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rehearsal_marks_every_file_and_is_refused_as_a_result(tmp_path: Path):
    folder = tmp_path / "rehearsal"
    asked = ["gpu", "--rehearse", "--only", "doctor", "--only", "gpu-memory", "--output", str(folder)]
    assert command.main(asked) == 0
    text = (folder / "summary.md").read_text(encoding="utf-8")
    assert "| doctor: what is installed, the trial of the fast path | done |" in text, text
    log = (folder / "logs" / "gpu-memory.log").read_text()
    assert "| gpu-memory: what a crossing, a conversion and a push need beside the model | done |" in text, (
        log
    )
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".png"]
    assert len(files) >= 4
    for file in files:
        assert MARK in file.read_text(encoding="utf-8"), file
    page = tmp_path / "page.md"
    page.write_text(f"{publish.BEGIN}\n{publish.END}\n")
    with pytest.raises(RecordError, match="is a rehearsal"):
        publish.publish(folder, tmp_path, page)
    assert page.read_text() == f"{publish.BEGIN}\n{publish.END}\n"
    with pytest.raises(PageError, match="is no result"):
        section(folder, "pictures")


def test_no_two_stand_ins_are_one_object_for_torch_compile_keeps_rules_by_object():
    cuda = SimpleNamespace()
    _stand_in._stand_in_for_streams(cuda)
    assert len({id(one) for one in vars(cuda).values()}) == len(vars(cuda)) > 20


def marked(suite: Suite) -> Suite:
    return replace(suite, provenance={**suite.provenance, "rehearsal": MARK})


def test_a_rehearsal_does_not_mix_with_results(tmp_path: Path, suite_of: Callable[..., Suite]):
    save(tmp_path, "cuda", [suite_of(device="cuda")])
    before = (tmp_path / "cuda.json").read_bytes()
    with pytest.raises(RecordError, match="a rehearsal beside results"):
        save(tmp_path, "cuda", [marked(suite_of(device="cuda", name="wrap-jax"))])
    assert (tmp_path / "cuda.json").read_bytes() == before


def test_a_run_in_which_nothing_ran_does_not_replace_the_last_one(tmp_path: Path):
    run = a_run()
    run.stages.clear()
    run.save(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"{publish.BEGIN}\nthe last one\n{publish.END}\n")
    with pytest.raises(RecordError, match="nothing ran"):
        publish.publish(tmp_path, tmp_path, page)
    assert "the last one" in page.read_text()


def test_a_finished_run_goes_into_the_manual(tmp_path: Path, suite_of: Callable[..., Suite]):
    folder, results, page = tmp_path / "run", tmp_path / "results", tmp_path / "cuda.md"
    folder.mkdir()
    a_run().save(folder)
    save(folder, "cuda", [suite_of(device="cuda")])
    page.write_text(f"Before.\n{publish.BEGIN}\nold\n{publish.END}\nAfter.\n")
    publish.publish(folder, results, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "NVIDIA H200" in text
    assert "old" not in text
    assert [suite.name for suite in load(results / "cuda.json")] == ["exchange"]
    with pytest.raises(RecordError, match="holds no run"):
        publish.publish(results, results, page)


def test_a_suite_that_is_asked_to_stop_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suite_of: Callable[..., Suite]
):
    def run(setting: Setting) -> Findings:
        setting.findings.cases += suite_of().cases
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("it went on")

    monkeypatch.setitem(sys.modules, "a_long_suite", SimpleNamespace(run=run))
    for table in (command.SUITES, _suites.SUITES):
        monkeypatch.setitem(table, "exchange", "a_long_suite")
    before = signal.getsignal(signal.SIGTERM)
    assert command.main(["exchange", "--output", str(tmp_path)]) == 0
    (suite,) = load(tmp_path / "cpu.json")
    assert len(suite.cases) == len(suite_of().cases)
    assert any("Its time was up" in fact for fact in suite.facts)
    assert signal.getsignal(signal.SIGTERM) is before
    assert issubclass(OutOfTime, BaseException)
    assert not issubclass(OutOfTime, Exception)
