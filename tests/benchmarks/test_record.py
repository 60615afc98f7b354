import json
import os
from pathlib import Path

import pytest

from benchmarks._record import Promise, RecordError, load, save
from benchmarks._timing import Spread


def test_what_was_saved_is_loaded(tmp_path: Path, suite_of):
    suite = suite_of()
    assert load(save(tmp_path, "cpu", [suite])) == [suite]


def test_running_one_suite_again_replaces_that_suite_alone(tmp_path: Path, suite_of):
    save(tmp_path, "cpu", [suite_of(name="exchange"), suite_of(name="wrap")])
    save(tmp_path, "cpu", [suite_of(name="exchange", ratio=0.5)])
    ratios = {
        suite.name: suite.cases[0].row("torchjax-bridge").ratio.median
        for suite in load(tmp_path / "cpu.json")
    }
    assert ratios == {"exchange": 0.5, "wrap": 0.2}


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, suite_of, monkeypatch):
    path = save(tmp_path, "cpu", [suite_of()])
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, "cpu", [suite_of(ratio=0.9)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_plain_json_with_a_schema_number(tmp_path: Path, suite_of):
    document = json.loads(save(tmp_path, "cpu", [suite_of()]).read_text())
    assert (document["schema"], document["device"]) == (1, "cpu")
    row = document["suites"]["exchange"]["cases"][0]["rows"][1]
    assert row["name"] == "torchjax-bridge"
    assert set(row["microseconds"]) == {"q1", "median", "q3", "best"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot read"),
        ("[]", "schema 'list'"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "suites": {"exchange": {}}}', "damaged: KeyError"),
        (
            '{"schema": 1, "suites": {"exchange": {"cases": [], "promises": [], "facts": []}}}',
            "damaged: TypeError",
        ),
        ('{"schema": 1}', "damaged: KeyError: 'suites'"),
    ],
)
def test_a_file_that_is_no_result_file_is_refused_with_the_reason(tmp_path: Path, content: str, said: str):
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=said):
        load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(RecordError, match=r"no\.json"):
        load(tmp_path / "no.json")


@pytest.mark.parametrize(
    ("sense", "limit", "median", "held"),
    [
        ("at most", 1.6, 1.6, True),
        ("at most", 1.6, 1.61, False),
        ("at least", 4.5, 4.5, True),
        ("at least", 4.5, 4.4, False),
        ("reported", None, 7.0, None),
    ],
)
def test_a_promise_is_held_by_the_median(sense: str, limit: float | None, median: float, held: bool | None):
    assert Promise("", sense, limit, "x", Spread(0.0, median, 9.0, 0.0)).held is held


def test_a_promise_is_clearly_missed_when_the_kinder_quartile_misses_it():
    def missed(sense: str, low: float, high: float) -> bool:
        return Promise("", sense, 2.0, "x", Spread(low, (low + high) / 2, high, low)).clearly_missed

    assert (missed("at most", 2.1, 3.0), missed("at most", 1.9, 3.0)) == (True, False)
    assert (missed("at least", 1.0, 1.9), missed("at least", 1.0, 2.1)) == (True, False)
    assert not Promise("", "reported", None, "x", Spread(9.0, 9.0, 9.0, 9.0)).clearly_missed
