import pytest

from benchmarks._case import Candidate, WrongResultError, ask
from benchmarks._setting import Setting

QUICK = Setting("cpu", quick=True)


def good(_: object) -> bool:
    return True


def bad(_: object) -> bool:
    raise WrongResultError("the values differ")


def test_a_wrong_result_of_ours_ends_the_run_before_anything_is_timed():
    calls: list[str] = []
    candidates = [
        Candidate("base", calls.append, "base", good),
        Candidate("ours", calls.append, "ours", bad, ours=True),
    ]
    with pytest.raises(WrongResultError, match="key: ours: the values differ"):
        ask("key", "?", candidates, QUICK)
    assert calls == ["base", "ours"]


def test_a_wrong_baseline_ends_the_run():
    with pytest.raises(WrongResultError, match="base"):
        ask("key", "?", [Candidate("base", str, 1, bad)], QUICK)


def test_a_wrong_result_of_another_library_is_recorded_and_not_timed():
    calls: list[str] = []
    case, rounds = ask(
        "key", "?", [Candidate("base", str, 1, good), Candidate("peer", calls.append, "peer", bad)], QUICK
    )
    assert case.row("peer").note == "the values differ"
    assert case.row("peer").microseconds is None
    assert calls == ["peer"]
    assert list(rounds.seconds) == ["base"]


def test_an_error_of_another_library_is_recorded_with_its_words():
    def fails(_: object) -> None:
        raise TypeError("no such\n  thing")

    case, _ = ask("key", "?", [Candidate("base", str, 1, good), Candidate("peer", fails, 1, good)], QUICK)
    assert case.row("peer").note == "no such thing"


def test_the_baseline_has_ratio_one_and_others_their_own():
    def slow(_: object) -> int:
        return sum(range(20_000))

    case, _ = ask(
        "key", "?", [Candidate("base", slow, 1, good), Candidate("quick", str, 1, good, ours=True)], QUICK
    )
    assert case.row("base").ratio.median == 1.0
    assert case.row("quick").ratio.median < 1.0
    assert case.row("quick").ours
    assert case.row("quick").shares is True
