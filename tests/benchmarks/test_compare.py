from dataclasses import replace

import pytest

from benchmarks._compare import compare
from benchmarks._record import RecordError


def test_a_planted_regression_is_flagged_in_every_case_it_touches(suite_of):
    found = compare([suite_of(ratio=0.2)], [suite_of(ratio=0.3)], tolerance=1.25)
    assert not found.clean
    assert len(found.regressions) == 4
    assert all(change.factor == pytest.approx(1.5) for change in found.regressions)
    assert "torchjax-bridge" in found.regressions[0].what


def test_a_machine_ten_times_slower_is_no_regression(suite_of):
    found = compare([suite_of(scale=1.0)], [suite_of(scale=10.0)], tolerance=1.25)
    assert found.clean
    assert found.unchanged == 4


def test_growth_within_the_tolerance_is_no_regression(suite_of):
    assert compare([suite_of(ratio=0.2)], [suite_of(ratio=0.24)], tolerance=1.25).clean
    assert not compare([suite_of(ratio=0.2)], [suite_of(ratio=0.24)], tolerance=1.1).clean


def test_growth_that_the_spread_explains_is_no_regression(suite_of):
    old, new = suite_of(ratio=0.2), suite_of(ratio=0.3)
    noisy = replace(
        new,
        cases=tuple(
            replace(
                case,
                rows=tuple(replace(row, ratio=row.ratio and replace(row.ratio, q1=0.1)) for row in case.rows),
            )
            for case in new.cases
        ),
    )
    assert compare([old], [noisy], tolerance=1.25).clean


def test_an_improvement_is_told_and_is_clean(suite_of):
    found = compare([suite_of(ratio=0.3)], [suite_of(ratio=0.2)], tolerance=1.25)
    assert found.clean
    assert len(found.improvements) == 4


def test_a_promise_that_was_held_and_is_missed_is_flagged(suite_of):
    found = compare([suite_of(promised=1.5)], [suite_of(promised=1.7)], tolerance=1.25)
    assert not found.clean
    assert found.broken == ("to_jax of one tensor / raw capsules",)
    assert compare([suite_of(promised=1.7)], [suite_of(promised=1.7)], tolerance=1.25).clean
    assert compare(
        [suite_of(promised=1.5)], [suite_of(promised=1.61)], tolerance=1.25
    ).clean  # within its spread


def test_what_other_libraries_do_is_no_concern(suite_of):
    suite = suite_of()
    assert all(
        "stock" not in change.what.split(" against ")[0]
        for change in compare([suite], [suite], 1.25).regressions
    )
    others_only = replace(suite, cases=tuple(replace(c, rows=c.rows[:1]) for c in suite.cases))
    with pytest.raises(RecordError, match="no measurement in common"):
        compare([others_only], [others_only], 1.25)


def test_measurements_of_one_run_only_are_named(suite_of):
    new = suite_of()
    found = compare([replace(new, cases=new.cases[:2])], [new], 1.25)
    assert len(found.unmatched) == 2


def test_different_devices_are_not_compared(suite_of):
    with pytest.raises(RecordError, match="cpu and cuda"):
        compare([suite_of(device="cpu")], [suite_of(device="cuda")], 1.25)


def test_the_table_puts_the_worst_first(suite_of):
    table = compare([suite_of(ratio=0.2)], [suite_of(ratio=0.3, promised=1.7)], 1.25).table()
    assert table.rows[0][1:] == ("0.2", "0.3", "1.50x slower")
    assert table.rows[-1] == ("promise: to_jax of one tensor / raw capsules", "held", "missed", "")
    assert table.caption.startswith("5 regressions")
