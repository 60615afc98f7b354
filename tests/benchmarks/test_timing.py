import gc
import mmap
import sys
from pathlib import Path

import pytest

from benchmarks import _timing
from benchmarks._memory import give_back_memory
from benchmarks._timing import Pace, Rounds, Spread, Timed, measure

PACE = Pace(rounds=6, least_rounds=2, sample_seconds=0.0, seconds=60.0)


def settle_nothing(_: object) -> None:
    return None


def candidate(name: str, log: list[str]) -> Timed:
    return Timed(name, log.append, name)


def rounds_of(log: list[str], size: int) -> list[list[str]]:
    """The last samples of a log of one call each, cut into rounds."""
    tail = log[-6 * size :]
    return [tail[index : index + size] for index in range(0, len(tail), size)]


def test_every_round_begins_with_the_baseline_and_holds_each_candidate_once():
    log: list[str] = []
    names = ["base", "a", "b", "c"]
    found = measure([candidate(name, log) for name in names], PACE, settle_nothing)
    assert all(calls == 1 for calls in found.calls.values())
    for one in rounds_of(log, 4):
        assert one[0] == "base"
        assert sorted(one) == sorted(names)


def test_the_candidates_behind_the_baseline_do_not_keep_one_order():
    log: list[str] = []
    measure([candidate(name, log) for name in ("base", "a", "b", "c")], PACE, settle_nothing)
    assert len({tuple(one) for one in rounds_of(log, 4)}) > 1


def test_a_ratio_is_formed_within_a_round_so_that_a_drifting_machine_cancels():
    drift = [1.0, 10.0, 100.0]
    rounds = Rounds({"base": drift, "twice": [2 * value for value in drift]}, {"base": 1, "twice": 1})
    assert rounds.ratio("twice", "base") == Spread(2.0, 2.0, 2.0, 2.0)


def test_a_number_can_be_computed_from_each_round():
    rounds = Rounds({"whole": [5.0, 7.0], "part": [1.0, 2.0]}, {"whole": 1, "part": 1})
    spread = rounds.combine(lambda seconds: seconds["whole"] - seconds["part"])
    assert (spread.best, spread.median) == (4.0, 4.5)


def test_a_spread_is_median_quartiles_and_smallest():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(q1=2.0, median=3.0, q3=4.0, best=1.0)


def test_microseconds_are_seconds_per_call_times_a_million():
    assert Rounds({"one": [2e-6]}, {"one": 1}).microseconds("one").median == pytest.approx(2.0)


def test_a_sample_of_a_quick_call_holds_many_calls_and_settles_once():
    calls, settled = [0], [0]

    def call(_: object) -> None:
        calls[0] += 1

    def settle(_: object) -> None:
        settled[0] += 1

    pace = Pace(rounds=3, least_rounds=3, sample_seconds=1e-3, seconds=60.0)
    found = measure([Timed("quick", call, None)], pace, settle)
    assert found.calls["quick"] > 100
    assert calls[0] > 3 * found.calls["quick"]
    assert settled[0] < 30


def test_no_round_begins_after_the_time_is_up_but_the_least_are_taken():
    pace = Pace(rounds=1000, least_rounds=4, sample_seconds=0.0, seconds=0.0)
    found = measure([Timed("any", lambda _: None, None)], pace, settle_nothing)
    assert len(found.seconds["any"]) == 4


def test_the_garbage_collector_is_off_while_timing_and_on_again_even_after_an_error():
    seen: list[bool] = []

    def call(_: object) -> None:
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        measure([Timed("fails", call, None)], PACE, settle_nothing)
    assert seen == [False, False, False]
    assert gc.isenabled()


def test_a_cold_sample_is_one_call_before_which_freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    monkeypatch.setattr(_timing, "give_back_memory", lambda: log.append("given back"))
    pace = Pace(rounds=2, least_rounds=2, sample_seconds=1.0, seconds=60.0, cold=True)
    names = ("base", "other")
    found = measure(
        [Timed(name, lambda _, name=name: log.append(name), None) for name in names], pace, settle_nothing
    )
    assert found.calls == {"base": 1, "other": 1}
    assert log == ["given back", "base", "given back", "other"] * 2
    assert pace.times(3).cold


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_that_was_freed_is_given_back_to_the_kernel():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    blocks = [bytearray(1 << 16) for _ in range(2000)]  # from the heap, each less than the mmap threshold
    full = resident()
    keep = blocks[-1]  # the top of the heap stays, so that freeing alone gives nothing back
    del blocks
    give_back_memory()
    assert len(keep) == 1 << 16
    assert resident() < full - 60_000_000
