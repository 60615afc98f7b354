import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks_command
from benchmarks.port import _child, _command
from benchmarks.port._outcome import Outcome, load, save
from benchmarks.port._table import summary, table

# --- the process of its own ---------------------------------------------------------------------------


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_outcome_of_a_child_is_read():
    code = f"import json, sys; json.dump({asdict(Outcome('s', 'm', lines=3))!r}, open(sys.argv[1], 'w'))"
    assert _child.run_in_child("s", "m", child(code), 60) == Outcome("s", "m", lines=3)


def test_a_child_that_crashes_is_a_row_that_says_so():
    code = "import os, sys; print('Fatal: a crash', file=sys.stderr, flush=True); os.abort()"
    row = _child.run_in_child("s", "m", child(code), 60)
    assert row.why_not == "the process ended with status -6: Fatal: a crash"


def test_a_child_that_does_not_end_is_ended_with_all_that_it_started(tmp_path: Path):
    alive = tmp_path / "alive"
    grandchild = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    row = _child.run_in_child("s", "m", child(code), 0.5)
    assert row.why_not == "not done after 0.5 seconds"
    assert not alive.exists()


@pytest.mark.slow
def test_the_command_of_a_child_measures_a_model(tmp_path: Path):
    bridge = importlib.import_module("torchjax_bridge")
    if not hasattr(bridge, "port"):
        pytest.skip("there is no port yet")
    row = _child.run_in_child("example", "Net", _child.command("example", "Net", quick=True), 300)
    assert row.verdict == "yes"


# --- the command --------------------------------------------------------------------------------------

FINE = {
    "difference": 1e-6,
    "other_batch": 1e-6,
    "train": "agrees",
    "torch_ms": 2.0,
    "port_ms": 1.0,
    "batch": 64,
}


def run_of(**outcomes: Outcome):
    asked = []

    def run(set_name: str, name: str, argv: list[str], seconds: float) -> Outcome:
        asked.append((set_name, name, seconds))
        return replace(outcomes.get(name, Outcome("", "", **FINE)), set=set_name, model=name)

    return run, asked


def test_a_run_measures_what_was_asked_for_and_keeps_what_was_measured_before(tmp_path: Path, capsys):
    run, asked = run_of(vit=Outcome("", "", "no translation of torch.einsum"))
    options = ["--set", "cifar", "--timeout", "7", "--output", str(tmp_path)]
    assert _command.main([*options, "--only", "vgg", "--only", "vit"], run) == 0
    assert asked == [("cifar", "vgg", 7.0), ("cifar", "vit", 7.0)]
    assert _command.main([*options, "--only", "dla"], run) == 0
    kept = load(tmp_path / "outcomes.json")
    assert [one.model for one in kept["outcomes"]] == ["vgg", "vit", "dla"]
    assert kept["provenance"]["versions"]["torch"]
    revision = kept["provenance"]["revision"] or ""
    assert {one.revision for one in kept["outcomes"]} == {revision}
    page = (tmp_path / "table.md").read_text()
    assert "- cifar: 2 of 3 ported, 2 in training mode too" in page
    assert "no translation of torch.einsum" in page
    assert f"Rows by revision: {revision or 'an earlier one'} (3)." in page
    assert "| 0.50 |" in page
    assert "cifar: 1 of 1 ported" in capsys.readouterr().out


def test_a_wrong_port_ends_the_run_with_status_1_and_is_named(tmp_path: Path, capsys):
    run, _ = run_of(vgg=Outcome("", "", **FINE | {"other_batch": 1e-3}))
    assert _command.main(["--set", "cifar", "--only", "vgg", "--output", str(tmp_path)], run) == 1
    assert "WRONG: vgg" in capsys.readouterr().out


def test_a_model_that_no_set_has_ends_with_status_2(tmp_path: Path, capsys):
    run, asked = run_of()
    assert _command.main(["--only", "nothing", "--output", str(tmp_path)], run) == 2
    assert not asked
    assert "no model by that name" in capsys.readouterr().err


def test_a_set_whose_library_is_missing_is_left_out(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_command, "NEEDS", {"timm": "a_library_that_nobody_has"})
    assert _command.main(["--set", "timm", "--output", str(tmp_path)], run_of()[0]) == 2
    assert "the set timm is left out: a_library_that_nobody_has is not installed" in capsys.readouterr().err


def test_the_benchmarks_command_hands_port_its_own_options(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmarks_command.main(["port", "--set", "nonsense"])
    assert ended.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_a_file_holds_what_was_saved(tmp_path: Path):
    path = tmp_path / "deep" / "outcomes.json"
    first = Outcome("a", "m", difference=float("inf"))
    assert save(path, [first], {"date": "today"}) == [first]
    assert load(path) == {"provenance": {"date": "today"}, "outcomes": [first]}
    assert json.loads(path.read_text())["provenance"] == {"date": "today"}


def test_a_set_is_a_table_and_a_line():
    rows = [Outcome("a", "m", **FINE), Outcome("b", "n", "refused"), Outcome("a", "o", "refused")]
    assert [(one.title, len(one.rows)) for one in table(rows)] == [("port: a", 2), ("port: b", 1)]
    assert (
        summary(rows)
        == "- a: 1 of 2 ported, 1 in training mode too\n- b: 0 of 1 ported, 0 in training mode too\n"
    )
