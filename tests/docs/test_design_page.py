"""The pages about the code name files that exist, and the picture of imports is up to date."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NAMED = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:\.py|/))`")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_every_file_and_folder_that_is_named_exists(page: str) -> None:
    named = _NAMED.findall((ROOT / page).read_text().partition("<!-- the index of files")[0])
    assert len(named) > 10
    for name in named:
        places = [ROOT / name, ROOT / "src/torchjax_bridge" / name]
        assert any(place.exists() for place in places) or name in ("to_jax/", "to_torch/", "site/"), name


def test_the_table_names_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for init in (ROOT / "src/torchjax_bridge").rglob("__init__.py"):
        package = str(init.parent.relative_to(ROOT / "src/torchjax_bridge"))
        assert package in (".", "weights/layers") or f"{package}/" in text, package


@pytest.mark.parametrize("name", ["make_import_graph", "make_sync_picture"])
def test_a_picture_is_up_to_date(name: str) -> None:
    script = _script(name)
    assert script.PICTURE.read_text() == script.picture(), f"run python docs/{name}.py"


def test_the_index_of_files_is_what_the_docstrings_say() -> None:
    script = _script("make_file_index")
    text = script.PAGE.read_text()
    assert script.page(text) == text, "run python docs/make_file_index.py"
    for file in script.LIBRARY.rglob("_*.py"):
        assert file.name.startswith("__") or f"| `{file.name}` |" in text


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert _script("make_import_graph").transitive_reduction(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}


def _script(name: str = "make_import_graph") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
