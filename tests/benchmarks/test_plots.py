import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks._curves import spread_out
from benchmarks._plots import draw


def test_every_picture_is_drawn_twice_and_holds_its_words(suite_of, tmp_path: Path):
    pytest.importorskip("matplotlib")
    written = draw(suite_of(), tmp_path)
    assert {path.name for path in written} == {
        f"exchange-{kind}-cpu.{ending}"
        for kind in ("latency", "throughput", "headline", "memory")
        for ending in ("svg", "png")
    }
    for path in written:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head
    memory = (tmp_path / "exchange-memory-cpu.svg").read_text()
    for words in ("convert", "load it whole", "the imports alone", "512 MB", "256 MB", "1 GB"):
        assert f"<!-- {words} -->" in memory or words in memory
    # matplotlib writes each text it draws as a comment beside its outline.
    picture = (tmp_path / "exchange-latency-cpu.svg").read_text()
    for words in (
        "torchjax-bridge",
        "memcpy, warm",
        "stock DLPack",
        "1 MB",
        "100 µs",
        "a processor, 2 cores",
    ):
        assert f"<!-- {words} -->" in picture or words in picture


def test_the_same_record_gives_the_same_bytes(suite_of, tmp_path: Path):
    pytest.importorskip("matplotlib")
    first, second = draw(suite_of(), tmp_path / "a"), draw(suite_of(), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_candidate_that_was_refused_is_in_the_bars_with_the_reason(suite_of, tmp_path: Path):
    pytest.importorskip("matplotlib")
    draw(suite_of(), tmp_path)
    assert "refused: shares memory" in (tmp_path / "exchange-headline-cpu.svg").read_text()


def test_without_matplotlib_drawing_says_so(suite_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib"):
        draw(suite_of(), tmp_path)


@pytest.mark.parametrize("wanted", [[0.5], [0.1, 0.1, 0.1], [0.0, 0.01, 0.9, 0.91, 0.92], [0.95, 0.97, 0.99]])
def test_labels_are_moved_apart_and_stay_in_order_within_the_panel(wanted: list[float]):
    placed = spread_out(wanted, 0.1, 0.05, 1.0)
    assert placed == sorted(placed)
    assert all(upper - lower > 0.09 for lower, upper in pairwise(placed))
    assert placed[0] >= 0.0
    assert placed[-1] <= 1.05
