"""Writes the index of files into docs/design.md. Run ``python docs/make_file_index.py`` after adding a file.

What a file does is the first paragraph of its docstring.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src" / "torchjax_bridge"
PAGE = ROOT / "docs" / "design.md"
START, END = "<!-- the index of files, by docs/make_file_index.py -->", "<!-- end of the index of files -->"


def index() -> str:
    """The index: one table for each package."""
    parts = []
    for folder in sorted({file.parent for file in LIBRARY.rglob("*.py")}):
        rows = [
            f"| `{file.name}` | {_first_paragraph(file)} |"
            for file in sorted(folder.glob("*.py"))
            if not file.name.startswith("__")
        ]
        if rows:
            name = folder.relative_to(LIBRARY)
            title = "torchjax_bridge" if not name.parts else name.as_posix()
            parts.append("\n".join([f"### {title}/", "", "| file | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with the index brought up to date."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{index()}\n\n{END}{after}"


def _first_paragraph(file: pathlib.Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
