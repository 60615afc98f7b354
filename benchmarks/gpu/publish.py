"""A finished run goes into the manual: its figures beside the others, its page on the page about CUDA."""

from pathlib import Path

from .._record import RecordError, load, save
from .._report import put_between
from ._page import body
from ._run import RunError, load_run

__all__ = ["BEGIN", "END", "publish"]

BEGIN = "<!-- gpu run: begin (written by python -m benchmarks report --gpu) -->"
END = "<!-- gpu run: end -->"


def publish(folder: Path, results: Path, page: Path) -> None:
    """Copy the figures of a run to the results, and put its verdicts on a page.

    Args:
        folder: What ``python -m benchmarks gpu`` wrote.
        results: Gets ``cuda.json``.
        page: A Markdown file with the two markers.

    Raises:
        RecordError: The folder holds no run, one in which nothing ran, or a rehearsal.
        PageError: The page lacks a marker.
    """
    try:
        run = load_run(folder)
    except RunError as err:
        raise RecordError(str(err)) from err
    if run.rehearsal:
        raise RecordError(f"{folder} is a rehearsal: the CPU stood in for the GPU, so it has no results.")
    if not run.stages:
        raise RecordError(f"{folder} holds a run in which nothing ran; its summary.md says why.")
    put_between(page, BEGIN, END, body(run, folder))
    if (folder / "cuda.json").exists():
        save(results, "cuda", load(folder / "cuda.json"))
