"""Every Python snippet of every page, and every example of every docstring, runs and holds."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import torchjax_bridge

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
# A block of Python; and the block of text right below it, which is what it prints.
_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)(?:#[^)]*)?\)")


def _snippets(page: Path) -> list[tuple[int, str, str | None]]:
    text = page.read_text()
    return [(text[: found.start()].count("\n") + 2, *found.groups()) for found in _BLOCK.finditer(text)]


def test_a_section_that_says_so_runs_by_itself(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sections = [section for page in PAGES for section in page.read_text().split("\n## ")]
    alone = [section for section in sections if "section runs by itself" in " ".join(section.split())]
    for section in alone:
        exec("\n".join(code for code, _ in _BLOCK.findall(section)), {"__name__": "__main__"})
    assert {"Getting your own model across", "A layer of your own"} <= {one.split("\n")[0] for one in alone}
    assert (tmp_path / "unet-flax.safetensors").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if _snippets(page)], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run_and_print_what_it_shows(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    before = jax.config.jax_enable_x64
    try:
        for line, code, shown in _snippets(page):
            padded = "\n" * (line - 1) + code  # so that a traceback shows the line of the page
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(padded, str(page), "exec"), namespace)
            assert shown is None or printed.getvalue() == shown, f"{page.name}:{line} prints something else"
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_no_line_of_code_is_cut_off_on_the_page(page: Path) -> None:
    lines = [line for _, code, _ in _snippets(page) for line in code.splitlines()]
    assert not [line for line in lines if len(line) > 100]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _modules() -> list[str]:
    found = pkgutil.walk_packages(torchjax_bridge.__path__, "torchjax_bridge.")
    return ["torchjax_bridge", *sorted(info.name for info in found if not info.name.endswith("__main__"))]


@pytest.mark.parametrize("name", _modules())
def test_the_examples_of_a_module_hold(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not failed


def test_every_public_name_has_its_entry_in_the_reference() -> None:
    overview = (ROOT / "docs/api/index.md").read_text()
    entries = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    for name in torchjax_bridge.__all__:
        assert f"[`{name}`]" in overview, name
        assert re.search(rf"(?m)^::: torchjax_bridge\.(\w+\.)?{name}$", entries), name
