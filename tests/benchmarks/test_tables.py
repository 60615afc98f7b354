import doctest
import sys

import pytest

from benchmarks import _units
from benchmarks._tables import show, tables


def test_the_promises_come_first_and_panels_last(suite_of):
    titles = [table.title for table in tables(suite_of())]
    assert titles == [
        "What we promise, and what was measured",
        "What does one tensor cost?",
        "Peak memory of a process",
        "torch → JAX, median time",
    ]


def test_a_promise_is_shown_with_its_verdict(suite_of):
    assert tables(suite_of(promised=1.5))[0].rows[0][1:] == (
        "at most 1.6 x",
        "1.50 x",
        "1.47 to 1.53",
        "held",
    )
    assert tables(suite_of(promised=1.7))[0].rows[0][-1] == "missed"


def test_a_panel_is_sizes_by_candidates_with_ratio_and_rate(suite_of):
    panel = tables(suite_of(ratio=0.2))[-1]
    assert panel.header == (
        "size",
        "stock DLPack",
        "torchjax-bridge",
        "memcpy, warm",
        "other",
        "ours against stock DLPack",
        "ours, rate",
    )
    assert panel.rows[1] == ("4 KB", "100 µs", "20.0 µs", "4.10 µs", "refused", "5.00x faster", "205 MB/s")
    assert panel.caption == "other was refused, not timed: shares memory, which a copy must not"


def test_memory_is_sizes_by_candidates(suite_of):
    memory = tables(suite_of())[-2]
    assert memory.header == ("size", "convert", "load it whole", "the imports alone")
    assert memory.rows == (("256 MB", "286 MB", "763 MB", ""), ("1 GB", "286 MB", "", "238 MB"))


def test_every_row_is_as_long_as_its_header(suite_of):
    for table in tables(suite_of()):
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_without_rich_the_table_is_aligned_text(suite_of, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show(tables(suite_of())[-1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "torch → JAX, median time"
    assert len({len(line) for line in lines[2:6]}) == 1
    assert lines[4].startswith("4 KB")


def test_with_rich_every_cell_is_printed(suite_of, capsys):
    pytest.importorskip("rich")
    table = tables(suite_of())[0]
    show(table)
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in table.rows[0])


def test_the_units_do_as_their_examples_say():
    assert doctest.testmod(_units).failed == 0
    assert doctest.testmod(_units).attempted >= 7
