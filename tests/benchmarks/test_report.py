from pathlib import Path

import pytest

from benchmarks._record import RecordError, save
from benchmarks._report import BEGIN, END, PageError, section, write_page


def page(folder: Path, text: str) -> Path:
    path = folder / "docs" / "benchmarks.md"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_the_results_go_between_the_markers_and_nothing_else_changes(tmp_path: Path, suite_of):
    save(tmp_path / "results", "cpu", [suite_of()])
    (tmp_path / "results" / "exchange-latency-cpu.svg").write_text("<svg/>")
    path = page(tmp_path, f"before\n{BEGIN}\nold\n{END}\nafter\n")
    pictures = path.parent / "assets" / "benchmarks"
    pictures.mkdir(parents=True)
    (pictures / "gone.svg").write_text("<svg/>")
    write_page(tmp_path / "results", path, pictures)
    text = path.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| to_jax of one tensor / raw capsules | at most 1.6 x | 1.50 x | 1.47 to 1.53 | held |" in text
    assert "](assets/benchmarks/exchange-latency-cpu.svg)" in text
    assert [picture.name for picture in pictures.iterdir()] == ["exchange-latency-cpu.svg"]
    assert "throughput" not in text  # no picture, no link
    write_page(tmp_path / "results", path, pictures)
    assert path.read_text() == text


def test_a_page_without_markers_is_refused_and_left_alone(tmp_path: Path, suite_of):
    save(tmp_path / "results", "cpu", [suite_of()])
    path = page(tmp_path, f"only one\n{BEGIN}\n")
    with pytest.raises(PageError, match="lacks the line"):
        write_page(tmp_path / "results", path, path.parent / "assets")
    assert path.read_text() == f"only one\n{BEGIN}\n"


def test_a_damaged_result_file_leaves_the_page_alone(tmp_path: Path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text("{")
    path = page(tmp_path, f"{BEGIN}\nold\n{END}\n")
    with pytest.raises(RecordError):
        write_page(tmp_path / "results", path, path.parent / "assets")
    assert "old" in path.read_text()


def test_the_committed_page_says_what_the_committed_results_say(root: Path):
    results, docs = root / "benchmarks" / "results", root / "docs"
    text = (docs / "benchmarks.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == section(results, "assets/benchmarks").strip()


def test_the_committed_pictures_are_those_of_the_committed_results(root: Path):
    drawn = {path.name: path.read_bytes() for path in (root / "benchmarks" / "results").glob("*.svg")}
    shown = {path.name: path.read_bytes() for path in (root / "docs" / "assets" / "benchmarks").glob("*.svg")}
    assert drawn
    assert shown == drawn
